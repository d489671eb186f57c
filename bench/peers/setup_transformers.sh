#!/usr/bin/env bash
# Makes bench/.venvs/transformers: the CPU build of torch 2.13.0 and transformers 5.23.0.
# The "+cpu" keeps CUDA packages out; torch's own index has that build, where pip knows no nearer one.
set -euo pipefail
torch_index=https://download.pytorch.org/whl/cpu
cd "$(dirname "$0")/.."
venv=.venvs/transformers
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q --retries 1 --extra-index-url "$torch_index" "torch==2.13.0+cpu"
"$venv/bin/pip" install -q "transformers==5.23.0" accelerate
if "$venv/bin/pip" list 2>/dev/null | grep -i '^nvidia'; then
    echo "setup_transformers: CUDA packages came along; delete bench/$venv" >&2
    exit 1
fi
"$venv/bin/python" -c 'import torch, transformers; print("ready: torch", torch.__version__, "transformers", transformers.__version__)'

#!/usr/bin/env bash
# Makes bench/.venvs/transformers: the CPU build of torch 2.13.0 and transformers 5.23.0.
# The "+cpu" keeps CUDA packages out. Where pip finds no such build (plain PyPI has none for x86-64),
# set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu first.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venvs/transformers
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q "torch==2.13.0+cpu"
"$venv/bin/pip" install -q "transformers==5.23.0" accelerate
if "$venv/bin/pip" list 2>/dev/null | grep -i '^nvidia'; then
    echo "setup_transformers: CUDA packages came along; delete bench/$venv and see the note above" >&2
    exit 1
fi
"$venv/bin/python" -c 'import torch, transformers; print("ready: torch", torch.__version__, "transformers", transformers.__version__)'

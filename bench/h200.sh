#!/usr/bin/env bash
# All that only a GPU can tell, in under 9 minutes: build, tests/gpu, compute-sanitizer on the small cases, the
# GPU benchmarks. Results go to $OUT, or to bench/results. Needs torch with CUDA, triton, cupy and pytest in
# $PYTHON (python3); installs nothing. Goes on past what fails, and exits with 1 if anything did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
name=$(date +%F)-gpu
failed=()
mkdir -p "$out"

step() {  # name, seconds at most, command
    local title=$1 limit=$2
    shift 2
    echo "== $title"
    local began=$SECONDS
    timeout "$limit" "$@" 2>&1 | tee "$out/$name-$title.txt" | tail -n 40
    local code=${PIPESTATUS[0]}
    echo "== $title: exit $code after $((SECONDS - began)) s"
    if [ "$code" -ne 0 ]; then failed+=("$title"); fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step build 40 "$python" setup.py -q build_ext --inplace
step doctor 20 "$python" -m weaveinf doctor
step tests 180 "$python" -m pytest tests/gpu -q --maxfail=20 --durations=10 -p no:cacheprovider
step seam 60 "$python" bench/seam.py --json "$out/$name-seam.json"
emulated=("$python" bench/emulate.py --pairs 5)
step llama-70b 75 "${emulated[@]}" bench/shapes/llama-70b --tokens 256 512 1024 2048 4096 8192 16384 32768 65536 \
    --json "$out/$name-llama-70b.json"
step mixtral 45 "${emulated[@]}" bench/shapes/mixtral-8x22b --tokens 1024 2048 4096 8192 16384 \
    --json "$out/$name-mixtral.json"
step latency 40 "$python" -m weaveinf bench latency weaveinf/assets/demo --batch 8 --json "$out/$name-latency.json"
if command -v compute-sanitizer >/dev/null && compute-sanitizer "$python" -c "import torch; torch.ones(1).cuda()" >/dev/null
then
    small=("$python" -m pytest tests/gpu/test_seam.py -q -p no:cacheprovider)
    step memcheck 45 compute-sanitizer --error-exitcode 9 "${small[@]}" -k "float64 and (512 or 77) or eight"
    step racecheck 30 compute-sanitizer --tool racecheck --error-exitcode 9 "${small[@]}" -k "float64 and 77"
else
    echo "== compute-sanitizer is not to be had here"
fi

echo "== ${#failed[@]} failed: ${failed[*]:-none}; ${SECONDS} s in all"
[ ${#failed[@]} -eq 0 ]

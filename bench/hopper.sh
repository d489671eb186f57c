#!/usr/bin/env bash
# For whoever has 2 to 8 Hopper GPUs in a host:
#
#     bench/hopper.sh N [MODEL]      N ranks on each host
#
# First whether the seam of these GPUs is right, then its speed, what weaving gains, latency and throughput,
# and vLLM's where it is installed. On several hosts run it on each, with torchrun's words for them:
# HOSTS="--nnodes 2 --node-rank 0 --master-addr ADDRESS --master-port 29400". Results go to $OUT, or to
# bench/results. Without GPUs it runs dry: the same on this machine's cores, small. Installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
ranks=${1:?how many ranks on each host?}
read -ra hosts <<<"${HOSTS:---standalone}"
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    model=${2:-bench/shapes/llama-70b}
    format=$([ -n "$(find "$model" -name '*.safetensors' 2>/dev/null)" ] && echo auto || echo dummy)
    seam=(--hidden 8192 --rows 64 256 1024 4096 8192 16384)
    tokens=(256 512 1024 2048 4096 8192 16384)
    load=(--batch 8 --prompt-tokens 1024) requests=(--requests 256 --prompt-tokens 512)
else
    model=${2:-weaveinf/assets/demo} format=auto
    seam=(--hidden 256 --rows 16 64) tokens=(64 96)
    load=(--batch 2 --prompt-tokens 32 --decode-tokens 4 --repeats 1)
    requests=(--requests 4 --prompt-tokens 16 --output-tokens 4)
fi
name=$(date +%F)-$ranks-ranks
failed=()
mkdir -p "$out"

step() {  # name, command
    local title=$1
    shift
    echo "== $title"
    timeout 900 "$@" 2>&1 | tee "$out/$name-$title.txt" | tail -n 40
    local code=${PIPESTATUS[0]}
    echo "== $title: exit $code"
    if [ "$code" -ne 0 ]; then failed+=("$title"); fi
}
on_ranks() { step "$1" "$python" -m torch.distributed.run "${hosts[@]}" --nproc-per-node "$ranks" "${@:2}" --json "$out/$name-$1.json"; }

on_ranks seam bench/ranks.py "${seam[@]}"
if [ ${#failed[@]} -ne 0 ]; then
    echo "== the seam is not right here: nothing else is worth its time"
    exit 1
fi
on_ranks overlap -m weaveinf bench overlap "$model" --load-format "$format" --tokens "${tokens[@]}" --pairs 5
on_ranks latency -m weaveinf bench latency "$model" --load-format "$format" "${load[@]}"
on_ranks throughput -m weaveinf bench throughput "$model" --load-format "$format" "${requests[@]}"
if [ -z "${HOSTS:-}" ] && [ "$format" = auto ] && "$python" -c "import vllm" 2>/dev/null; then
    step vllm bash -c "echo '${load[1]} ${load[3]}' | '$python' bench/peers/time_vllm.py '$model' --tp $ranks"
else
    echo "== no vLLM beside: it is not installed, or there are several hosts, or the model has no weights"
fi
echo "== ${#failed[@]} failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]

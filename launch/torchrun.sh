#!/usr/bin/env bash
# Serves on this machine with torchrun's ranks:  RANKS=2 launch/torchrun.sh MODEL [OPTIONS]
# `weaveinf serve MODEL --tp 2` needs no torchrun; this is for places where everything is started by it.
set -euo pipefail

# torchrun kills what has not ended so long after SIGTERM: longer than the server's --drain-s (60).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-75}"

# --standalone: a meeting place of its own on a free port, so that two servers do not meet each other.
# --max-restarts: ranks that died are started anew, all together.
exec torchrun --standalone --nproc-per-node "${RANKS:-2}" --max-restarts 3 -m weaveinf serve "$@"

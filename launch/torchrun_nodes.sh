#!/usr/bin/env bash
# Serves on several machines with torchrun's ranks. The same line on each, with its own NODE (0, 1, ...):
#   HEAD=10.0.0.1 NODES=2 NODE=0 RANKS=2 launch/torchrun_nodes.sh MODEL [OPTIONS]
# Node 0, whose private address is HEAD, listens for clients. MODEL is at the same path on every machine.
set -euo pipefail
: "${HEAD:?the private address of node 0}" "${NODES:?how many machines}" "${NODE:?which of them this is, from 0}"

# Ranks talk unencrypted and trust each other, and torch's store listens on every interface of node 0: let
# the firewall open PORT, and the ports that the system hands out, to these machines only (SECURITY.md).
# Ranks use the interface that leads to HEAD; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name another.

# torchrun kills what has not ended so long after SIGTERM: longer than the server's --drain-s (60).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-75}"

# A fixed master, and not --rdzv-endpoint: there any machine may turn out to be node 0.
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${RANKS:-1}" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" -m weaveinf serve "$@"

#!/usr/bin/env bash
# Starts this node's processes of a run over several hosts. On every node, with its own NODE_RANK:
#
#   NODE_COUNT=4 NODE_RANK=0 MASTER_ADDR=node0 scripts/launch_node.sh --workdir /shared/runs/math \
#       --config configs/qwen3_14b.py:math_cot_ep8 --config.mesh.replica=4
#
# NODE_COUNT     nodes of the run (default 1)
# NODE_RANK      this node, from 0
# MASTER_ADDR    address of the node of rank 0
# MASTER_PORT    default 29400; it and the port after it must be free on that node
# PROC_PER_NODE  1 (default): one process drives all GPUs of the node; their number: one process each
#
# --workdir must be on a disk that all nodes share. Exits with 0 when all processes do, otherwise with the exit code
# of the first process that failed by itself; 9 (a peer was lost) only when no process has another code. SIGTERM
# and SIGINT are passed on. What still runs 30 seconds after another process failed is stuck, and is killed.
set -u
cd "$(dirname "$0")/.."
python=${JSFT_VENV:-.venv}/bin/python
export NODE_COUNT=${NODE_COUNT:-1} NODE_RANK=${NODE_RANK:-0} PROC_PER_NODE=${PROC_PER_NODE:-1}
if [[ $NODE_COUNT == 1 ]]; then export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}; fi
if [[ ! -x $python ]]; then echo "error: $python is not there; run scripts/setup.sh first" >&2; exit 2; fi

pids=()
for ((i = 0; i < PROC_PER_NODE; i++)); do
  LOCAL_RANK=$i "$python" -m jsft.train "$@" &
  pids+=($!)
done
pass_on() { for pid in "${pids[@]}"; do kill -"$1" "$pid" 2>/dev/null; done; }
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

result=0
left=${#pids[@]}
deadline= killed=
while ((left > 0)); do
  left=0
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[$i]}" 2>/dev/null; then left=$((left + 1)); continue; fi
    wait "${pids[$i]}"; code=$?
    unset "pids[$i]"
    if ((code != 0)) && [[ -z $killed ]]; then  # what was killed here did not fail by itself
      if ((result == 0 || (result == 9 && code != 9))); then result=$code; fi
      # The others learn of it over their link and exit by themselves; one that is stuck is killed here.
      deadline=${deadline:-$((SECONDS + 30))}
    fi
  done
  if [[ -n $deadline ]] && ((SECONDS > deadline)); then
    killed=yes
    pass_on KILL
  fi
  ((left > 0)) && sleep 0.3
done
exit "$result"

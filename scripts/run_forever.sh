#!/usr/bin/env bash
# Restarts a training after failures that a restart can fix, until it is done:
#
#   scripts/run_forever.sh --config configs/qwen3_14b.py:math_cot_ep8 --workdir runs/math
#   NODE_COUNT=4 NODE_RANK=0 MASTER_ADDR=node0 scripts/run_forever.sh scripts/launch_node.sh --config ...
#
# Restarts on exit code 8 (hang), 9 (a peer was lost), and on death by a signal (SIGKILL, SIGABRT, SIGBUS,
# SIGSEGV). Everything else needs a person: the script exits with that code. A run that was asked to stop (exit 0)
# is not restarted.
#
# JSFT_RESTARTS     restarts in a row without a new checkpoint before it gives up (default 10)
# JSFT_BACKOFF      seconds before the first restart (default 10); doubled each time, at most 300; reset by a
#                   new checkpoint
set -u
cd "$(dirname "$0")/.."
limit=${JSFT_RESTARTS:-10}
first_wait=${JSFT_BACKOFF:-10}
if (($# == 0)); then sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; fi
if [[ $1 == --* ]]; then set -- "${JSFT_VENV:-.venv}/bin/python" -m jsft.train "$@"; fi

# Where the run lives: as jsft.train finds it.
workdir= config=
previous=
for argument in "$@"; do
  case $previous in --workdir) workdir=$argument ;; --config) config=$argument ;; esac
  case $argument in --workdir=*) workdir=${argument#*=} ;; --config=*) config=${argument#*=} ;; esac
  previous=$argument
done
if [[ -z $workdir && -n $config ]]; then
  file=${config%%:*} recipe=${config#*:}
  workdir=runs/$(basename "$file" .py)$([[ $config == *:* ]] && echo "-$recipe")
fi

newest() { # the newest finished checkpoint's step, or 0
  local best=0 path step
  for path in "$workdir"/checkpoints/*/manifest.json; do
    step=$(basename "$(dirname "$path")")
    if [[ $step =~ ^[0-9]+$ ]] && ((step > best)); then best=$step; fi
  done
  echo "$best"
}

child= asked= interrupted=
pass_on() { asked=yes interrupted=yes; [[ -n $child ]] && kill -"$1" "$child" 2>/dev/null; }
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

restarts=0 wait_for=$first_wait step=$(newest)
while true; do
  "$@" &
  child=$!
  interrupted=yes
  while [[ -n $interrupted ]]; do # a signal interrupts wait
    interrupted=
    wait "$child"; code=$?
  done
  child=
  if [[ -n $asked || $code == 0 ]]; then exit "$code"; fi
  case $code in
    8 | 9 | 134 | 135 | 137 | 139) ;;
    *) echo "run_forever: a restart cannot fix exit code $code" >&2; exit "$code" ;;
  esac
  now=$(newest)
  if ((now > step)); then restarts=0 wait_for=$first_wait step=$now; fi
  if ((restarts >= limit)); then
    echo "run_forever: exit code $code again, $restarts restarts without a new checkpoint after step $step;" \
      "giving up" >&2
    exit "$code"
  fi
  restarts=$((restarts + 1))
  echo "run_forever: exit code $code; restart $restarts of at most $limit from step $now in $wait_for s" >&2
  sleep "$wait_for" & child=$!
  wait "$child"
  child=
  if [[ -n $asked ]]; then exit "$code"; fi
  wait_for=$((wait_for * 2 > 300 ? 300 : wait_for * 2))
done

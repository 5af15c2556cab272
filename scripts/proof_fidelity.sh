#!/usr/bin/env bash
# Proof 3: a small model in both fidelity modes; killed and resumed it is the same run, bit for bit.
#
#   scripts/proof_fidelity.sh [--tiny] [--stages a,b]
#
# All of it lies in runs/proof/fidelity (--tiny: runs/proof_tiny/fidelity); the same command resumes.
set -euo pipefail
name=fidelity
stages=(data reference best killed compare figures)
source "$(dirname "$0")/proof/common.sh"

stage_data() { countdown_data 20000; }

stage_reference() { train "fidelity_reference$tiny" "$folder/reference"; }
stage_best() { train "fidelity_best$tiny" "$folder/best"; }

stage_killed() {  # SIGKILL after a step that has no checkpoint of its own, then the same command again
  local kill_after=115 process
  [[ -z $tiny ]] || kill_after=33
  if [[ ! -e $folder/killed.txt ]]; then
    "$python" -m jsft.train --config "configs/proof.py:fidelity_best$tiny" --workdir "$folder/killed" &
    process=$!
    while kill -0 "$process" 2>/dev/null; do
      if [[ $(cat "$folder/killed/metrics.jsonl" 2>/dev/null | wc -l) -ge $kill_after ]]; then
        kill -KILL "$process"
        break
      fi
      sleep 0.05
    done
    wait "$process" 2>/dev/null || true
    if grep -q '"done"' "$folder/killed/status.json"; then fail "the run ended before it was killed"; fi
    echo "SIGKILL after step $(wc -l <"$folder/killed/metrics.jsonl")" \
      "with checkpoints of steps $(ls "$folder/killed/checkpoints" | xargs)" | tee "$folder/killed.txt"
  fi
  train "fidelity_best$tiny" "$folder/killed"
}

stage_compare() {
  JAX_PLATFORMS=cpu "$python" scripts/proof/same_run.py "$folder/best" "$folder/killed" |
    tee "$folder/same.txt"
}

stage_figures() { "$python" scripts/proof/figures.py fidelity "$folder"; }

run_stages "$@"

#!/usr/bin/env bash
# Proof 2: a Qwen3 of 31 M random weights learns Countdown with a chain of thought; as an ablation, without.
#
#   scripts/proof_scratch.sh [--tiny] [--no-serve] [--stages a,b]
#
# All of it lies in runs/proof/scratch (--tiny: runs/proof_tiny/scratch); the same command resumes.
set -euo pipefail
name=scratch
stages=(data cot answers export evaluate figures)
source "$(dirname "$0")/proof/common.sh"

stage_data() {
  local set
  countdown_data 100000
  for set in heldout train; do
    [[ -e $folder/${set}_answers.parquet ]] ||
      "$python" -m jsft.prepare nocot "$folder/$set.parquet" --out "$folder/${set}_answers.parquet"
  done
  cp "$folder/heldout.parquet" "$folder/eval_countdown.parquet"  # under this name evaluation looks for it
}

stage_cot() { train "countdown_cot$tiny" "$folder/cot"; }
stage_answers() { train "countdown_answers$tiny" "$folder/answers"; }

steps() { if [[ -n $tiny ]]; then echo 4,8,12; else echo 125,250,375,500,750,1000; fi; }

stage_export() {
  local run
  for run in cot answers; do export_steps "$folder/$run" "$(steps)"; done
}

stage_evaluate() {
  [[ $serve == 1 ]] || { echo "left out: --no-serve"; return; }
  local run tokens=1024 chosen
  chosen=$(steps)
  if [[ -n $tiny ]]; then tokens=64 chosen=12; fi
  for run in cot answers; do
    evaluate "$folder/$run" "$folder/$run/eval" --steps "$chosen" --tasks countdown --data_dir "$folder" \
      --max_tokens "$tokens"
  done
}

stage_figures() { "$python" scripts/proof/figures.py scratch "$folder"; }

run_stages "$@"

#!/usr/bin/env bash
# Proof 4: training with float8 products beside training with bfloat16 ones, from the same start on the same rows.
#
#   scripts/proof_fp8.sh --gsm8k FOLDER [--no-serve] [--together] [--forward all,none] [--stages a,b]
#   scripts/proof_fp8.sh --tiny
#
# GSM8K from SmolLM2-135M, three data seeds in bfloat16 and one in float8; Countdown from scratch, 1,000 updates;
# a random model as large as Qwen3-4B, 100 updates, whose state is never saved. FOLDER (or JSFT_GSM8K) as for
# proof_pretrained.sh. All of it lies in runs/proof/fp8 (--tiny: runs/proof_tiny/fp8, with very small models); the same
# command resumes. results.md says which criteria hold.
set -euo pipefail
name=fp8
stages=(data models gsm8k countdown large export evaluate figures)
source "$(dirname "$0")/proof/common.sh"

stage_data() {
  local made=() from=$gsm8k
  if [[ -n $tiny ]]; then
    from=$folder/made made=(--made 400 --heldout 40)
  fi
  [[ -n $from ]] || fail "where is GSM8K? name its folder with --gsm8k FOLDER; --help says what it holds"
  [[ -e $folder/gsm8k/train.parquet ]] || "$python" scripts/proof/gsm8k.py "$from" "$folder/gsm8k" "${made[@]}"
  countdown_data 100000
  cp "$folder/heldout.parquet" "$folder/eval_countdown.parquet"  # under this name evaluation looks for it
}

stage_models() {
  local size=qwen3_4b
  [[ -z $tiny ]] || size=tiny
  if [[ -n $tiny ]]; then
    "$python" scripts/proof/models.py pair "$folder/models"
  else
    mkdir -p "$folder/models"
    "$python" scripts/proof/smollm2.py "$folder/models"
  fi
  "$python" scripts/proof/models.py countdown "$folder/train.parquet" "$folder/large_base" \
    --size "$size"
}

run() {  # run WHAT PRODUCTS SEED; PRODUCTS: bfloat16, float8 or float8-FORWARD; with --together in the background
  local command=(train "fp8_$1$tiny" "$folder/$1/$2_seed$3" "--config.precision.matmul=${2%-*}" "--config.train.seed=$3")
  [[ $2 != *-* ]] || command+=("--config.precision.float8_forward=${2#*-}")
  if [[ -z $together ]]; then
    "${command[@]}"
    return
  fi
  mkdir -p "$folder/logs"
  echo "$1, $2, seed $3: $folder/logs/$1_$2_seed$3.log"
  XLA_PYTHON_CLIENT_MEM_FRACTION=$share "${command[@]}" >"$folder/logs/$1_$2_seed$3.log" 2>&1 &
  started+=($!)
}

share_among() {  # share_among RUNS: what each of them gets of the GPU's memory, a tenth left for what JAX does not count
  share=$(printf '0.%02d' $((90 / $1)))
}

finish() {  # waits for what `run` started
  local pid failed=0
  for pid in ${started[@]+"${started[@]}"}; do wait "$pid" || failed=1; done
  started=()
  [[ $failed == 0 ]] || fail "a run failed: the logs in $folder/logs say why"
}

started=() share=''
stage_gsm8k() {
  share_among $((4 + $(wc -w <<<"$forward")))
  run gsm8k float8 0
  for value in $forward; do run gsm8k "float8-$value" 0; done
  for seed in 0 1 2; do run gsm8k bfloat16 "$seed"; done
  finish
}
stage_countdown() {
  share_among $((2 + $(wc -w <<<"$forward")))
  for products in bfloat16 float8; do run countdown "$products" 0; done
  for value in $forward; do run countdown "float8-$value" 0; done
  finish
}
stage_large() {
  for products in bfloat16 float8; do
    say "training: $products; no checkpoints"
    "$python" scripts/proof/unsaved.py "$folder/large/${products}_seed0" --config "configs/proof.py:fp8_large$tiny" \
      "--config.precision.matmul=$products"
  done
}

lowest() {  # lowest RUN: its saved step with the lowest held-out loss
  "$python" - "$1" <<'PYTHON'
import json, sys
from pathlib import Path
run = Path(sys.argv[1])
saved = {int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()}
records = map(json.loads, (run / "heldout.jsonl").read_text().splitlines())
print(min((r for r in records if r["step"] in saved), key=lambda r: r["heldout/loss"])["step"])
PYTHON
}

stage_export() {
  local made
  for made in "$folder"/{gsm8k,countdown}/*_seed*; do export_steps "$made" "$(lowest "$made")"; done
}

stage_evaluate() {
  [[ $serve == 1 ]] || { echo "left out: --no-serve"; return; }
  local made
  for made in "$folder"/{gsm8k,countdown}/*_seed*; do
    local task options
    task=$(basename "$(dirname "$made")")
    options=(--tasks "$task" --data_dir "$folder" --max_tokens 1024)
    if [[ $task == gsm8k ]]; then options=(--tasks gsm8k --data_dir "$folder/gsm8k" --max_tokens 512 --samples 16); fi
    if [[ -n $tiny ]]; then options+=(--max_tokens 32 --limit 20); fi
    evaluate "$made/hf/step_$(lowest "$made")" "$made/eval" "${options[@]}"
  done
}

stage_figures() { "$python" scripts/proof/figures.py fp8 "$folder"; }

run_stages "$@"

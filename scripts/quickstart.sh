#!/usr/bin/env bash
# From nothing to a trained model: set-up, data, training, export, and vLLM's word before and after.
#
#   scripts/quickstart.sh              everything (about 6 minutes on two CPU cores, installation included)
#   scripts/quickstart.sh --no-serve   without vLLM (about 3 minutes)
#
# Uses the GPUs there are, else 8 virtual CPU devices. Everything lies in runs/quickstart; running it again starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

serve=1
for argument in "$@"; do
  case $argument in
    --no-serve) serve=0 ;;
    -h | --help) sed -n '2,7p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "quickstart: unknown option '$argument'; known: --no-serve" >&2; exit 2 ;;
  esac
done
step() { printf '\n== %s\n' "$*"; }
started=$SECONDS
dir=runs/quickstart
python=${JSFT_VENV:-.venv}/bin/python
config=configs/quickstart.py:countdown
puzzles=(--numbers 2-3 --max_number 9 --target 1-20 --attempts 1)

step "environment"
scripts/setup.sh
if [[ ! -e /proc/driver/nvidia/version && ! -e /dev/nvidiactl ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8"
fi

step "data: Countdown puzzles with worked solutions, each checked in exact arithmetic"
rm -rf "$dir"
mkdir -p "$dir"
"$python" -m jsft.prepare countdown --rows 100 --seed 2 "${puzzles[@]}" --out "$dir/eval_countdown.parquet"
"$python" -m jsft.prepare countdown --rows 4000 --seed 1 "${puzzles[@]}" --repeat --exclude "$dir/eval_countdown.parquet" \
  --out "$dir/train.parquet"

step "model: a small random Qwen3 with a byte-level tokenizer"
"$python" - "$dir/base" <<'PYTHON'
import sys
from jsft.hf.random_model import write_random_model

write_random_model(sys.argv[1], "qwen3", hidden_size=128, layers=3, heads=4, kv_heads=2, head_dim=32,
                   intermediate_size=384, max_positions=1024)
PYTHON

step "training: python -m jsft.train --config $config --workdir $dir/run"
"$python" -m jsft.train --config "$config" --workdir "$dir/run"

step "export: python -m jsft.export --workdir $dir/run --step latest"
"$python" -m jsft.export --workdir "$dir/run" --step latest --out "$dir/hf"

if [[ $serve == 1 ]]; then
  step "evaluation: vLLM on the held-out puzzles, before and after"
  scripts/setup.sh --serve
  for model in base hf; do
    scripts/eval_vllm.sh "$dir/$model" --tasks countdown --data_dir "$dir" --samples 1 --max_tokens 384 \
      --out "$dir/eval/$model"
  done
fi

step "result (after $((SECONDS - started)) s)"
"$python" - "$dir" "$serve" <<'PYTHON'
import json
import sys
from pathlib import Path

folder, serve = Path(sys.argv[1]), sys.argv[2] == "1"
losses = [json.loads(line) for line in (folder / "run/heldout.jsonl").read_text().splitlines()]
print(f"held-out loss   {losses[0]['eval_countdown/loss']:.3f} before, {losses[-1]['eval_countdown/loss']:.3f} after")
if serve:
    solved = {}
    for model in ("base", "hf"):
        results = json.loads(next((folder / "eval" / model).rglob("results.json")).read_text())
        solved[model] = 100 * results["score"]["mean"]
    print(f"solved          {solved['base']:.0f} % before, {solved['hf']:.0f} % after, of 100 held-out puzzles")
print(f"run             {folder}/run (metrics.jsonl, log.txt, tensorboard/, checkpoints/)")
print(f"trained model   {folder}/hf (Hugging Face safetensors)")
if serve:
    print(f"samples         {folder}/eval/*/countdown/samples.jsonl")
if not losses[-1]["eval_countdown/loss"] < losses[0]["eval_countdown/loss"]:
    sys.exit("quickstart: the held-out loss did not fall; please report this")
PYTHON

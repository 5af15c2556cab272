#!/usr/bin/env bash
# From nothing to a model that solves puzzles: set-up, data, training, export, and vLLM's word before and after.
#
#   scripts/quickstart.sh              everything (about 6 minutes on two CPU cores, installation included)
#   scripts/quickstart.sh --no-serve   without vLLM (about 3 minutes)
#   scripts/quickstart.sh --seed 7     with other puzzles and another order (default: 1)
#
# Uses the GPUs there are, else 2 virtual CPU devices. Everything lies in runs/quickstart; running it again starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

serve=1 seed=1
while [[ $# -gt 0 ]]; do
  case $1 in
    --no-serve) serve=0 ;;
    --seed)
      [[ ${2:-} =~ ^[0-9]{1,9}$ ]] || { echo "quickstart: --seed needs a whole number" >&2; exit 2; }
      seed=$((10#$2))
      shift
      ;;
    -h | --help) sed -n '2,8p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "quickstart: unknown option '$1'; known: --no-serve, --seed N" >&2; exit 2 ;;
  esac
  shift
done
step() { printf '\n== %s\n' "$*"; }
started=$SECONDS
dir=runs/quickstart
python=${JSFT_VENV:-.venv}/bin/python
config=configs/quickstart.py:countdown
puzzles=(--numbers 2 --max_number 30 --target 1-60 --operations +- --attempts 0)

gpu=0
if [[ -e /proc/driver/nvidia/version || -e /dev/nvidiactl ]]; then gpu=1; fi
cost() {  # WHAT DIRECTORY SIZE MINUTES: one line, by whether DIRECTORY is there already
  if [[ -x $2/bin/python ]]; then printf '  %-34s there: %s\n' "$1" "$2"; else printf '  %-34s %s, %s\n' "$1" "$3" "$4"; fi
}
echo "quickstart: what follows, with two CPU cores and an ordinary network"
cost "training environment (JAX)" "${JSFT_VENV:-.venv}" "1.5 GB of disk" "1 to 2 minutes"
printf '  %-34s %s\n' "data, training, export" "a few MB, about 2 minutes"
if [[ $serve == 1 ]]; then
  cost "serving environment (vLLM)" "${JSFT_SERVE_VENV:-.venv-serve}" \
    "$([[ $gpu == 1 ]] && echo "10 GB" || echo "3.7 GB") of disk" "2 minutes (--no-serve leaves it out)"
  printf '  %-34s %s\n' "vLLM on 100 held-out puzzles" "about 1 minute"
fi

step "environment"
scripts/setup.sh
if [[ $gpu == 0 ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
fi

step "data: Countdown puzzles with worked solutions; held-out ones share no set of numbers with them"
rm -rf "$dir"
mkdir -p "$dir"
"$python" -m jsft.prepare countdown --rows 100 --seed "$((seed + 1000000))" "${puzzles[@]}" \
  --out "$dir/eval_countdown.parquet"
"$python" -m jsft.prepare countdown --rows 3200 --seed "$seed" "${puzzles[@]}" --repeat \
  --exclude_numbers "$dir/eval_countdown.parquet" --out "$dir/train.parquet"

step "model: a small random Qwen3 whose tokenizer has the words and numbers of the puzzles"
"$python" scripts/quickstart_parts.py model "$dir"

step "training: python -m jsft.train --config $config --workdir $dir/run"
"$python" -m jsft.train --config "$config" --workdir "$dir/run" --config.train.seed="$seed"

step "export: python -m jsft.export --workdir $dir/run --step latest"
"$python" -m jsft.export --workdir "$dir/run" --step latest

if [[ $serve == 1 ]]; then
  step "evaluation: vLLM on the held-out puzzles, before (step 0) and after"
  scripts/setup.sh --serve
  scripts/eval_vllm.sh "$dir/run" --steps 0,latest --tasks countdown --data_dir "$dir" --samples 1 --temperature 0 \
    --max_tokens 96
fi

step "result (after $((SECONDS - started)) s)"
"$python" scripts/quickstart_parts.py result "$dir"

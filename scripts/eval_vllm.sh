#!/usr/bin/env bash
# Benchmarks a model with vLLM; sets up the serving environment first where it is missing.
#
#   scripts/eval_vllm.sh [MODEL_DIR | WORKDIR | HUB_ID[:subfolder]] [--tasks a,b] [--steps 10,20,...|all]
#                        [--tp N] [--data_dir DIR] [--out DIR] [--no-setup] ...
#
# Bare: the run runs/latest points to. --no-setup: the environment is there as it should be, install nothing (as on a
# node without a network). --help lists all other options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JSFT_SERVE_VENV:-$root/.venv-serve}
setup=1
arguments=()
for argument in "$@"; do
  if [[ $argument == --no-setup ]]; then setup=0; else arguments+=("$argument"); fi
done
if [[ $setup == 1 ]]; then
  "$root/scripts/setup.sh" --serve --quiet
elif [[ ! -x $venv/bin/python ]]; then
  echo "eval_vllm: there is no $venv/bin/python; name the serving environment in JSFT_SERVE_VENV," \
    "or leave out --no-setup, which makes it" >&2
  exit 2
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$venv/bin/python" -m jsft.evaluate "${arguments[@]}"

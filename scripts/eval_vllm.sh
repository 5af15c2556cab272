#!/usr/bin/env bash
# Benchmarks a model with vLLM; sets up the serving environment first where it is missing.
#
#   scripts/eval_vllm.sh [MODEL_DIR | WORKDIR | HUB_ID[:subfolder]] [--tasks a,b] [--steps 10,20,...|all]
#                        [--tp N] [--data_dir DIR] [--out DIR] ...
#
# Bare: the run runs/latest points to. --help lists all options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JSFT_SERVE_VENV:-$root/.venv-serve}
"$root/scripts/setup.sh" --serve --quiet
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$venv/bin/python" -m jsft.evaluate "$@"

# What scripts/proof_*.sh share: options, environments, stages. Sourced by them with
#   name, and stage_NAME functions for each word of `stages`; then: run_stages "$@"
#
# Environment: JSFT_VENV and JSFT_SERVE_VENV name the environments, JSFT_TORCH_PYTHON a Python with torch and
# transformers that runs the control (default: the serving environment's).

python=${JSFT_VENV:-.venv}/bin/python
serve_venv=${JSFT_SERVE_VENV:-.venv-serve}
torch_python=${JSFT_TORCH_PYTHON:-$serve_venv/bin/python}
tiny='' serve=1 setup=1 together='' gsm8k=${JSFT_GSM8K:-} wanted='' limit='' samples=4 forward=''

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
fail() { echo "proof_$name: $*" >&2; exit 2; }

usage() {
  sed -n '2,/^[^#]/p' "$0" | sed -n 's/^# \{0,1\}//p'
  cat <<TEXT

  --tiny         the same stages within two minutes on a CPU, with a very small model
  --no-serve     without vLLM
  --stages a,b   some stages only, of: ${stages[*]}
  --no-setup     the environments are there as they should be: install nothing
  --limit N      evaluate with the first N problems only
  --forward a,b  proof_fp8.sh: float8 with these values of precision.float8_forward too (all, none)
  --together     proof_fp8.sh: the runs of a stage side by side on the GPU, which divide its memory
TEXT
}

countdown_data() {  # ROWS: puzzles to train on and to hold out, and the random model that learns them
  local puzzles=(--numbers 3 --max_number 30 --attempts 6) rows=$1 heldout=500
  if [[ -n $tiny ]]; then
    puzzles=(--numbers 2 --max_number 9 --target 1-20 --attempts 1) rows=300 heldout=20
  fi
  [[ -e $folder/heldout.parquet ]] ||
    "$python" -m jsft.prepare countdown --rows "$heldout" --seed 2 "${puzzles[@]}" \
      --out "$folder/heldout.parquet"
  [[ -e $folder/train.parquet ]] ||
    "$python" -m jsft.prepare countdown --rows "$rows" --seed 1 "${puzzles[@]}" --repeat \
      --exclude "$folder/heldout.parquet" --out "$folder/train.parquet"
  "$python" scripts/proof/models.py countdown "$folder/train.parquet" "$folder/base" ${tiny:+--tiny}
}

parse() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --tiny) tiny=_tiny ;;
      --no-serve) serve=0 ;;
      --no-setup) setup=0 ;;
      --together) together=1 ;;
      --stages | --limit | --gsm8k | --forward)
        [[ $# -ge 2 ]] || fail "$1 needs a value; --help lists the options"
        case $1 in
          --stages) wanted=${2//,/ } ;;
          --limit) limit=$2 ;;
          --gsm8k) gsm8k=$2 ;;
          --forward) forward=${2//,/ } ;;
        esac
        shift
        ;;
      -h | --help) usage; exit 0 ;;
      *) fail "unknown option '$1'; --help lists them" ;;
    esac
    shift
  done
  local stage
  for stage in $wanted; do
    [[ " ${stages[*]} " == *" $stage "* ]] || fail "unknown stage '$stage'; there are: ${stages[*]}"
  done
}

environments() {
  if [[ $setup == 1 ]]; then
    scripts/setup.sh --quiet
    if [[ $serve == 1 || $name == pretrained ]]; then scripts/setup.sh --serve --quiet; fi
  fi
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  if [[ ! -e /proc/driver/nvidia/version && ! -e /dev/nvidiactl ]] && ! nvidia-smi -L >/dev/null 2>&1; then
    export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
    [[ -n $tiny ]] || echo "proof_$name: no GPU here: this takes many hours; --tiny is meant for CPUs" >&2
  fi
}

train() {  # train RECIPE WORKDIR [OPTION...]: a run, or what is left of it
  local recipe=$1 workdir=$2
  shift 2
  say "training: python -m jsft.train --config configs/proof.py:$recipe --workdir $workdir"
  "$python" -m jsft.train --config "configs/proof.py:$recipe" --workdir "$workdir" "$@"
}

export_steps() {  # export_steps WORKDIR STEPS: those that are not there yet
  local step missing=()
  for step in ${2//,/ }; do
    [[ -d $1/hf/step_$step ]] || missing+=("$step")
  done
  [[ ${#missing[@]} == 0 ]] || (IFS=, && "$python" -m jsft.export --workdir "$1" --step "${missing[*]}")
}

evaluate() {  # evaluate MODEL OUT OPTION...
  local model=$1 out=$2
  shift 2
  [[ -z $limit ]] || set -- "$@" --limit "$limit"
  [[ $setup == 1 ]] || set -- "$@" --no-setup
  scripts/eval_vllm.sh "$model" --out "$out" "$@"
}

run_stages() {
  cd "$(dirname "$0")/.."
  parse "$@"
  folder=runs/proof$tiny/$name
  mkdir -p "$folder"
  environments
  local stage
  for stage in ${wanted:-${stages[*]}}; do
    say "$stage"
    "stage_$stage"
  done
  say "proof_$name: done; all of it lies in $folder"
}

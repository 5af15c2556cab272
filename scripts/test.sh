#!/usr/bin/env bash
# Sets up what the tests need, checks format and lint, and runs pytest on 8 virtual CPU devices.
#
#   scripts/test.sh                 the quick suite, a process for each core (at most 8; -n 1: one at a time);
#                                   vLLM tests too where the serving environment can be made
#   scripts/test.sh --no-serve      without the serving environment (vLLM and torch oracles are skipped)
#   scripts/test.sh --jax 0.11.2    with this version of JAX, in an environment of its own (.venv-jax0.11.2)
#   scripts/test.sh -m slow         the long proofs; any other argument goes to pytest as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

serve=1
arguments=()
while [[ $# -gt 0 ]]; do
  argument=$1
  shift
  case $argument in
    --no-serve) serve=0 ;;
    --jax)
      [[ ${1:-} =~ ^[0-9.]+$ ]] || { echo "test: --jax wants a version, as in --jax 0.11.2" >&2; exit 2; }
      export JSFT_JAX=$1 JSFT_VENV=$PWD/.venv-jax$1
      shift
      ;;
    -h | --help) sed -n '2,8p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done
if [[ $serve == 1 ]]; then
  scripts/setup.sh --serve &  # takes minutes on a new machine, as does the other
  serving=$!
else
  export JSFT_SERVE_VENV=/nonexistent
fi
scripts/setup.sh
bin=${JSFT_VENV:-.venv}/bin
if ! { "$bin/ruff" format --check --quiet . && "$bin/ruff" check --quiet .; }; then
  echo "test: format or lint; fix with: $bin/ruff format . && $bin/ruff check --fix ." >&2
  exit 1
fi
if [[ $serve == 1 ]]; then
  wait "$serving" || echo "test: no serving environment here; vLLM tests and torch oracles are skipped" >&2
fi
# Proofs by mark time themselves or share one GPU: they run one at a time. A file's tests stay together.
if [[ " ${arguments[*]} " != *" -m "* ]]; then
  cores=$(nproc)
  arguments=(-n $((cores < 8 ? cores : 8)) --dist loadfile "${arguments[@]}")
fi
exec "$bin/python" -m pytest "${arguments[@]}"

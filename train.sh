#!/usr/bin/env bash
# Fine-tunes a language model: ./train.sh [FLAGS] [HYDRA OVERRIDES]; ./train.sh --help lists them.
set -euo pipefail
[ -z "${SFT_TIMING:-}" ] || export SFT_TIMING_STARTED="${EPOCHREALTIME:-$(date +%s.%N)}"
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")  # also through a link to this file

for word in "$@"; do
  if [ "$word" = "--help" ] || [ "$word" = "-h" ]; then
    PYTHONPATH="$here" exec python3 -m sft_recipe.cli.train --help  # needs no environment
  fi
done

. "$here/scripts/environment.sh"
choose_environment "" sft_recipe.cli.train "$@"

# glibc keeps small freed blocks for each thread, and what a thread frees is not there for the others. On a CPU this
# fragments the heap, which also holds the tensors, and costs a tenth of all memory or more.
compgen -G '/dev/nvidia[0-9]*' >/dev/null || export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1}"
exec "$PYTHON" -m sft_recipe.cli.train "$@"

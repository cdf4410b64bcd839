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

# glibc keeps small freed blocks for each thread. On a CPU they fragment the heap that also holds the tensors, which costs
# about a tenth of all memory.
compgen -G '/dev/nvidia[0-9]*' >/dev/null || export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.tcache_count=0}"
exec "$PYTHON" -m sft_recipe.cli.train "$@"

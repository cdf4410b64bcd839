#!/usr/bin/env bash
# Sets itself up, then checks style, types and behavior: scripts/test.sh [--all] [pytest arguments]
# Without --all it leaves out the tests that are marked slow. Arguments go to pytest: scripts/test.sh tests/data -k json
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

. scripts/environment.sh
choose_environment dev

select="not slow" arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then select=""; else arguments+=("$argument"); fi
done

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy sft_recipe
exec "$PYTHON" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder \
  -m "$select" ${arguments[@]+"${arguments[@]}"}

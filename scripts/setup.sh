#!/usr/bin/env bash
# Make .venv with this package, SGLang and the test tools. Quick when there is nothing to do.
#
#   scripts/setup.sh                        Python 3.11, or the one in $PYTHON
#   ROTATEK_VENV=/path scripts/setup.sh     use an existing environment instead of .venv
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$repo_root"

is_python_3_11_or_later() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

has_distribution() {
  "$venv/bin/python" -c 'import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])' "$1" >/dev/null 2>&1
}

pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check "$@" ||
    fail "pip install $* failed; the reason is above. Remedy: mend it (disk space, network) and run scripts/setup.sh again"
}

choose_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && is_python_3_11_or_later "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not a Python 3.11 or later"
  done
  fail "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python3.11 scripts/setup.sh"
}

use_existing_environment() {
  [[ -x $venv/bin/python ]] || fail "ROTATEK_VENV=$venv has no bin/python"
  is_python_3_11_or_later "$venv/bin/python" || fail "ROTATEK_VENV=$venv is older than Python 3.11"
  if ! has_distribution sglang; then
    pip_install -e '.[dev]'
  elif ! has_distribution sglang-rotatek; then
    pip_install --no-deps -e .
  fi
}

make_environment() {
  local stamp=$venv/.setup-stamp wanted python
  wanted=$(cksum <pyproject.toml)
  if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  if [[ ! -x $venv/bin/python ]]; then
    python=$(choose_python)
    "$python" -m venv "$venv" || fail "$python -m venv $venv failed (on Debian or Ubuntu: install python3-venv)"
  fi
  is_python_3_11_or_later "$venv/bin/python" ||
    fail "$venv is not a Python 3.11 or later; remove it and run scripts/setup.sh again"
  pip_install -e '.[dev]'
  printf '%s\n' "$wanted" >"$stamp"
}

if [[ -n ${ROTATEK_VENV:-} ]]; then
  use_existing_environment
else
  make_environment
fi
echo "environment ready: $venv"

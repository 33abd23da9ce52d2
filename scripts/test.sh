#!/usr/bin/env bash
# Set up and run the tests:  scripts/test.sh [pytest arguments...]
# Without arguments: the linters, then all of tests/ but those marked slow.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$repo_root/scripts/setup.sh"
cd "$repo_root"

"$venv/bin/python" -c 'import pytest' 2>/dev/null ||
  fail "pytest is not in $venv; install it: $venv/bin/python -m pip install -e '.[dev]'"
if [[ $# -eq 0 ]]; then
  "$venv/bin/python" -c 'import ruff, mypy' 2>/dev/null ||
    fail "ruff or mypy is not in $venv; install them: $venv/bin/python -m pip install -e '.[dev]'"
  "$venv/bin/python" -m ruff check .
  "$venv/bin/python" -m ruff format --check .
  "$venv/bin/python" -m mypy
fi
# The tests make their models; nothing is fetched.
export HF_HUB_OFFLINE=1
pytest=("$venv/bin/python" -m pytest -q)
if has_nvidia_driver; then
  [[ $# -gt 0 ]] || set -- tests -m "not slow"
  exec "${pytest[@]}" "$@"
fi
export_cpu_environment
[[ $# -eq 0 ]] || exec "${pytest[@]}" "$@"
# Triton decides at import whether it interprets kernels, and the servers of the other tests must not.
status=0
interpreted=(tests/test_kernels.py tests/test_kernels_coded.py tests/test_kernels_backend.py tests/test_pruning_kernel.py)
TRITON_INTERPRET=1 "${pytest[@]}" -n auto "${interpreted[@]}" -m "not slow" || status=$?
"${pytest[@]}" -n auto tests -m "not slow and not server" "${interpreted[@]/#/--ignore=}" || status=$?
# Two servers at a time, whatever the cores: each takes 2 GB, and little more than one core.
"${pytest[@]}" -n 2 --dist loadfile tests -m "not slow and server" || status=$?
exit "$status"

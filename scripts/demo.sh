#!/usr/bin/env bash
# Set up, then chat about images with a real RotateK server per backbone:  scripts/demo.sh [demo.py flags...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$repo_root/scripts/setup.sh"
cd "$repo_root"
if ! has_nvidia_driver; then
  export_cpu_environment
fi
exec "$venv/bin/python" scripts/demo.py "$@"

#!/usr/bin/env bash
# Start N servers and SGLang's router in front of them:  scripts/serve_many.sh MODEL N [sglang flags...]
#
#   scripts/serve_many.sh Qwen/Qwen2.5-VL-7B-Instruct 4 --enable-rotatek
#
# serve_many.py says how GPUs and ports are chosen, and which header clients should send.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
require_venv
exec "$python" "$repo_root/scripts/serve_many.py" "$@"

#!/usr/bin/env bash
# Standard serving metrics of a running server, by SGLang's own benchmark: new pictures, one turn each.
#
#   scripts/bench/serving.sh --num-prompts 200 --request-rate 4
#   ROTATEK_URL=http://gpu-host:30000 scripts/bench/serving.sh --image-resolution 1344x1344 --output-file OUT/serving.jsonl
#
# ROTATEK_URL is the server (default http://127.0.0.1:30000). Flags are those of sglang.benchmark.serving and go
# before the ones here; it reads the tokenizer where the server's --model-path is, unless --model names another.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

require_venv
has_nvidia_driver || export_cpu_environment
url=${ROTATEK_URL:-http://127.0.0.1:30000}
exec "$python" -m sglang.benchmark.serving --backend sglang-oai-chat --base-url "$url" --dataset-name image \
  --image-count 1 --image-resolution 672x672 --random-input-len 40 --random-output-len 128 --num-prompts 64 \
  --cache-report "$@"

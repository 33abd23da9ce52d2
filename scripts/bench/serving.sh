#!/usr/bin/env bash
# Standard serving metrics of a running server, by SGLang's own benchmark: pictures of noise, one turn each.
#
#   scripts/bench/serving.sh --num-prompts 200 --request-rate 4
#   ROTATEK_URL=http://gpu-host:30000 scripts/bench/serving.sh --image-resolution 1344x1344 --output-file OUT/serving.jsonl
#
# ROTATEK_URL is the server (default http://127.0.0.1:30000). Flags are those of sglang.benchmark.serving and override
# the ones here. The same --seed makes the same requests, which a second run finds cached: add --flush-cache, or
# another seed. Tokenizer and image processor are read where the server's --model-path is, also from here; name
# others by --tokenizer and --model. Records are appended to serving.jsonl here, or to --output-file.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

require_venv
has_nvidia_driver || export_cpu_environment
url=${ROTATEK_URL:-http://127.0.0.1:30000}
exec "$python" -m sglang.benchmark.serving --backend sglang-oai-chat --base-url "$url" --dataset-name image \
  --image-count 1 --image-resolution 672x672 --random-input-len 40 --random-output-len 128 --random-range-ratio 1 \
  --num-prompts 64 --cache-report --output-file serving.jsonl "$@"

#!/usr/bin/env bash
# Start an SGLang server:  scripts/serve.sh MODEL [sglang flags...]
#
#   scripts/serve.sh Qwen/Qwen2.5-VL-7B-Instruct --enable-rotatek
#
# Adds --enable-cache-report, so that usage shows cached tokens. On a machine without an NVIDIA driver
# it also adds what SGLang's CPU engine needs, with a core for each rank of --tp or --dp-size, and a pool of
# 16384 tokens unless you give a size.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[[ $# -ge 1 && $1 != -* ]] || fail "usage: scripts/serve.sh MODEL [sglang flags...]"
model=$1
shift
[[ $model != [./]* || -e $model ]] || fail "no model at $model; give the folder of a checkpoint, or a name on the Hub"
require_venv

user_gave() {
  local flag=$1 argument
  shift
  for argument in "$@"; do
    [[ $argument == "$flag" || $argument == "$flag="* ]] && return 0
  done
  return 1
}

flags=(--enable-cache-report)
if ! has_nvidia_driver; then
  export_cpu_environment
  user_gave --device "$@" || flags+=(--device cpu)
  user_gave --max-total-tokens "$@" || flags+=(--max-total-tokens 16384)
  for flag in --tp --tp-size --tensor-parallel-size --dp --dp-size --data-parallel-size; do
    if user_gave "$flag" "$@"; then
      cores=$("$python" -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep="|")')
      # Without NCCL, SGLang takes Gloo.
      export SGLANG_CPU_OMP_THREADS_BIND=${SGLANG_CPU_OMP_THREADS_BIND:-$cores} SGLANG_NCCL_SO_PATH=none
    fi
  done
fi
if [[ -d $model ]]; then
  export HF_HUB_OFFLINE=1
fi
exec "$python" -m sglang.launch_server --model-path "$model" "${flags[@]}" "$@"

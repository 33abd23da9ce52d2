# Sourced by the other scripts: where the repository and its Python are, and what a machine without an
# NVIDIA driver needs. Sets `repo_root`, `venv` and `python`; defines functions; changes nothing else.
# shellcheck shell=bash

repo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# ROTATEK_VENV names an existing environment to use instead of .venv.
venv=${ROTATEK_VENV:-$repo_root/.venv}
# ROTATEK_PYTHON names the interpreter itself, for serve.sh where an environment has no bin/python.
python=${ROTATEK_PYTHON:-$venv/bin/python}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

has_nvidia_driver() {
  if command -v nvidia-smi >/dev/null 2>&1; then
    [[ "$(nvidia-smi -L 2>/dev/null || true)" == *GPU* ]]
  else
    # Some images carry a libcuda.so.1 without a device behind it, so both must be there.
    [[ -e /dev/nvidiactl && "$(ldconfig -p 2>/dev/null || true)" == *libcuda.so.1* ]]
  fi
}

# Let SGLang run on the CPU: its CPU engine, no compilation for the first request, one OpenMP thread
# (more of them spin against SGLang's busy loops), a stand-in for the CUDA-only sgl_kernel wheel, and time for
# the workers of --tokenizer-worker-num to import, else they are killed and started again for ever.
export_cpu_environment() {
  export SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT=${SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT:-120}
  export PYTHONPATH=$repo_root/scripts/cpu_stand_in${PYTHONPATH:+:$PYTHONPATH}
}

require_venv() {
  [[ -x $python ]] || fail "no Python environment at $venv; run scripts/setup.sh first, or set ROTATEK_VENV"
}

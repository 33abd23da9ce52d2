#!/usr/bin/env bash
# Ask a running server the questions of lmms-eval:  scripts/eval/lmms.sh TASKS [lmms-eval flags...]
#
#   scripts/eval/lmms.sh reader_questions --limit 30
#   ROTATEK_URL=http://gpu-host:30000 scripts/eval/lmms.sh chartqa,docvqa_val --output_path results
#
# ROTATEK_URL is the server (default http://127.0.0.1:30000), ROTATEK_LMMS_VENV an environment with
# lmms-eval (default .venv-lmms). Relative paths start at the repository. README.md says more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

[[ $# -ge 1 && $1 != -* ]] || fail "usage: scripts/eval/lmms.sh TASKS [lmms-eval flags...]"
tasks=$1
shift
url=${ROTATEK_URL:-http://127.0.0.1:30000}
lmms_venv=${ROTATEK_LMMS_VENV:-$repo_root/.venv-lmms}
lmms_python=$lmms_venv/bin/python
"$lmms_python" -c 'import lmms_eval' >/dev/null 2>&1 ||
  fail "no lmms-eval at $lmms_venv; make it: python3.11 -m venv $lmms_venv &&" \
    "$lmms_venv/bin/pip install lmms-eval==0.7.3 'filelock<4', or set ROTATEK_LMMS_VENV"

# The OpenAI client wants a key, also for a server that has none.
export OPENAI_API_KEY=${OPENAI_API_KEY:-none}
model=$("$lmms_python" - "$url/v1" 2>/dev/null <<'END'
import sys

import openai

print(openai.OpenAI(base_url=sys.argv[1]).models.list().data[0].id)
END
) || fail "$url/v1/models lists no model; start a server with scripts/serve.sh, set ROTATEK_URL," \
  "or OPENAI_API_KEY if it has a key"

cd "$repo_root"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Not prefix_aware_queue: it orders by text, and parts questions about one picture, which are neighbours.
"$lmms_python" -m lmms_eval --model openai \
  --model_args "base_url=$url/v1,model_version=$model,prefix_aware_queue=False" \
  --include_path scripts/eval/lmms --tasks "$tasks" "$@" 2>&1 | tee "$log"
# lmms-eval exits with 0 after errors, and scores what was never answered.
if grep -qE 'Error during evaluation|attempts failed' "$log"; then
  fail "lmms-eval had errors, see above; a score that it printed counts them as wrong answers"
fi

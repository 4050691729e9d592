#!/usr/bin/env bash
# Measures one retrofit step of a random Qwen3-8B at 32K tokens on this machine's GPU: time, memory beside the plan, then the same step with
# FlexAttention and a loss over whole logits. A process for each; rows are out as they come, and the table also after an interrupt.
#   scripts/bench_retrofit.sh [BUDGET] [arguments of dms bench retrofit]   BUDGET: seconds for all of it (300); such as --layers 12 or --quick
# Needs torch, triton, transformers, rich and PyYAML, nothing installed of ours. Results go to $OUT (bench-results); $PYTHON runs it.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="${OUT:-$root/bench-results}"
cd -- "$root"

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    if [[ -x .venv/bin/python ]]; then python="$root/.venv/bin/python"; else python=python3; fi
fi

export PYTHONPATH="$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m bench.retrofit "$out" "$@"

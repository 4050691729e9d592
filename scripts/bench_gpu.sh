#!/usr/bin/env bash
# Measures the kernels on this machine's GPU: parity of a few cases, our times, those of others, then the tests' parity. A process for each
# operation, so that a crash or a hang costs one; rows are out as they come, and the table also after an interrupt.
#   scripts/bench_gpu.sh [BUDGET] [arguments of python -m bench]      BUDGET: seconds for all of it (480); such as --quick, or --only decode
# Needs torch and triton alone, and pytest for the tests' parity. Results go to $OUT (bench-results); $PYTHON runs them.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="${OUT:-$root/bench-results}"
cd -- "$root"

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH="$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m bench --out "$out/rows.jsonl" "$@"

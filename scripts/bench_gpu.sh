#!/usr/bin/env bash
# Measures the kernels on this machine's GPU, in under 8 minutes: parity with float64 first, then times against competitors.
#   scripts/bench_gpu.sh [arguments of python -m bench]      such as --quick, or --only decode,append
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

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    printf 'bench_gpu: no GPU here, and there is nothing to measure without one\n' >&2
    exit 2
fi
mkdir -p -- "$out"

status=0
if "$python" -c 'import pytest' 2>/dev/null; then
    timeout --signal=INT --kill-after=10 210 "$python" -m pytest tests/kernels/test_*_gpu.py -m gpu -q -p no:cacheprovider \
        >"$out/parity.txt" 2>&1 || status=$?
    if ((status == 124 || status == 137)); then printf 'bench_gpu: the tests did not end in 210 s\n' >>"$out/parity.txt"; fi
    ((status == 0)) || grep -E '^(FAILED|ERROR)' "$out/parity.txt" || true
    tail -n 1 -- "$out/parity.txt"
else
    printf 'bench_gpu: no pytest here; the benchmarks compare with float64 by themselves\n'
fi

"$python" -m bench --out "$out/rows.jsonl" --budget "$((440 - SECONDS))" "$@" >"$out/table.txt" 2>"$out/progress.txt" || status=$?
cat -- "$out/table.txt"
((status == 0)) || tail -n 5 -- "$out/progress.txt" >&2
exit "$status"

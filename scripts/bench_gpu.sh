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
    # Most of their time goes into compiling, which has the other cores.
    workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
    tests=(tests/dms_kernels/test_{paged_decode,append,sparse_prefill,gated_attention,distill_loss}_gpu.py)
    parity=0
    timeout --signal=INT --kill-after=10 210 "$python" -m pytest "${tests[@]}" -m gpu -q -p no:cacheprovider ${workers[@]+"${workers[@]}"} \
        >"$out/parity.txt" 2>&1 || parity=$?
    if ((parity == 124 || parity == 137)); then
        printf 'bench_gpu: the tests did not end in 210 s; what they had said is in %s\n' "$out/parity.txt"
    else
        status=$parity
    fi
    grep -E '^(FAILED|ERROR)' "$out/parity.txt" || true
    tail -n 1 -- "$out/parity.txt"
else
    printf 'bench_gpu: no pytest here; the benchmarks compare with float64 by themselves\n'
fi

benches=0
timeout --signal=INT --kill-after=5 "$((465 - SECONDS))" "$python" -m bench --out "$out/rows.jsonl" --budget "$((430 - SECONDS))" "$@" \
    >"$out/table.txt" 2>"$out/progress.txt" || benches=$?
cat -- "$out/table.txt"
if ((benches != 0)); then
    tail -n 5 -- "$out/progress.txt" >&2
    status=$benches
fi
exit "$status"

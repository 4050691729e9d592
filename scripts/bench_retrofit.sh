#!/usr/bin/env bash
# Measures one retrofit step of a random Qwen3-8B at 32K tokens on this machine's GPU, in under 8 minutes: time, memory beside the plan,
# and the same step with FlexAttention and a loss over whole logits.
#   scripts/bench_retrofit.sh [arguments of dms bench retrofit]      such as --length 8192, --layers 12 or --quick
# Needs torch, triton, transformers, rich and PyYAML, nothing installed of ours. Results go to $OUT (bench-results); $PYTHON runs it.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="${OUT:-$root/bench-results}"
cd -- "$root"

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    if [[ -x .venv/bin/python ]]; then python="$root/.venv/bin/python"; else python=python3; fi
fi
if [[ " $* " != *" --quick "* ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    printf 'bench_retrofit: no GPU here, and there is nothing to measure without one (--quick shows that it works)\n' >&2
    exit 2
fi
mkdir -p -- "$out"

# The packages as an installation would lay them out.
site="$(mktemp -d)"
trap 'rm -rf -- "$site"' EXIT
cp -r dms "$site/dms"
cp -r train/dms_train "$site/dms_train"
cp -r recipes "$site/dms/recipes"
cp -r kernels/dms_kernels "$site/dms_kernels"

status=0
(cd -- "$site" && PYTHONPATH="$site" timeout --signal=INT --kill-after=10 470 "$python" -m dms_train.bench_retrofit --json "$out/retrofit.json" "$@") \
    2>"$out/retrofit.err" | tee -- "$out/retrofit.txt" || status=$?
if ((status != 0)); then
    tail -n 20 -- "$out/retrofit.err" >&2
fi
exit "$status"

#!/usr/bin/env bash
# Runs the tests that need vLLM (tests/serving), in the environment of scripts/setup_serving.sh, which this makes; on the CPU and offline.
#   scripts/test_serving.sh [pytest arguments]     such as -m "not slow", the short form, or -k int8
# DMS_SERVE_FOLDERS=FOLDER:FOLDER names folders with trained gates, which are then served as well. A test that is skipped is a failure here.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"

scripts/setup_serving.sh
python="${DMS_SERVE_VENV:-$root/.venv-serve}/bin/python"
if ! "$python" -c 'import pytest' 2>/dev/null; then
    "$python" -m pip --disable-pip-version-check --no-input install --quiet "$(grep -E '^pytest==' constraints.txt)"
fi
"$python" -c 'import openai, vllm'

# Engines run in the process that asks for them; those of tests/serving/test_http.py choose otherwise.
export VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
report="$(mktemp)"
trap 'rm -f -- "$report"' EXIT
start=$SECONDS
"$python" -m pytest tests/serving -m "not gpu" -p no:cacheprovider "$@" -rs --junitxml "$report"
printf 'serving: tests %d s\n' "$((SECONDS - start))" >&2
"$python" -c '
import sys, xml.etree.ElementTree as tree
skipped = sum(int(suite.get("skipped", 0)) for suite in tree.parse(sys.argv[1]).iter("testsuite"))
sys.exit(f"serving: {skipped} tests were skipped" if skipped else 0)
' "$report"

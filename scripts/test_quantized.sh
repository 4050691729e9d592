#!/usr/bin/env bash
# Runs the tests that need bitsandbytes and torchao, which lie beside the environment and are no part of it: importing them takes a second.
#   scripts/test_quantized.sh [pytest arguments]     in place of the files of tests below
# A test that is skipped is a failure here.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"

scripts/setup_env.sh all dev
python="${DMS_VENV:-$root/.venv}/bin/python"
(($#)) || set -- tests/dms/io/test_quantization.py tests/dms_train/test_quantized_runs.py

# Under a name made from what is in it; a folder that was begun and not ended has another name.
pins="$(grep -E '^(bitsandbytes|torchao)==' constraints.txt)"
name="$({ printf '%s\n' "$pins" && "$python" --version; } | sha256sum | cut -c1-16)"
beside="${XDG_CACHE_HOME:-$HOME/.cache}/dms-ci/quantized-$name"
if [[ ! -d "$beside" ]]; then
    printf 'quantized: installing %s beside the environment\n' "${pins//$'\n'/ and }" >&2
    mkdir -p -- "$(dirname -- "$beside")"
    new="$(mktemp -d -- "$beside.XXXXXX")"
    trap 'rm -rf -- "$new"' EXIT
    # shellcheck disable=SC2086  # one requirement a word
    "$python" -m pip --disable-pip-version-check --no-input install --quiet --no-deps --target "$new" $pins
    mv -T -- "$new" "$beside" 2>/dev/null || [[ -d "$beside" ]]
fi
touch -- "$beside"

export PYTHONPATH="$beside${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import bitsandbytes, torchao'
report="$(mktemp)"
trap 'rm -rf -- "$report" ${new:+"$new"}' EXIT
scripts/test.sh "$@" -rs --junitxml "$report"
"$python" -c '
import sys, xml.etree.ElementTree as tree
skipped = sum(int(suite.get("skipped", 0)) for suite in tree.parse(sys.argv[1]).iter("testsuite"))
sys.exit(f"quantized: {skipped} tests were skipped" if skipped else 0)
' "$report"

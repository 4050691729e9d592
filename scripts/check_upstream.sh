#!/usr/bin/env bash
# Runs a small part of the tests on another release of transformers, put beside the environment for the time that it takes.
#   scripts/check_upstream.sh RELEASE [pytest arguments]     RELEASE: such as 5.17.0; oldest or supported (the ends of setup.cfg's range);
#                                                            newest (beyond it too); or main (its branch on GitHub)
# Does nothing where that release is the environment's own.
#   scripts/check_upstream.sh RELEASE --run FILE [arguments]  runs a Python file in place of the tests, on the environment's own release too
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"

range="$(sed -n 's/^ *transformers\([<>=].*\)/\1/p' setup.cfg)"
release="${1:?usage: scripts/check_upstream.sh RELEASE [pytest arguments]}"
shift
case "$release" in
    oldest) floor="${range#>=}" && wanted="transformers==${floor%%,*}" ;;
    supported) wanted="transformers$range" ;;
    newest) wanted="transformers" ;;
    main) wanted="transformers @ git+https://github.com/huggingface/transformers" ;;
    *) wanted="transformers==$release" ;;
esac
run=()
if [[ "${1:-}" == --run ]]; then
    shift
    run=("$@")
fi
(($#)) || set -- tests/dms/test_hf_compat.py tests/dms/test_layer_discovery.py tests/dms/test_layer_probe.py tests/dms/test_rotary.py tests/dms/test_modes.py tests/dms/test_wrappers.py tests/dms/cache/test_generate.py tests/dms/cache/test_families.py tests/dms/export/test_export.py

scripts/setup_env.sh all dev
python="${DMS_VENV:-$root/.venv}/bin/python"
beside="$(mktemp -d)"
trap 'rm -rf -- "$beside"' EXIT

say() { printf 'upstream: %s\n' "$*" >&2; }
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

own="$("$python" -c 'import importlib.metadata as m; print(m.version("transformers"))')"
pip install --quiet --dry-run --ignore-installed --no-deps --report "$beside/report.json" "$wanted"
version="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["install"][0]["metadata"]["version"])' "$beside/report.json")"
if [[ "$version" == "$own" ]] && ((${#run[@]})); then
    "$python" "${run[@]}"
    exit
elif [[ "$version" == "$own" ]]; then
    say "$release is $version, which the environment has: nothing else to try"
    exit 0
fi
say "trying transformers $version ($release); the environment has $own, setup.cfg says $range"
# It may ask for other releases of its own parts; everything else stays as it is.
grep -Ev '^(transformers|tokenizers|huggingface-hub|hf-xet)==' constraints.txt >"$beside/constraints.txt"
pip install --quiet --target "$beside/site" --constraint "$beside/constraints.txt" "$wanted"
export PYTHONPATH="$beside/site"
"$python" -c 'import sys, transformers as t; sys.exit(t.__version__ != sys.argv[1])' "$version"
if ((${#run[@]})); then
    "$python" "${run[@]}"
else
    scripts/test.sh "$@"
fi

#!/usr/bin/env bash
# Renews constraints.txt: the newest versions within setup.cfg's bounds that fit together, for Python 3.10 to 3.13 on Linux.
#   scripts/lock.sh [REQUIREMENT ...]      such as torch==2.14.1 or 'transformers<5.24'
# PyTorch stays at the version that the file has unless it is named. Run .ci/run afterwards: the file holds what has passed.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
lock="$root/constraints.txt"

work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT

printf '%s\n' "$@" >"$work/wanted.txt"
grep -Eq '^torch *[=<>~!]' "$work/wanted.txt" || grep '^torch==' "$lock" >>"$work/wanted.txt"

printf 'lock: resolving\n' >&2
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet uv
"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.10 --no-python-downloads --extra all --extra quantized --extra openai --extra docs --extra dev --no-annotate --no-header \
    --constraint "$work/wanted.txt" "$root/setup.cfg" >"$work/found.txt"
{
    printf '# Versions that passed the tests together, for Python 3.10 to 3.13; made by scripts/lock.sh. setup.cfg has the ranges.\n'
    printf '# On GPU machines scripts/setup_env.sh leaves torch, triton and setuptools out: PyTorch is the machine'\''s.\n'
    # What PyTorch's builds for CUDA bring is theirs to choose; Triton, which they fix, is tested without them too.
    grep -Ev '^(nvidia|cuda)-' "$work/found.txt"
} >"$work/constraints.txt"
diff -- "$lock" "$work/constraints.txt" || true
cat -- "$work/constraints.txt" >"$lock"
printf 'lock: %d packages in constraints.txt\n' "$(grep -Evc '^#' "$lock")" >&2

#!/usr/bin/env bash
# Sweeps tiny models of every family that transformers registers, and compares what comes out with the committed table (docs/families.md).
#   scripts/sweep_families.sh [--transformers RELEASE] [PATTERN] [--accept] [--fresh] [--processes 2]
# RELEASE: as of scripts/check_upstream.sh (5.17.0, oldest, supported, newest, main); the environment's own where it is left out.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [[ "${1:-}" == "--transformers" ]]; then
    release="${2:?usage: scripts/sweep_families.sh --transformers RELEASE [arguments]}"
    shift 2
    exec scripts/check_upstream.sh "$release" --run tests/families/sweep.py "$@"
fi
scripts/setup_env.sh all dev
exec "${DMS_VENV:-$root/.venv}/bin/python" tests/families/sweep.py "$@"

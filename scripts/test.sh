#!/usr/bin/env bash
# Sets up .venv and runs the tests, on the CPU and offline; arguments go to pytest.
#   scripts/test.sh [pytest arguments]      such as tests/dms -k gates, or -m slow, or -n 0
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"

start=$SECONDS
scripts/setup_env.sh all dev
set_up=$((SECONDS - start))

export PATH="${DMS_VENV:-$root/.venv}/bin:$PATH"
# Each worker holds torch and a few models, so more than eight cost memory rather than save time. Counted before
# OMP_NUM_THREADS is set, which nproc would take for the number of cores.
workers="$(env -u OMP_NUM_THREADS nproc)"
((workers <= 8)) || workers=8
# One thread for each worker, or they fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"

start=$SECONDS
status=0
python -m pytest -n "$workers" --dist worksteal "$@" || status=$?
printf 'test: set-up %d s, tests %d s\n' "$set_up" "$((SECONDS - start))" >&2
exit "$status"

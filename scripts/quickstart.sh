#!/usr/bin/env bash
# Sets up .venv and retrofits the embedded model; what comes out lies in runs/quickstart of the checkout.
#   scripts/quickstart.sh [key=value ...]      such as target_cr=8 output_dir=runs/cr8, or overwrite=true to run again
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"

start=$SECONDS
scripts/setup_env.sh train report track
set_up=$((SECONDS - start))

export PATH="${DMS_VENV:-$root/.venv}/bin:$PATH"
start=$SECONDS
status=0
dms retrofit tiny/retrofit output_dir=runs/quickstart "$@" || status=$?
printf 'quickstart: set-up %d s, job %d s\n' "$set_up" "$((SECONDS - start))" >&2
exit "$status"

#!/usr/bin/env bash
# Retrofits with every GPU of several machines: run it on each of them, with its own --node-rank, within ten minutes.
#   scripts/launch_multinode.sh RECIPE --nodes N --node-rank R --host H --port P [--gpus N] [--grace SECONDS] [--dry-run] [key=value ...]
# H is the machine of node rank 0 as the others reach it; P and P + 1 are free there. output_dir is on a file system that all share.
# Sets up .venv first; DMS_SKIP_SETUP=1 leaves that out. Exit code 75: stopped by a signal after saving; the same command goes on.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

usage() {
    sed -n 's/^#   /usage: /p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

words=0
expects_value=""
for argument in "$@"; do
    if [[ -n "$expects_value" ]]; then
        expects_value=""
        continue
    fi
    case "$argument" in
        --nodes | --node-rank | --host | --port | --gpus | --grace) expects_value="$argument" ;;
        --nodes=* | --node-rank=* | --host=* | --port=* | --gpus=* | --grace=* | --dry-run) ;;
        -*) usage ;;
        *) words=$((words + 1)) ;;
    esac
done
if [[ -n "$expects_value" ]] || ((words == 0)); then usage; fi

[[ "${DMS_SKIP_SETUP:-}" == 1 ]] || "$root/scripts/setup_env.sh" train report track deepspeed
export PATH="${DMS_VENV:-$root/.venv}/bin:$PATH"
exec python -m dms_train.launch "$@"

# shellcheck shell=bash
# Sourced by each stage: a folder that goes with it, and where environments lie between runs, under a name made from what goes into them.
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root" || exit

made_from() { cat constraints.txt setup.cfg pyproject.toml scripts/setup_env.sh && "${PYTHON:-python3}" --version; }
caches="${XDG_CACHE_HOME:-$HOME/.cache}/dms-ci"
cache="$caches/$(made_from | sha256sum | cut -c1-16)"
mkdir -p -- "$cache"
touch -- "$cache"

work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT

export CI=true HF_HUB_OFFLINE=1 WANDB_MODE=offline HF_MODULES_CACHE="$work/modules"
# Whatever is imported must come from the environment of the stage.
unset PYTHONPATH

# Sets up $cache/bare: the base dependencies, and then without this project and what it alone needs.
bare_environment() {
    DMS_VENV="$cache/bare" scripts/setup_env.sh
    "$cache/bare/bin/python" -m pip uninstall -qq --yes dms-retrofit pydantic pydantic-core
}

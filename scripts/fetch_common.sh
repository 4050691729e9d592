#!/usr/bin/env bash
# What the scripts that fetch share; they source it.

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf 'fetch: %s\n' "$*" >&2; }

fail() {
    printf 'fetch: error: %s\n' "$*" >&2
    exit "${2:-1}"
}

# find_python CODE LACKS MISSING: prints the first interpreter that runs CODE without an error, PYTHON's if that is set. Else it fails: LACKS
# says what is wrong with PYTHON's, MISSING that there is none.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python "$root/.venv/bin/python"; do
        if "$candidate" -c "$1" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        [[ "$candidate" != "${PYTHON:-}" ]] || fail "PYTHON='$PYTHON' $2"
    done
    fail "$3"
}

# One script at a time in a folder; the lock is on the folder itself and goes with the process.
lock_folder() {
    exec 9<"$1"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say "waiting for another one that fetches into $1"
        flock 9
    fi
}

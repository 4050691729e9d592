#!/usr/bin/env bash
# Makes sure that a Chromium is there for the tests of report pages; where it cannot be installed, says what to do.
#   scripts/setup_browser.sh     installs with apt-get, as root on Debian and Ubuntu; elsewhere it only looks
# CHROMIUM=/path/to/chromium names one that is not on PATH.
set -euo pipefail

fail() {
    printf 'browser: error: %s\n' "$*" >&2
    exit 1
}

# Prints the first browser that runs: on Ubuntu a name on PATH may be a stub that asks for a snap.
find_browser() {
    local candidate path
    for candidate in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
        [[ -n "$candidate" ]] || continue
        path="$(command -v "$candidate")" || continue
        if "$path" --version >/dev/null 2>&1; then
            printf '%s\n' "$path"
            return
        fi
    done
    return 1
}

if [[ -n "${CHROMIUM:-}" ]] && ! "$CHROMIUM" --version >/dev/null 2>&1; then
    fail "CHROMIUM='$CHROMIUM' does not run"
fi
if browser="$(find_browser)"; then
    printf 'browser: %s\n' "$browser" >&2
    exit 0
fi
command -v apt-get >/dev/null || fail "no Chromium found; install one with this system's package manager, or set CHROMIUM=/path/to/chromium"
[[ "$(id -u)" == 0 ]] || fail "no Chromium found; install it (sudo apt-get install chromium), or set CHROMIUM=/path/to/chromium"

printf 'browser: installing chromium\n' >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2 || printf 'browser: apt-get update failed; trying with the lists that are there\n' >&2
apt-get install -y -qq --no-install-recommends chromium >&2 || fail "apt-get could not install chromium; install it by hand, or set CHROMIUM=/path/to/chromium"
browser="$(find_browser)" || fail "chromium was installed and does not run; on Ubuntu it is a snap: install Chrome, and set CHROMIUM=/path/to/google-chrome"
printf 'browser: %s\n' "$browser" >&2

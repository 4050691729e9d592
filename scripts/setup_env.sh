#!/usr/bin/env bash
# Makes the checkout's .venv and installs the project into it, editable. Quick when there is nothing to do.
#   scripts/setup_env.sh [EXTRA ...]     extras of setup.cfg: train, evaluate, report, track, deepspeed, lora, gguf, quantized, openai, all, docs, dev
# Versions are those of constraints.txt, which passed the tests; DMS_VERSIONS=newest takes the newest within setup.cfg's bounds.
# PYTHON=/path/to/python chooses the interpreter (3.10 to 3.13); otherwise the first fitting one on PATH. DMS_VENV=/path/to/venv takes the
# place of .venv.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${DMS_VENV:-$root/.venv}"
python="$venv/bin/python"
stamp="$venv/.dms-setup"
versions="${DMS_VERSIONS:-locked}"
torch_pin="$(grep '^torch==' "$root/constraints.txt")"
torch_range="$(sed -n 's/^ *\(torch[<>=].*\)/\1/p' "$root/setup.cfg")"
cpu_index="https://download.pytorch.org/whl/cpu"

fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

say() { printf 'setup: %s\n' "$*" >&2; }

[[ "$versions" == locked || "$versions" == newest ]] || fail "DMS_VERSIONS is '$versions'; it may be locked or newest"
[[ "$venv" == /* ]] || fail "DMS_VENV is '$venv'; give an absolute path"
known="$(sed -n '/^\[options.extras_require\]/,/^\[tool/s/^\([a-z]*\) =$/\1/p' "$root/setup.cfg" | tr '\n' ' ')"
for extra in "$@"; do
    [[ " $known" == *" $extra "* ]] || fail "no extra '$extra'; there are: $known"
done
# `all` is taken apart, so that what it brings is known to be there.
everything="$(sed -n 's/^ *dms-retrofit\[\([a-z,]*\)\]$/\1/p' "$root/setup.cfg" | tr ',' ' ')"
read -ra wanted <<<"$(printf ' %s ' "$@" | sed "s/ all / $everything /g")"
set -- ${wanted[@]+"${wanted[@]}"}

has_gpu() { command -v nvidia-smi >/dev/null; }

# Name of this state: what is asked for, where, and by which Python. A checkout that moved is set up again, and the newest are a day's.
state() {
    {
        printf '%s %s\n' "$root" "$versions"
        if [[ "$versions" == newest ]]; then date +%F; else cat "$root/constraints.txt"; fi
        cat "$root/setup.cfg" "$root/pyproject.toml" "$venv/pyvenv.cfg"
    } | sha256sum | cut -d' ' -f1
}

# The stamp: the state on its first line, the extras installed on its second.
installed_extras() {
    [[ -f "$stamp" && -x "$python" && "$(head -n1 "$stamp")" == "$(state)" ]] || return 1
    sed -n 2p "$stamp"
}

is_done() {
    local have extra
    have="$(installed_extras)" || return 1
    for extra in "$@"; do
        [[ " $have " == *" $extra "* ]] || return 1
    done
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

fits() { [[ "$1" =~ ^3\.(10|11|12|13)$ ]]; }

# Prints the interpreter to use. A name on PATH may be a shim that runs nothing, so each candidate is run.
find_python() {
    local candidate version without_venv=""
    if [[ -n "${PYTHON:-}" ]]; then
        version="$(version_of "$PYTHON")" || fail "PYTHON='$PYTHON' does not run"
        fits "$version" || fail "PYTHON='$PYTHON' is Python $version; 3.10, 3.11, 3.12 or 3.13 is needed"
        "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "PYTHON='$PYTHON' cannot make virtual environments; install the package python$version-venv (sudo apt-get install python$version-venv)"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.13 python3.10 python; do
        version="$(version_of "$candidate")" || continue
        fits "$version" || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv="${without_venv:-$version}"
    done
    [[ -z "$without_venv" ]] ||
        fail "Python $without_venv cannot make virtual environments; install the package python3-venv (sudo apt-get install python3-venv)"
    fail "no Python 3.10 to 3.13 on PATH; install the packages python3 and python3-venv (sudo apt-get install python3 python3-venv), or set PYTHON=/path/to/python"
}

check_compiler() {
    local candidate
    for candidate in "${CXX:-}" c++ g++ clang++; do
        if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null; then return; fi
    done
    fail "no C++ compiler; install the package g++ (sudo apt-get install g++), or set CXX=/path/to/compiler"
}

make_venv() {
    local base
    if [[ -e "$venv" ]] && "$python" -m pip --version >/dev/null 2>&1; then
        local version
        version="$(version_of "$python")"
        fits "$version" || fail "$venv holds Python $version; remove it (rm -r $venv) and run again with Python 3.10 to 3.13"
        if [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$version" ]]; then
            fail "$venv holds Python $version, PYTHON='$PYTHON' is another version; remove it (rm -r $venv) and run again"
        fi
        return
    fi
    base="$(find_python)"
    say "making $venv with $("$base" --version)"
    # --clear: what is there was broken off half-way.
    "$base" -m venv --clear "$venv" ||
        fail "could not make $venv; if a package is named above, install it (sudo apt-get install python3-venv)"
}

pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

cpu_index_answers() {
    # The outer limit also covers a name server that keeps silent.
    timeout 5 "$python" - "$cpu_index/torch/" >/dev/null 2>&1 <<'PROBE'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=4).close()
PROBE
}

# The version without its build, such as 2.13.0 for 2.13.0+cpu.
installed_torch() { "$python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null; }

from_cpu_index() { cpu_index_answers && pip install --quiet --timeout 15 --retries 0 --index-url "$cpu_index" "$@"; }

# PyTorch first: on a machine without a GPU the ordinary package would bring gigabytes of CUDA libraries.
install_torch() {
    local have
    have="$(installed_torch)" || have=""
    if has_gpu; then
        if [[ -z "$have" ]]; then
            say "installing PyTorch for the GPU"
            pip install --quiet "$torch_range"
        fi
        return
    fi
    if [[ "$versions" == newest ]]; then
        say "no NVIDIA GPU: installing the newest CPU build of PyTorch"
        if from_cpu_index --upgrade "$torch_range"; then return; fi
    else
        [[ "torch==$have" != "$torch_pin" ]] || return 0
        say "no NVIDIA GPU: installing PyTorch's CPU build"
        if from_cpu_index "$torch_pin"; then return; fi
    fi
    # Elsewhere the newest would be a build for CUDA.
    say "PyTorch's CPU index does not answer: taking $torch_pin from where pip is configured to look"
    pip install --quiet "$torch_pin" || fail "no $torch_pin there; see pip config list"
}

# What pip may install, given PyTorch as it is by now.
constraints() {
    if [[ "$versions" == newest ]]; then
        printf 'torch==%s\n' "$(installed_torch)"
    elif has_gpu; then
        # PyTorch is what the machine has, and says which Triton and which setuptools go with it.
        grep -Ev '^(torch|triton|setuptools)==' "$root/constraints.txt"
    else
        cat "$root/constraints.txt"
    fi
}

install_project() {
    local extras upgrade=()
    extras="$(tr ' ' ',' <<<"$*")"
    say "installing the project${extras:+ with $extras}, $versions versions"
    [[ "$versions" == locked ]] || upgrade=(--upgrade --upgrade-strategy eager)
    constraints >"$venv/constraints.txt"
    # setuptools comes first so that the build needs no environment of its own.
    pip install --quiet --constraint "$venv/constraints.txt" "setuptools>=77"
    pip install --quiet --constraint "$venv/constraints.txt" ${upgrade[@]+"${upgrade[@]}"} --no-build-isolation --editable "$root${extras:+[$extras]}"
}

# ZeRO-Offload steps with DeepSpeed's own Adam, which is compiled at its first use; where that fails a run says so and takes torch's.
compile_adam() {
    case " $* " in *" deepspeed "* | *" all "*) ;; *) return 0 ;; esac
    say "compiling DeepSpeed's Adam for the CPU, about a minute, once"
    has_gpu || local -x DS_ACCELERATOR=cpu
    # The limit is for whatever else a compiler may wait for: no set-up may hang here.
    PATH="$venv/bin:$PATH" timeout --kill-after=10 900 \
        "$python" -c 'from dms_train.operators import build_operator; build_operator("CPUAdam", tell=print)' >"$venv/adam.log" 2>&1 ||
        say "that failed, and runs will take torch's Adam; see $venv/adam.log"
}

if is_done "$@"; then exit 0; fi

# One set-up at a time; the lock is on a file that is there anyway and goes with the process.
exec 9<"$root/setup.cfg"
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "waiting for another set-up of this checkout"
    flock 9
    if is_done "$@"; then exit 0; fi
fi

check_compiler
make_venv
# Extras asked for earlier stay.
read -ra extras <<<"$(tr ' ' '\n' <<<"$(sed -n 2p "$stamp" 2>/dev/null || true) $*" | sort -u | grep -xF "$(tr ' ' '\n' <<<"${known% }")" | tr '\n' ' ')"
install_torch
install_project ${extras[@]+"${extras[@]}"}
compile_adam ${extras[@]+"${extras[@]}"}
printf '%s\n%s\n' "$(state)" "${extras[*]-}" >"$stamp.$$"
mv -f "$stamp.$$" "$stamp"

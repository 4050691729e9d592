"""scripts/fetch_text.sh: text divided by document, once, with licences; broken off, it goes on. From packages of our own and an apt-get of our own."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "fetch_text.sh"
pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb, which reads packages, is not here")

TABLE = """one|one-doc-9 one-doc|MIT|usr/share/doc/one*/pages|*.txt *.txt.gz !index*
two|two-doc|GPL-2.0-only|usr/share/doc/two|*.html
gone|gone-doc|MIT|usr/share/doc/gone|*.txt
"""
SHARED = "A paragraph that stands in two documents of two packages, long enough that it is no heading and no common phrase, so one of them loses it."
SHARED += " And a sentence more, so that it counts as long."
# Stands in for apt-get and apt-cache: packages are files of a folder. STOP names one at which the download ends as by a signal.
APT = """#!/bin/sh
for name; do :; done
case "$*" in
    show*) ls "$PACKAGES/$name"_*.deb >/dev/null 2>&1 ;;
    *download*) echo "$name" >>"$PACKAGES/asked"; [ "$name" != "$STOP" ] || { echo half >"$name"_1_all.deb; exit 100; }; cp "$PACKAGES/$name"_*.deb . ;;
esac
"""


def prose(number: int) -> str:
    return "\n".join(f"Sentence {line} of text {number} says that {line * number} is a number.\n" for line in range(60))


def write_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    tree = folder / name
    files = {
        "DEBIAN/control": f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: us\nDescription: a stand-in\n".encode(),
        **files,
    }
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    for path in tree.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tree.chmod(0o755)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, folder / f"{name}_1_all.deb"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    pages = {f"usr/share/doc/one-doc/pages/page{n}.txt": f"{prose(n)}\n{SHARED}\n".encode() for n in range(1, 40)}
    write_package(
        folder,
        "one-doc",
        pages
        | {
            "usr/share/doc/one-doc/copyright": b"whose it is\n",
            "usr/share/doc/one-doc/pages/packed.txt.gz": gzip.compress(prose(50).encode()),
            "usr/share/doc/one-doc/pages/again.txt": prose(7).encode(),
            "usr/share/doc/one-doc/pages/index.txt": prose(51).encode(),
            "usr/share/doc/one-doc/pages/short.txt": b"Short.\n",
            "usr/share/doc/one-doc/pages/greek.txt": ("αβγδε ζηθ\n" * 300).encode(),
            "usr/share/doc/one-doc/other/page.txt": prose(52).encode(),
        },
    )
    body = "".join(f"<p>Sentence {n}\n of the <b>page</b> &amp; more of it.<div class='nav'><div>links</div></div>" for n in range(60))
    page = f"<html><head><title>no</title></head><body><nav>menu</nav><h1>Title</h1>{body}<ul><li><p>an item</p></ul><pre>if x:\n    y</pre><p>{SHARED}"
    write_package(folder, "two-doc", {"usr/share/doc/two/page.html": page.encode(), "usr/share/doc/two-doc/copyright": b"of two\n"})
    return folder


@pytest.fixture
def environment(made, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "apt-cache"):
        (programs / name).write_text(APT)
        (programs / name).chmod(0o755)
    (tmp_path / "table").write_text(TABLE)
    (made / "asked").write_text("")
    ours = {"PATH": f"{programs}:{os.environ['PATH']}", "PACKAGES": str(made), "DMS_TEXT_TABLE": str(tmp_path / "table")}
    return {**os.environ, **ours, "PYTHON": sys.executable, "STOP": ""}


def fetch(environment, folder: Path, **changes):
    return subprocess.run([SCRIPT, folder], env={**environment, **changes}, capture_output=True, text=True, timeout=60)


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


def test_text_by_document_once(environment, made, tmp_path):
    folder = tmp_path / "text"
    done = fetch(environment, folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "heldout.jsonl", "text.json", "licences"}
    assert (folder / "licences/one").read_text() == "whose it is\n" and (folder / "licences/two").read_text() == "of two\n"
    trained, held = records(folder, "train.jsonl"), records(folder, "heldout.jsonl")
    by_name = {record["source"]: record for record in trained + held}
    # All but the index, what is short, in other letters or in another folder; `again` lost nothing but its short paragraphs' copies.
    assert set(by_name) == {f"one/page{n}.txt" for n in range(1, 40)} | {"one/packed.txt.gz", "one/again.txt", "two/page.html"}
    assert len(trained) + len(held) == len(by_name) and 0 < len(held) < len(trained)
    assert {record["licence"] for record in trained + held} == {"MIT", "GPL-2.0-only"}
    assert by_name["one/packed.txt.gz"]["text"].startswith("Sentence 0 of text 50")
    assert sum(SHARED in record["text"] for record in by_name.values()) == 1
    page = by_name["two/page.html"]["text"]
    assert page.startswith("Title\n\nSentence 0 of the page & more of it.\n\nSentence 1 of") and page.endswith(
        "- an item\n\nif x:\n    y\n"
    )
    assert "links" not in page and "menu" not in page
    for said in ("one-doc_1_all; MIT", "gone: apt knows none of gone-doc; left out", f"held out {len(held)} ("):
        assert said in done.stderr
    # Again: no apt-get, the same files; another file is refused.
    before = (folder / "train.jsonl").read_bytes()
    again = fetch(environment, folder, PACKAGES=str(tmp_path / "nowhere"))
    assert again.returncode == 0 and "one-doc_1_all; MIT" in again.stderr and (folder / "train.jsonl").read_bytes() == before
    (folder / "train.jsonl").write_text("something of yours")
    refused = fetch(environment, folder)
    assert refused.returncode == 1 and "is not the file that was written" in refused.stderr
    # Another folder gets the same text.
    assert fetch(environment, tmp_path / "other").returncode == 0
    assert (tmp_path / "other/train.jsonl").read_bytes() == before


def test_broken_off_it_goes_on(environment, made, tmp_path):
    folder = tmp_path / "text"
    broken = fetch(environment, folder, STOP="two-doc")
    assert broken.returncode == 1 and "apt-get could not download two-doc" in broken.stderr
    assert {path.name for path in folder.iterdir()} == {".fetching"}
    done = fetch(environment, folder)
    assert done.returncode == 0, done.stderr
    assert (made / "asked").read_text().split() == ["one-doc", "two-doc", "two-doc"]


def test_packages_that_were_put_there_need_no_apt(environment, made, tmp_path):
    programs = tmp_path / "few"
    programs.mkdir()
    for name in ("bash", "env", "dirname", "mkdir", "cat", "mktemp", "rm", "mv", "find", "dpkg-deb", "tar", "flock"):
        if path := shutil.which(name):
            (programs / name).symlink_to(path)
    missing = fetch(environment, tmp_path / "text", PATH=str(programs))
    assert missing.returncode == 1 and "apt-get is missing" in missing.stderr and ".fetching/one/" in missing.stderr
    (programs / "dpkg-deb").unlink()
    missing = fetch(environment, tmp_path / "text", PATH=str(programs))
    assert missing.returncode == 1 and "dpkg-deb is missing" in missing.stderr
    (programs / "dpkg-deb").symlink_to(shutil.which("dpkg-deb"))
    for name in ("one", "two", "gone"):
        (tmp_path / "text/.fetching" / name).mkdir()
    shutil.copy(made / "one-doc_1_all.deb", tmp_path / "text/.fetching/one")
    done = fetch(environment, tmp_path / "text", PATH=str(programs))
    assert done.returncode == 0 and "no package of theirs was found: two, gone" in done.stderr, done.stderr


def test_what_is_refused(environment, tmp_path):
    done = subprocess.run([SCRIPT, "a", "b"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage: scripts/fetch_text.sh [FOLDER]" in done.stderr
    (tmp_path / "train.jsonl").write_text("something of yours")
    refused = fetch(environment, tmp_path)
    assert refused.returncode == 1 and "is not of this script" in refused.stderr
    (tmp_path / "table").write_text("nothing|gone-doc|MIT|usr/share/doc/gone|*.txt\n")
    nothing = fetch(environment, tmp_path / "text")
    assert nothing.returncode == 1 and "apt knows none of the packages" in nothing.stderr
    (tmp_path / "table").write_text("one|one-doc|MIT|usr/share/doc/one-doc|*.rst\n")
    wrong = fetch(environment, tmp_path / "text")
    assert wrong.returncode == 1 and "has no documents *.rst" in wrong.stderr


def test_every_row_of_the_table_is_whole():
    rows = [line.split("|") for line in SCRIPT.read_text().splitlines() if line.count("|") == 4 and "usr/share" in line]
    assert len({row[0] for row in rows}) == len(rows) >= 12
    for name, packages, licence, folder, documents in rows:
        assert name and packages and licence and folder.startswith("usr/share/") and documents[0] != "!"

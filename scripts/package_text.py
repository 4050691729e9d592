"""Text of Debian packages as JSON lines, for scripts/fetch_text.sh: the standard library and dpkg-deb are all that it needs.

convert TABLE PACKAGES OUT  writes OUT/train.jsonl, OUT/heldout.jsonl, OUT/text.json and OUT/licences/ from PACKAGES/NAME/*.deb
check FOLDER                compares a folder with its text.json, and says what is in it
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

# One document in so many is held out.
HELD_OUT_EVERY = 10
# What is shorter is mostly a list of links.
MIN_CHARS = 1_500
# A paragraph from this length on stands in one document alone, so that nothing of a document that is held out is trained on.
LONG_PARAGRAPH = 160
FILES = ("train.jsonl", "heldout.jsonl")


class Row(NamedTuple):
    """A line of the table."""

    name: str
    packages: str
    licence: str
    folder: str
    documents: str

    def path_below(self, path: str) -> str | None:
        """Of a file that is a document: its path below the folder; else None."""
        depth = self.folder.count("/") + 1
        parts = path.split("/")
        below = "/".join(parts[depth:])
        if not below or not fnmatchcase("/".join(parts[:depth]), self.folder):
            return None
        patterns = self.documents.split()
        taken = any(fnmatchcase(below, pattern) for pattern in patterns if pattern[0] != "!")
        return below if taken and not any(fnmatchcase(below, pattern[1:]) for pattern in patterns if pattern[0] == "!") else None


class PlainText(HTMLParser):
    """The running text of a page: blocks apart by empty lines, what is preformatted as it stands, and no navigation."""

    BLOCKS = frozenset(
        ["p", "div", "section", "article", "main", "ul", "ol", "dl", "table", "blockquote", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "hr"]
    )
    LINES = frozenset(["br", "li", "dt", "dd", "tr"])
    LEFT_OUT = frozenset(["head", "script", "style", "nav", "footer", "button", "noscript", "svg", "form"])
    NAVIGATION = re.compile(
        r"\b(nav|navheader|navfooter|navigation|docnav|sidebar|sphinxsidebar|related|headerlink|menu|menu-bar|footer|toc|breadcrumb)\b",
        re.I,
    )

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped = ""
        self.depth = self.preformatted = 0

    def handle_starttag(self, tag, attributes):
        if self.skipped:
            # Tags that are never closed, as <p> and <li> may be, are not counted: only those of the name that is left out.
            self.depth += tag == self.skipped
            return
        marks = " ".join(value or "" for name, value in attributes if name in ("class", "id", "role"))
        if tag in self.LEFT_OUT or (tag in ("div", "ul", "dl", "table", "p", "a") and self.NAVIGATION.search(marks)):
            self.skipped, self.depth = tag, 1
            return
        self.preformatted += tag == "pre"
        self.add_break(
            "\n\n" if tag in self.BLOCKS else "\n- " if tag == "li" else "\n" if tag in self.LINES else "  " if tag in ("td", "th") else ""
        )

    def handle_endtag(self, tag):
        if self.skipped:
            self.depth -= tag == self.skipped
            if not self.depth:
                self.skipped = ""
            return
        self.preformatted -= tag == "pre" and self.preformatted > 0
        self.add_break("\n\n" if tag in self.BLOCKS else "")

    def add_break(self, mark):
        if mark and not (mark == "\n\n" and self.parts and self.parts[-1] == mark):
            self.parts.append(mark)

    def handle_data(self, data):
        if self.skipped:
            return
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            # An item's paragraph goes on in the item's line.
            if data.strip() and len(self.parts) > 1 and self.parts[-1] == "\n\n" and self.parts[-2].endswith("- "):
                self.parts.pop()
            data = data.lstrip() if not self.parts or self.parts[-1].endswith(("\n", "- ")) else data
        if data:
            self.parts.append(data)

    @classmethod
    def of(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        parser.close()
        return "".join(parser.parts)


def text_of(path: str, content: bytes) -> str:
    """A document's text: lines without blanks at their ends, at most one empty line between two."""
    text = (gzip.decompress(content) if path.endswith(".gz") else content).decode("utf-8", "replace")
    if path.removesuffix(".gz").endswith((".html", ".htm")):
        text = PlainText.of(text)
    lines = "\n".join(line.rstrip() for line in text.replace("\u00a0", " ").splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def read_package(package: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a package, without unpacking it to disk."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member).read()
    if process.wait():
        sys.exit(f"package_text: dpkg-deb cannot read {package}; remove its folder, and fetch again")


def documents_of(row: Row, packages: list[Path], licence: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a row's documents, by name. licence: gets what the package says of copyrights."""
    found = {}
    for package in packages:
        for path, content in read_package(package):
            if re.fullmatch(r"usr/share/doc/[^/]+/copyright", path):
                licence.write_bytes(content)
            elif below := row.path_below(path):
                found[f"{row.name}/{below}"] = text_of(path, content)
    yield from sorted(found.items())


def without_repeats(text: str, seen: set[bytes]) -> str:
    """The text without long paragraphs that were seen; adds its own."""
    kept, own = [], set()
    for paragraph in text.split("\n\n"):
        plain = " ".join(paragraph.split())
        if len(plain) >= LONG_PARAGRAPH:
            digest = hashlib.sha256(plain.encode()).digest()
            if digest in seen:
                continue
            own.add(digest)
        kept.append(paragraph)
    seen |= own
    return "\n\n".join(kept).strip() + "\n"


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_EVERY == 0


def convert(table: Path, packages: Path, out: Path) -> None:
    (out / "licences").mkdir(parents=True)
    rows = [Row(*line.split("|")) for line in table.read_text().splitlines() if line.strip()]
    seen: set[bytes] = set()
    records: dict[str, list[tuple[bytes, str]]] = {file: [] for file in FILES}
    counts, left_out = [], []
    for row in rows:
        given = sorted((packages / row.name).glob("*.deb"))
        if not given:
            left_out.append(row.name)
            continue
        count = {"name": row.name, "packages": [package.stem for package in given], "licence": row.licence}
        count.update({f"{what} {file}": 0 for file in FILES for what in ("documents", "characters")})
        for name, whole in documents_of(row, given, out / "licences" / row.name):
            text = without_repeats(whole, seen)
            # The second: translations.
            if len(text) < MIN_CHARS or len(text.encode()) > 1.1 * len(text):
                continue
            file = FILES[is_held_out(name)]
            line = json.dumps({"text": text, "source": name, "licence": row.licence}, ensure_ascii=False)
            records[file].append((hashlib.sha256(name.encode()).digest(), line))
            count[f"documents {file}"] += 1
            count[f"characters {file}"] += len(text)
        if not any(count[f"documents {file}"] for file in FILES):
            sys.exit(f"package_text: {', '.join(count['packages'])} has no documents {row.documents} in {row.folder}; mend the table")
        counts.append(count)
    digests = {}
    for file, lines in records.items():
        # In the order of the names' digests, so that neighbours are of different packages.
        content = "".join(line + "\n" for _, line in sorted(lines)).encode()
        (out / file).write_bytes(content)
        digests[file] = hashlib.sha256(content).hexdigest()
    (out / "text.json").write_text(json.dumps({"sha256": digests, "sources": counts, "left_out": left_out}, indent=1) + "\n")


def check(folder: Path) -> None:
    known = json.loads((folder / "text.json").read_text())
    for file, digest in known["sha256"].items():
        path = folder / file
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            sys.exit(f"package_text: {path} is missing, or is not the file that was written (sha256 {digest})")
    total = dict.fromkeys([f"{what} {file}" for file in FILES for what in ("documents", "characters")], 0)
    for count in [*known["sources"], {"name": "all", "packages": [], "licence": "", **total}]:
        if count["packages"]:
            total.update({name: total[name] + count[name] for name in total})
        else:
            count = count | total
        held = f"{count['documents heldout.jsonl']} ({count['characters heldout.jsonl']:,})"
        trained = f"{count['documents train.jsonl']} ({count['characters train.jsonl']:,})"
        about = f"; {', '.join(count['packages'])}; {count['licence']}" if count["packages"] else ""
        print(f"fetch: {count['name']}: documents (characters) to train on {trained}, held out {held}{about}", file=sys.stderr)
    if known["left_out"]:
        print(f"fetch: left out, for no package of theirs was found: {', '.join(known['left_out'])}", file=sys.stderr)
    print(f"fetch: {folder}/train.jsonl, heldout.jsonl; licences in {folder}/licences/, counts in text.json", file=sys.stderr)


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"convert": convert, "check": check}[command](*map(Path, paths))

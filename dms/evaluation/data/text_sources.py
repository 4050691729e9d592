"""Text that users name: files, or folders of them."""

import functools
import hashlib
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

SUFFIXES = (".txt", ".md", ".jsonl")
# A paragraph on one line is divided after its sentences; what has none, between words, or wherever it must be.
_LONGEST_LINE = 240
_SENTENCE = re.compile(r".+?(?:[.!?…][\"'”’)\]]*\s+|[。！？]+|$)", re.S)
_STRETCH = re.compile(rf"\S.{{0,{_LONGEST_LINE - 2}}}(?=\s|$)\s*|.{{1,{_LONGEST_LINE}}}", re.S)


class GivenText:
    """Texts of files: one a file, or one a row of JSON lines.

    paths: text files in UTF-8, .jsonl files, and folders, whose .txt, .md and .jsonl files are read. field: where a row's text
    stands in .jsonl. `num_chars`: characters of all lines.

    Raises:
        ValueError: a path that is not there, nothing to read, no UTF-8, or rows without text under `field`.
    """

    def __init__(self, paths: Sequence[str | Path], field: str = "text"):
        files = [file for path in paths for file in _files(Path(path).expanduser())]
        self._texts = [text for file in files for text in _texts(file, field) if text.strip()]
        if not self._texts:
            raise ValueError(f"there is no text in {', '.join(map(str, paths)) or 'an empty list of paths'}; name files with text")
        self._lines = [split_lines(text) for text in self._texts]
        self.num_chars = sum(len(line) for lines in self._lines for line in lines)

    def lines(self, rng: Random, num_chars: int) -> list[str]:
        """Consecutive lines from a random place, then other texts' lines in random order, none twice: all there are, if these are fewer
        than `num_chars` characters."""
        return self.once(rng).lines(rng, num_chars)

    def once(self, rng: Random) -> "OnceText":
        """This text from a random place on, whose lines are read once."""
        (first,) = rng.choices(range(len(self._lines)), weights=[len(text) for text in self._texts])
        start = rng.randrange(len(self._lines[first]))
        others = rng.sample([number for number in range(len(self._lines)) if number != first], len(self._lines) - 1)
        parts = (self._lines[first][start:], *(self._lines[number] for number in others), self._lines[first][:start])
        return OnceText(self, itertools.chain.from_iterable(parts))

    def texts(self, rng: Random) -> Iterator[str]:
        """Each text once, in random order."""
        yield from rng.sample(self._texts, len(self._texts))


class OnceText:
    """A text whose every line is given once, in order, so that documents made of it one after the other share none."""

    def __init__(self, whole: GivenText, lines: Iterator[str]):
        self._whole, self._rest = whole, lines
        self._asked = self._given = self._num_stretches = 0

    def lines(self, rng: Random, num_chars: int) -> list[str]:
        """The next lines: about `num_chars` characters, so that all that are asked for add up; of the first all there are.

        Raises:
            ValueError: fewer are left.
        """
        if self._num_stretches and self._asked + num_chars > self._whole.num_chars:
            raise ValueError(
                f"the text has {self._whole.num_chars} characters, and {self._num_stretches} stretches that share no line have been "
                f"read, so that fewer than {num_chars} are left; take fewer documents, a shorter length, or more text"
            )
        self._num_stretches += 1
        self._asked += num_chars
        taken: list[str] = []
        while self._given < self._asked and (line := next(self._rest, None)) is not None:
            taken.append(line)
            self._given += len(line)
        return taken

    def texts(self, rng: Random) -> Iterator[str]:
        yield from self._whole.texts(rng)


def split_lines(text: str) -> list[str]:
    """A text's lines, each with its line end; of long ones each sentence is a line, of long sentences each stretch."""
    return [
        stretch.rstrip() + "\n"
        for line in text.splitlines()
        for sentence in ([line] if len(line) <= _LONGEST_LINE else _SENTENCE.findall(line))
        for stretch in ([sentence] if len(sentence) <= _LONGEST_LINE else _STRETCH.findall(sentence))
    ]


def hash_files(path: str | Path) -> str:
    """Of the contents of a file with text, or of all such files of a folder. Raises ValueError where there are none."""
    digest = hashlib.sha256()
    for file in _files(Path(path).expanduser()):
        with file.open("rb") as content:
            while part := content.read(2**20):
                digest.update(part)
        # Where a file ends is part of it.
        digest.update(f"{file.stat().st_size};".encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"the folder {path} holds no {', '.join(SUFFIXES)} file; name files, or a folder with such")
        return files
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    return [path]


def _texts(file: Path, field: str) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); convert it") from error
    if file.suffix.lower() != ".jsonl":
        yield content
        return
    # Not splitlines: JSON strings may hold other line ends than "\n".
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            has = f"it has {', '.join(row)}" if isinstance(row, dict) else f"it is {line[:40]}"
            raise ValueError(f"{file}, line {number} has no text under {field!r}; {has}; name the field that holds the text")
        yield row[field]


# Tests are not installed everywhere, tables are not prose, and site-packages is not the standard library.
_SKIPPED_PARTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
_MIN_BYTES = 2_000
_HELD_OUT_EVERY = 8


@functools.cache
def stdlib_files(held_out: bool) -> tuple[Path, ...]:
    """Source files of one split; the split hashes each file's relative path, so that it is the same on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, names, _ in os.walk(root):
        # Not entered, or the time would be that of whatever is installed beside the library.
        names[:] = set(names) - _SKIPPED_PARTS
        files += [path for path in Path(folder).glob("*.py") if path.stat().st_size >= _MIN_BYTES]
    files = sorted(path for path in files if (zlib.crc32(path.relative_to(root).as_posix().encode()) % _HELD_OUT_EVERY == 0) == held_out)
    if not files:
        raise RuntimeError(
            f"the built-in text needs the standard library's .py files under {root}, and there are none; "
            "install the full Python (Debian/Ubuntu: apt-get install libpython3-stdlib) or name other data"
        )
    return tuple(files)


@functools.lru_cache(maxsize=256)
def _lines_of(path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return tuple(line.rstrip() + "\n" for line in text.splitlines())


class StdlibText:
    """Runs of lines from the standard library. `held_out` chooses the files kept for evaluation."""

    def __init__(self, held_out: bool):
        self.files = stdlib_files(held_out)
        self._cumulative = []
        total = 0
        for path in self.files:
            total += path.stat().st_size
            self._cumulative.append(total)

    def lines(self, rng: Random, num_chars: int) -> list[str]:
        """Consecutive lines from a random place, at least `num_chars` characters; at a file's end it goes on in another."""
        taken: list[str] = []
        chars = 0
        while chars < num_chars:
            (path,) = rng.choices(self.files, cum_weights=self._cumulative)
            lines = _lines_of(path)
            for line in lines[rng.randrange(len(lines)) :]:
                taken.append(line)
                chars += len(line)
                if chars >= num_chars:
                    break
        return taken

    def texts(self, rng: Random) -> Iterator[str]:
        """Each file once, in random order."""
        for path in rng.sample(self.files, len(self.files)):
            yield "".join(_lines_of(path))

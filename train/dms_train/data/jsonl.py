"""JSON Lines, plain or compressed: one JSON object per line."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dms_train.data.compressed import SUFFIXES, UNREADABLE, open_file
from dms_train.data.settings import Origin
from dms_train.data.shards import BLOCK_BYTES, BLOCK_RECORDS, BadShard, Record, Shard, find_files, fingerprint_of, first_line

_LIST_TO_LINES = "import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding='utf-8-sig'))]"


class JsonLines:
    """Each file is a shard."""

    def __init__(self, origin: Origin):
        self.files = find_files(origin)
        self.num_shards = len(self.files)

    def open(self, shard: int) -> Shard:
        file = self.files[shard]
        try:
            with open_file(file) as opened:
                beginning = opened.read(64)
        except UNREADABLE as error:
            raise BadShard(f"data file {file} cannot be read: {first_line(error)}") from None
        if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise BadShard(f"data file {file} is text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(str(file))} > NEW.jsonl")
        if beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise BadShard(
                f"data file {file} begins with a JSON list, and what is read is JSON Lines: an object a line. "
                f'Convert it: python -c "{_LIST_TO_LINES}" {shlex.quote(str(file))} > NEW.jsonl'
            )
        return _Compressed(file) if file.suffix.lower() in SUFFIXES else _Plain(file)

    def fingerprint(self) -> list:
        return fingerprint_of(self.files)


class _Plain:
    """The file is read once, without parsing, to find where its blocks begin."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.starts = self._find_blocks()
        except OSError as error:
            raise BadShard(f"data file {file} cannot be read: {error}") from None
        self.num_blocks = len(self.starts) - 1

    def _find_blocks(self) -> list[tuple[int, int]]:
        """(offset, line number) of each block's beginning, and of the file's end."""
        starts, at, line_number = [(0, 1)], 0, 1
        with self.file.open("rb") as opened:
            for line in opened:
                start, first = starts[-1]
                full = line_number - first >= BLOCK_RECORDS or at + len(line) - start > BLOCK_BYTES
                if full and line_number > first:
                    starts.append((at, line_number))
                at += len(line)
                line_number += 1
        return [*starts, (at, line_number)] if at else starts

    def records(self, block: int) -> list[Record]:
        if block >= self.num_blocks:
            return []
        (start, first), (end, _) = self.starts[block : block + 2]
        try:
            with self.file.open("rb") as opened:
                opened.seek(start)
                lines = opened.read(end - start).split(b"\n")
        except OSError as error:
            raise BadShard(f"data file {self.file} cannot be read: {error}") from None
        return _records(self.file, enumerate(lines, first))


class _Compressed:
    """A file that can only be read from its beginning: its blocks come in order. Of a damaged one, the lines before the damage count."""

    num_blocks: int | None = None

    def __init__(self, file: Path):
        self.file = file
        self._rewind()

    def _rewind(self) -> None:
        self._opened, self._line_number, self._problem = open_file(self.file), 0, ""
        # The number of the block that `_lines` holds.
        self._block = -1
        self._lines: list[tuple[int, bytes]] = []

    def records(self, block: int) -> list[Record]:
        try:
            if block < self._block:
                self._rewind()
            while self._block < block:
                self._lines = self._next_lines()
                self._block += 1
        except UNREADABLE as error:
            raise BadShard(f"data file {self.file} cannot be read: {first_line(error)}") from None
        return _records(self.file, self._lines)

    def _next_lines(self) -> list[tuple[int, bytes]]:
        """The next block's lines that are not empty, with their numbers; at the end none."""
        if self._problem:
            raise BadShard(self._problem)
        lines: list[tuple[int, bytes]] = []
        size = 0
        try:
            while len(lines) < BLOCK_RECORDS and size < BLOCK_BYTES and (line := self._opened.readline()):
                self._line_number += 1
                if line.strip():
                    lines.append((self._line_number, line))
                    size += len(line)
        except UNREADABLE as error:
            self._problem = f"data file {self.file} cannot be read from line {self._line_number + 1} on: {first_line(error)}"
            if not lines:
                raise BadShard(self._problem) from None
        return lines


def _records(file: Path, numbered: Iterable[tuple[int, bytes]]) -> list[Record]:
    return [_parse(f"{file}:{number}", line) for number, line in numbered if line.strip()]


def _parse(where: str, line: bytes) -> Record:
    try:
        # A byte-order mark may begin a file, or a line within files that were joined.
        values: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(where, None, f"cannot be read: {error}")
    except (ValueError, RecursionError) as error:
        return Record(where, None, f"is not JSON: {error}")
    if not isinstance(values, dict):
        return Record(where, None, f"is not an object of keys and values but a {type(values).__name__}")
    return Record(where, values)

"""Rows by position: every source is shards, a shard is blocks of rows, and any block can be read without those before it.

A block holds so few rows that reading one again, to find a document that a checkpoint names, costs next to nothing.
"""

import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dms.train.data.settings import Origin

BLOCK_ROWS = 256
BLOCK_BYTES = 1 << 20
_BLOCK_FILES = 16
# Of so many files a sample of the content goes into the fingerprint; of all their names and sizes do.
_SAMPLED_FILES = 16


class Row(NamedTuple):
    """where: what messages call it. values: by column; None where it cannot be read, for the reason `problem`."""

    where: str
    values: dict[str, Any] | None
    problem: str = ""


class BadShard(Exception):
    """A shard, or the rest of one, that cannot be read; the text names it."""


class Shard(Protocol):
    num_blocks: int | None
    """None where only reading to the end tells."""

    def rows(self, block: int) -> list[Row]:
        """The rows of a block; of one behind the last, none. Raises BadShard."""


class Shards(Protocol):
    num_shards: int

    def open(self, shard: int) -> Shard:
        """Raises BadShard."""

    def fingerprint(self) -> list:
        """What changes, in JSON, when the data does."""


def find_files(origin: Origin) -> list[Path]:
    """The files of a local source, sorted. Raises ValueError where there are none."""
    path = Path(origin.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob(f"*{origin.suffix}") if file.is_file())
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not files:
        raise ValueError(f"data.path {origin.path!r} matches no {origin.suffix} file; give a file, a folder of such files, or a glob")
    return files


def _fingerprint(files: Sequence[Path]) -> list:
    every = max(1, len(files) // _SAMPLED_FILES)
    return [[file.name, file.stat().st_size, _sample(file) if number % every == 0 else None] for number, file in enumerate(files)]


def _sample(file: Path) -> str:
    """Hash of a file's beginning, middle and end."""
    digest, size = hashlib.sha256(), file.stat().st_size
    try:
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - 65536)):
                opened.seek(start)
                digest.update(opened.read(65536))
    except OSError as error:
        # It is refused or skipped where it is read.
        return type(error).__name__
    return digest.hexdigest()[:16]


class TextFiles:
    """Each file is a row."""

    def __init__(self, origin: Origin):
        self.files, self.num_shards = find_files(origin), 1
        self.num_blocks = -(-len(self.files) // _BLOCK_FILES)

    def open(self, shard: int) -> Shard:
        return self

    def fingerprint(self) -> list:
        return _fingerprint(self.files)

    def rows(self, block: int) -> list[Row]:
        return [self._read(file) for file in self.files[block * _BLOCK_FILES : (block + 1) * _BLOCK_FILES]]

    def _read(self, file: Path) -> Row:
        try:
            return Row(f"data file {file}", {"text": file.read_text(encoding="utf-8")})
        except (OSError, UnicodeDecodeError) as error:
            return Row(f"data file {file}", None, f"cannot be read: {error}")


class JsonLines:
    """Each file is a shard; where its blocks begin is found by reading it once, without parsing."""

    def __init__(self, origin: Origin):
        self.files = find_files(origin)
        self.num_shards = len(self.files)

    def open(self, shard: int) -> Shard:
        return _JsonLinesFile(self.files[shard])

    def fingerprint(self) -> list:
        return _fingerprint(self.files)


class _JsonLinesFile:
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
                full = line_number - first >= BLOCK_ROWS or at + len(line) - start > BLOCK_BYTES
                if full and line_number > first:
                    starts.append((at, line_number))
                at += len(line)
                line_number += 1
        return [*starts, (at, line_number)] if at else starts

    def rows(self, block: int) -> list[Row]:
        if block >= self.num_blocks:
            return []
        (start, first), (end, _) = self.starts[block : block + 2]
        try:
            with self.file.open("rb") as opened:
                opened.seek(start)
                lines = opened.read(end - start).split(b"\n")
        except OSError as error:
            raise BadShard(f"data file {self.file} cannot be read: {error}") from None
        return [self._parse(number, line) for number, line in enumerate(lines, first) if line.strip()]

    def _parse(self, number: int, line: bytes) -> Row:
        where = f"{self.file}:{number}"
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Row(where, None, f"cannot be read: {error}")
        except (ValueError, RecursionError) as error:
            return Row(where, None, f"is not JSON: {error}")
        if not isinstance(values, dict):
            return Row(where, None, f"is no object of keys and values but a {type(values).__name__}")
        return Row(where, values)


class Parquet:
    """Each row group is a shard: the smallest part that can be read alone. skips: a file that is none is a shard that cannot be read,
    and no error yet."""

    def __init__(self, origin: Origin, columns: list[str], skips: bool):
        self.files, self.columns, self.skips = find_files(origin), columns, skips
        self.shards: list[tuple[Path, int, str]] = []
        for file in self.files:
            self.shards += self._groups(file)
        self.num_shards = len(self.shards)

    def _groups(self, file: Path) -> list[tuple[Path, int, str]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                names, count = opened.schema_arrow.names, opened.num_row_groups
        except (OSError, pyarrow.ArrowException) as error:
            problem = f"data file {file} cannot be read: {_first_line(error)}"
            if not self.skips:
                raise ValueError(f"{problem} (data.bad_shards: skip leaves such out and counts them)") from None
            return [(file, 0, problem)]
        for column in self.columns:
            if column not in names:
                raise ValueError(f"data file {file} has no column {column!r}; it has {', '.join(names)}")
        return [(file, group, "") for group in range(count)]

    def open(self, shard: int) -> Shard:
        import pyarrow
        import pyarrow.parquet

        file, group, problem = self.shards[shard]
        if problem:
            raise BadShard(problem)
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                table = opened.read_row_group(group, columns=self.columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise BadShard(f"data file {file}, row group {group}, cannot be read: {_first_line(error)}") from None
        return ArrowTable(table, f"{file}, row group {group}")

    def fingerprint(self) -> list:
        return _fingerprint(self.files)


class ArrowTable:
    """A pyarrow Table as a shard."""

    def __init__(self, table: Any, name: str):
        self.table, self.name = table, name
        self.num_blocks = -(-table.num_rows // BLOCK_ROWS)

    def rows(self, block: int) -> list[Row]:
        start = block * BLOCK_ROWS
        values = self.table.slice(start, BLOCK_ROWS).to_pylist()
        return [Row(f"{self.name}, row {start + number}", row) for number, row in enumerate(values)]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"

"""Records by position: every source is shards, a shard is blocks of records, and any block can be read without those before it.

A block holds so few records that reading one again, to find a document that a checkpoint names, costs next to nothing.
"""

import glob
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dms_train.data.compressed import SUFFIXES, UNREADABLE, check_modules, open_file
from dms_train.data.settings import LOCAL, Origin, path_of, suffixes_of

BLOCK_RECORDS = 256
BLOCK_BYTES = 1 << 20
_NO_TEXT: tuple[type[Exception], ...] = (*UNREADABLE, UnicodeDecodeError)
_BLOCK_FILES = 16
# Of so many files a sample of the content goes into the fingerprint; of all their names and sizes do.
_SAMPLED_FILES = 16
# Of the files that are no data, so many kinds are named.
_NAMED_KINDS = 5


class Record(NamedTuple):
    """One line of a data file, one row of a dataset, or one text file."""

    where: str
    """What messages call it."""
    values: dict[str, Any] | None
    """By column; None where it cannot be read."""
    problem: str = ""
    """Why it cannot be read."""


class BadShard(Exception):
    """A shard, or the rest of one, that cannot be read; the text names it."""


class Shard(Protocol):
    @property
    def num_blocks(self) -> int | None:
        """None where only reading to the end tells."""

    def records(self, block: int) -> list[Record]:
        """The records of a block; behind the last block, none. Raises BadShard."""


class Shards(Protocol):
    @property
    def num_shards(self) -> int: ...

    def open(self, shard: int) -> Shard:
        """Raises BadShard."""

    def fingerprint(self) -> list:
        """What changes, in JSON, when the data does."""


def find_files(origin: Origin) -> list[Path]:
    """The files of a local source, sorted. Raises ValueError where there are none, RuntimeError as `check_modules`."""
    given = path_of(origin)
    path = Path(given).expanduser()
    suffixes = suffixes_of(origin.source)
    if path.is_dir():
        there = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in there if _kind(file) in suffixes]
        if not files:
            raise ValueError(_describe_folder(origin, there))
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise ValueError(
                f"data.path {given!r} is no file and no folder, and as a glob matches none; "
                f"give a file, a folder of {suffixes[0]} files, or a glob"
            )
    check_modules(files)
    return files


def _kind(file: Path) -> str:
    """A file's suffix, and the one before it where that says how it is compressed: .jsonl.gz."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() + suffix if suffix in SUFFIXES else suffix


def _describe_folder(origin: Origin, there: list[Path]) -> str:
    """What is wrong with a folder that holds none of a source's files."""
    kinds = Counter(map(_kind, there)).most_common(_NAMED_KINDS)
    found = [f"{count} {kind or 'without suffix'}" for kind, count in kinds]
    others = len(there) - sum(count for _, count in kinds)
    found += [f"{others} others"] if others else []
    text = f"data.path {origin.path!r} is a folder without files for source: {origin.source}, which reads "
    text += f"{', '.join(suffixes_of(origin.source))}; "
    text += f"it holds {', '.join(found) or 'no file'}"
    # A file without a suffix is seldom data.
    common = next((kind for kind, _ in kinds if kind), None)
    fitting = next((source for source in LOCAL if common in suffixes_of(source)), None)
    if fitting is not None:
        text += f". source: {fitting} reads {common}"
    elif common is not None:
        text += f". Files with other suffixes are named by a glob, such as {str(Path(path_of(origin)) / '**' / f'*{common}')!r}"
    return text


def fingerprint_of(files: Sequence[Path]) -> list:
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
        # The reader refuses or skips the file when it comes to it.
        return type(error).__name__
    return digest.hexdigest()[:16]


class TextFiles:
    """Each file is a record."""

    def __init__(self, origin: Origin):
        self.files, self.num_shards = find_files(origin), 1
        self.num_blocks = -(-len(self.files) // _BLOCK_FILES)

    def open(self, shard: int) -> Shard:
        return self

    def fingerprint(self) -> list:
        return fingerprint_of(self.files)

    def records(self, block: int) -> list[Record]:
        return [self._read(file) for file in self.files[block * _BLOCK_FILES : (block + 1) * _BLOCK_FILES]]

    def _read(self, file: Path) -> Record:
        try:
            with open_file(file) as opened:
                # A text's end of line is one character, whatever wrote it.
                text = io.TextIOWrapper(opened, encoding="utf-8-sig").read()
            return Record(f"data file {file}", {"text": text})
        except _NO_TEXT as error:
            return Record(f"data file {file}", None, f"cannot be read: {error}")


class Parquet:
    """Each row group is a shard: the smallest part that can be read alone."""

    def __init__(self, origin: Origin, columns: list[str], skips: bool):
        """skips: a file that is no Parquet file is a shard that cannot be read, and no error yet."""
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
            problem = f"data file {file} cannot be read: {first_line(error)}"
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
            raise BadShard(f"data file {file}, row group {group}, cannot be read: {first_line(error)}") from None
        return ArrowTable(table, f"{file}, row group {group}")

    def fingerprint(self) -> list:
        return fingerprint_of(self.files)


class ArrowTable:
    """A pyarrow Table as a shard; its rows as they were before Arrow gave them all the same keys."""

    def __init__(self, table: Any, name: str):
        self.table, self.name = table, name
        self.num_blocks = -(-table.num_rows // BLOCK_RECORDS)

    def records(self, block: int) -> list[Record]:
        start = block * BLOCK_RECORDS
        kinds = {field.name: field.type for field in self.table.schema}
        values = self.table.slice(start, BLOCK_RECORDS).to_pylist()
        return [
            Record(f"{self.name}, row {start + number}", {name: _original(value, kinds[name]) for name, value in row.items()})
            for number, row in enumerate(values)
        ]


def _original(value: Any, kind: Any) -> Any:
    """A value as it was before Arrow stored it with a type (kind).

    All structs of a column have the keys of each, with null for those that one did not have: keys with null are left out. Nulls in lists,
    maps and JSON were in the data and are kept.
    """
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict):
        return {field.name: _original(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if isinstance(value, list) and hasattr(kind, "item_type"):
        return {key: _original(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_original(item, kind.value_type) for item in value]
    return value


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"

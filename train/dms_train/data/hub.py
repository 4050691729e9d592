"""Rows of `datasets`: tables that lie on this machine, or streams that come shard by shard."""

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from dms_train.data.settings import Origin
from dms_train.data.shards import BLOCK_ROWS, ArrowTable, BadShard, Row, Shard

RETRY_SECONDS = (1.0, 5.0, 20.0)
_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "aiohttp")


def load(origin: Origin, columns: list[str]) -> "HubTable | HubStream":
    """Raises ValueError for a dataset that cannot be loaded, or that has not the columns."""
    import datasets

    try:
        rows = datasets.load_dataset(origin.path, origin.config, split=origin.split, streaming=origin.streaming)
        # A stream may not say its columns before it is read.
        known = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:
        # datasets raises its own, hub, network and file errors; each becomes one line with its cause.
        raise ValueError(f"dataset {origin.path!r} cannot be loaded: {_first_line(error)}") from error
    for column in columns:
        if column not in known:
            raise ValueError(f"dataset {origin.path!r} has no column {column!r}; it has {', '.join(known)}")
    rows = rows.select_columns(columns)
    return HubStream(rows, origin) if origin.streaming else HubTable(rows, origin)


class HubTable:
    """A dataset on this machine: one shard, whose blocks are read in any order."""

    def __init__(self, rows: Any, origin: Origin):
        self.rows, self.origin, self.num_shards = rows.with_format("arrow"), origin, 1

    def open(self, shard: int) -> Shard:
        return _HubRows(self.rows, f"dataset {self.origin.path}")

    def fingerprint(self) -> list:
        count = len(self.rows)
        ends = [self.rows[index : index + 1].to_pylist() for index in (0, count - 1) if index >= 0]
        return [self.origin.path, self.origin.config, self.origin.split, count, hashlib.sha256(repr(ends).encode()).hexdigest()[:16]]


class _HubRows:
    def __init__(self, rows: Any, name: str):
        self.all, self.name, self.num_blocks = rows, name, -(-len(rows) // BLOCK_ROWS)

    def rows(self, block: int) -> list[Row]:
        start = block * BLOCK_ROWS
        found = ArrowTable(self.all[start : min(start + BLOCK_ROWS, len(self.all))], self.name).rows(0)
        return [row._replace(where=f"{self.name}, row {start + number}") for number, row in enumerate(found)]


class HubStream:
    """A dataset that is never fetched whole. Within a shard blocks come in order; those skipped stay Arrow and are not decoded."""

    def __init__(self, rows: Any, origin: Origin):
        self.rows, self.origin, self.num_shards = rows.with_format("arrow"), origin, rows.num_shards

    def open(self, shard: int) -> Shard:
        return _StreamedShard(self.rows.shard(self.num_shards, shard), f"dataset {self.origin.path}, shard {shard}")

    def fingerprint(self) -> list:
        return [self.origin.path, self.origin.config, self.origin.split, self.num_shards]


class _StreamedShard:
    num_blocks = None

    def __init__(self, rows: Any, name: str):
        self.all, self.name = rows, name
        self._tables, self._next = self._from_start(), 0

    def _from_start(self) -> Iterator[Any]:
        return iter(self.all.iter(batch_size=BLOCK_ROWS))

    def _table(self, block: int) -> Any:
        """A block as it came; None: the shard ends before it."""
        if block < self._next:
            self._tables, self._next = self._from_start(), 0
        while self._next < block:
            if next(self._tables, None) is None:
                return None
            self._next += 1
        table = next(self._tables, None)
        self._next += 1
        return table

    def rows(self, block: int) -> list[Row]:
        for pause in (*RETRY_SECONDS, None):
            try:
                table = self._table(block)
                break
            except Exception as error:
                # As above: whatever the library, the network or a damaged file raises.
                self._tables, self._next = self._from_start(), 0
                if not _is_transient(error):
                    raise BadShard(f"{self.name} cannot be read: {_first_line(error)}") from error
                if pause is None:
                    # Not as a bad shard: when the run is continued it may well be there, and rows must be the same then.
                    raise ConnectionError(f"{self.name} cannot be reached: {_first_line(error)}") from error
                time.sleep(pause)
        if table is None:
            return []
        found = ArrowTable(table, self.name).rows(0)
        return [row._replace(where=f"{self.name}, row {block * BLOCK_ROWS + number}") for number, row in enumerate(found)]


def _is_transient(error: BaseException) -> bool:
    """The network's fault, and not the file's."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"

"""Rows of `datasets`: tables on this machine, or streams that come shard by shard."""

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from dms_train.data.settings import Origin
from dms_train.data.shards import BLOCK_RECORDS, ArrowTable, BadShard, Record, Shard, first_line

RETRY_SECONDS = (1.0, 5.0, 20.0)
_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "aiohttp")


def load(origin: Origin, columns: list[str]) -> "HubTable | HubStream":
    """Raises ValueError for a dataset that cannot be loaded, or that has not the columns."""
    import datasets

    try:
        dataset = datasets.load_dataset(origin.path, origin.config, split=origin.split, streaming=origin.streaming)
        # A stream may not say its columns before it is read.
        known = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        # datasets raises its own, hub, network and file errors; each becomes one line with its cause.
        raise ValueError(f"dataset {origin.path!r} cannot be loaded: {first_line(error)}") from error
    for column in columns:
        if column not in known:
            raise ValueError(f"dataset {origin.path!r} has no column {column!r}; it has {', '.join(known)}")
    dataset = dataset.select_columns(columns)
    return HubStream(dataset, origin) if origin.streaming else HubTable(dataset, origin)


class HubTable:
    """A dataset on this machine: one shard, whose blocks are read in any order."""

    def __init__(self, dataset: Any, origin: Origin):
        self.dataset, self.origin, self.num_shards = dataset.with_format("arrow"), origin, 1

    def open(self, shard: int) -> Shard:
        return _TableShard(self.dataset, f"dataset {self.origin.path}")

    def fingerprint(self) -> list:
        count = len(self.dataset)
        ends = [self.dataset[index : index + 1].to_pylist() for index in (0, count - 1) if index >= 0]
        return [self.origin.path, self.origin.config, self.origin.split, count, hashlib.sha256(repr(ends).encode()).hexdigest()[:16]]


class _TableShard:
    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name, self.num_blocks = dataset, name, -(-len(dataset) // BLOCK_RECORDS)

    def records(self, block: int) -> list[Record]:
        start = block * BLOCK_RECORDS
        found = ArrowTable(self.dataset[start : min(start + BLOCK_RECORDS, len(self.dataset))], self.name).records(0)
        return [record._replace(where=f"{self.name}, row {start + number}") for number, record in enumerate(found)]


class HubStream:
    """A dataset that is never fetched whole. Within a shard blocks come in order; those skipped stay Arrow and are not decoded."""

    def __init__(self, dataset: Any, origin: Origin):
        self.dataset, self.origin, self.num_shards = dataset.with_format("arrow"), origin, dataset.num_shards

    def open(self, shard: int) -> Shard:
        return _StreamedShard(self.dataset.shard(self.num_shards, shard), f"dataset {self.origin.path}, shard {shard}")

    def fingerprint(self) -> list:
        return [self.origin.path, self.origin.config, self.origin.split, self.num_shards]


class _StreamedShard:
    num_blocks: int | None = None

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset, name
        self._tables, self._next = self._from_start(), 0

    def _from_start(self) -> Iterator[Any]:
        return iter(self.dataset.iter(batch_size=BLOCK_RECORDS))

    def _table(self, block: int) -> Any:
        """A block as Arrow; None where the shard ends before it."""
        if block < self._next:
            self._tables, self._next = self._from_start(), 0
        while self._next < block:
            if next(self._tables, None) is None:
                return None
            self._next += 1
        table = next(self._tables, None)
        self._next += 1
        return table

    def records(self, block: int) -> list[Record]:
        for pause in (*RETRY_SECONDS, None):
            try:
                table = self._table(block)
                break
            except Exception as error:
                # As above: whatever the library, the network or a damaged file raises.
                self._tables, self._next = self._from_start(), 0
                if not _is_transient(error):
                    raise BadShard(f"{self.name} cannot be read: {first_line(error)}") from error
                if pause is None:
                    # Not a bad shard: when the run is continued it may be there again, and records must be the same then.
                    raise ConnectionError(f"{self.name} cannot be reached: {first_line(error)}") from error
                time.sleep(pause)
        if table is None:
            return []
        found = ArrowTable(table, self.name).records(0)
        return [record._replace(where=f"{self.name}, row {block * BLOCK_RECORDS + number}") for number, record in enumerate(found)]


def _is_transient(error: BaseException) -> bool:
    """The network's fault, and not the file's."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK

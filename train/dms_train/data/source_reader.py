"""A source's documents, endlessly, in an order that is a function of the seed, and from any cursor on.

Each epoch shuffles the shards, within a shard the blocks, within a block the records. A cursor is four numbers, and what was read
before it need not be known.
"""

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from dms.evaluation.data.tasks import make_document
from dms.evaluation.data.text_sources import StdlibText, stdlib_files
from dms.io.vocabulary import check_tokens
from dms_train.data.settings import Origin
from dms_train.data.shards import BadShard, Record, Shard, Shards
from dms_train.data.tokenization import Render, Rendered

_CHUNK_RECORDS = 16
_OPEN_SHARDS = 2


class Cursor(NamedTuple):
    """A place in the order that the seed gives."""

    epoch: int = 0
    shard: int = 0
    """Number within the epoch's order of shards, not of the files."""
    block: int = 0
    """Number within the shard's order of blocks."""
    record: int = 0
    """Number within the block's order of records."""

    @property
    def after(self) -> "Cursor":
        return self._replace(record=self.record + 1)


@dataclass(frozen=True)
class SourceDocument:
    """A document to train on."""

    source: int
    """Number of its source."""
    cursor: Cursor
    length: int
    """Tokens."""
    arrays: Callable[[], tuple[np.ndarray, np.ndarray]]
    """-> ids [T] int32, counted [T] bool: whether the loss counts the prediction at a token. Some are made only when called."""


class Outcome(NamedTuple):
    """What became of a record, or of a shard that cannot be read."""

    document: SourceDocument | None
    left_out: str = ""
    """Why it is no document: filtered, empty, bad_rows, bad_shards, ... (a key of `documents` in metrics.jsonl)."""


class _EpochEnd(NamedTuple):
    epoch: int


class Reader:
    """The documents of one source of files or datasets."""

    def __init__(
        self,
        origin: Origin,
        number: int,
        shards: Shards,
        render: Render,
        *,
        seed: int,
        skips: bool,
        workers: int,
        say: Callable[[str], None],
    ):
        """skips: what cannot be read is left out, counted and said, instead of an error. say: prints a line."""
        self.origin, self.number, self.shards, self.render = origin, number, shards, render
        self.skips, self.workers, self.say = skips, workers, say
        self.key = f"{seed}:{number}"
        self.executor: Executor | None = None
        self._open: dict[int, Shard] = {}
        self._said: set[str] = set()

    def fingerprint(self) -> list:
        return self.shards.fingerprint()

    def documents(self, cursor: Cursor) -> Iterator[Outcome]:
        """All from a cursor on. Raises ValueError for what cannot be read, unless that is skipped, and for an epoch without a document."""
        found, whole = 0, cursor == Cursor(cursor.epoch)
        seen: Counter[str] = Counter()
        for made in self._rendered(self._chunks(cursor)):
            if isinstance(made, _EpochEnd):
                if whole and not found:
                    counted = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in seen.items()) or "no records"
                    raise ValueError(
                        f"data.path {self.origin.path!r} holds no text to train on ({counted}); check its columns and data.filter"
                    )
                found, whole = 0, True
                seen.clear()
                continue
            outcome = self._outcome(*made)
            found += outcome.document is not None
            seen[outcome.left_out] += 1
            yield outcome

    def at(self, cursor: Cursor) -> SourceDocument:
        """The document at a cursor, read again."""
        shard = self._order(f"{cursor.epoch}", self.shards.num_shards)[cursor.shard]
        try:
            records = self._records(self._opened(shard), cursor)
        except BadShard as error:
            raise ValueError(f"{error}; it was read before: give the data that the run began with") from None
        document = self._outcome(cursor, self.render([records[cursor.record]])[0]).document if cursor.record < len(records) else None
        if document is None:
            raise ValueError(f"data.path {self.origin.path!r} has changed: a document of the checkpoint is not there any more")
        return document

    def _outcome(self, cursor: Cursor, rendered: Rendered) -> Outcome:
        if not rendered.left_out:
            ids, counted = rendered.ids, rendered.counted
            return Outcome(SourceDocument(self.number, cursor, len(ids), lambda: (ids, counted)))
        if not rendered.left_out.startswith("bad"):
            return Outcome(None, rendered.left_out)
        problem = rendered.problem if rendered.problem.startswith(rendered.where) else f"{rendered.where} {rendered.problem}"
        if not self.skips:
            raise ValueError(f"{problem} (data.bad_shards: skip leaves such out and counts them)")
        if problem not in self._said:
            self._said.add(problem)
            self.say(f"left out: {problem}")
        return Outcome(None, "bad_shards" if rendered.left_out == "bad_shard" else "bad_rows")

    def _rendered(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """(cursor, rendered) pairs and epoch ends, in order; `workers` chunks are tokenised at once."""
        waiting: deque[Any] = deque()
        for chunk in chunks:
            if isinstance(chunk, _EpochEnd | Rendered) or self.executor is None:
                waiting.append((chunk, None))
            else:
                waiting.append((chunk, self.executor.submit(self.render, [record for _, record in chunk])))
            if len(waiting) > (self.workers if self.executor is not None else 0):
                yield from self._finished(*waiting.popleft())

    def _finished(self, chunk: Any, future: Any) -> Iterator[Any]:
        if isinstance(chunk, _EpochEnd):
            yield chunk
        elif isinstance(chunk, Rendered):
            yield Cursor(), chunk
        else:
            made = self.render([record for _, record in chunk]) if future is None else future.result()
            yield from ((cursor, rendered) for (cursor, _), rendered in zip(chunk, made, strict=True))

    def _chunks(self, cursor: Cursor) -> Iterator[Any]:
        """Lists of (cursor, record); between them a Rendered for each shard that cannot be read, and epoch ends."""
        while True:
            order = self._order(f"{cursor.epoch}", self.shards.num_shards)
            while cursor.shard < len(order):
                try:
                    shard = self._opened(order[cursor.shard])
                    while shard.num_blocks is None or cursor.block < shard.num_blocks:
                        records = self._records(shard, cursor)
                        if not records and shard.num_blocks is None:
                            break
                        for start in range(cursor.record, len(records), _CHUNK_RECORDS):
                            numbered = enumerate(records[start : start + _CHUNK_RECORDS], start)
                            yield [(cursor._replace(record=number), record) for number, record in numbered]
                        cursor = Cursor(cursor.epoch, cursor.shard, cursor.block + 1)
                except BadShard as error:
                    yield Rendered("", left_out="bad_shard", problem=str(error))
                cursor = Cursor(cursor.epoch, cursor.shard + 1)
            yield _EpochEnd(cursor.epoch)
            cursor = Cursor(cursor.epoch + 1)

    def _opened(self, shard: int) -> Shard:
        if shard not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = self.shards.open(shard)
        return self._open[shard]

    def _records(self, shard: Shard, cursor: Cursor) -> list[Record]:
        """The records of the cursor's block, shuffled."""
        place = f"{cursor.epoch}:{cursor.shard}"
        blocks = None if shard.num_blocks is None else self._order(place, shard.num_blocks)
        records = shard.records(cursor.block if blocks is None else blocks[cursor.block])
        return [records[number] for number in self._order(f"{place}:{cursor.block}", len(records))]

    def _order(self, place: str, count: int) -> tuple[int, ...]:
        return _shuffled(f"{self.key}:{place}", count)


# Cached: the orders of shards and of blocks are needed again for every block.
@functools.lru_cache(maxsize=64)
def _shuffled(key: str, count: int) -> tuple[int, ...]:
    order = list(range(count))
    Random(key).shuffle(order)
    return tuple(order)


class BuiltinReader:
    """Standard-library text with planted tasks: document n is a function of n and the seed, and has exactly `length` tokens."""

    def __init__(
        self,
        tokenizer: Any,
        origin: Origin,
        number: int,
        length: int,
        seed: int,
        num_embeddings: int,
        length_of: Callable[[int], int] | None = None,
    ):
        """length_of: by n, a divisor of `length`: document n is then several of so many tokens end to end, with as many tasks in all."""
        self.length_of = length_of
        self.tokenizer, self.items, self.number, self.length, self.seed = tokenizer, origin.items, number, length, seed
        self.num_embeddings = num_embeddings
        self.text = StdlibText(held_out=False)
        self.executor: Executor | None = None
        for trial in range(4):
            try:
                self._plant(trial, length, origin.items[1], strict=True)
            except ValueError as error:
                raise ValueError(f"data.items {origin.items} do not fit data.length {length} with this tokenizer: {error}") from None

    def fingerprint(self) -> list:
        return [[path.name, path.stat().st_size] for path in stdlib_files(held_out=False)]

    def documents(self, cursor: Cursor) -> Iterator[Outcome]:
        while True:
            yield Outcome(self.at(cursor))
            cursor = cursor.after

    def at(self, cursor: Cursor) -> SourceDocument:
        # Made only when its batch is: planning needs the length alone.
        return SourceDocument(self.number, cursor, self.length, lambda: self._arrays(cursor.record))

    def _arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.length if self.length_of is None else self.length_of(index)
        parts = self.length // length
        made = [self._plant(index * parts + part, length) for part in range(parts)]
        for document in made:
            check_tokens(document.input_ids, self.tokenizer, self.num_embeddings, f"builtin document {index}")
        # Names and values drawn at random: there is nothing to predict, and the embedded model was not trained to.
        counted = [np.asarray([*document.role[1:], 0]) != 1 for document in made]
        return np.concatenate([np.asarray(document.input_ids, np.int32) for document in made]), np.concatenate(counted)

    def _plant(self, index: int, length: int, num_items: int | None = None, strict: bool = False) -> Any:
        rng = Random(f"{self.seed}:{length}:{index}")
        styles: tuple[Literal["anywhere"], Literal["end"]] = ("anywhere", "end")
        questions = rng.choice(styles)
        drawn = rng.randint(*self.items)
        return make_document(
            self.tokenizer,
            self.text,
            length=length,
            rng=rng,
            questions=questions,
            num_items=round(drawn * length / self.length) if num_items is None else num_items,
            strict=strict,
        )

"""What the training loop reads: each step's micro-batches, made ahead of it by one process of each node.

That process reads, tokenises and plans in threads, a bounded number of steps ahead, and hands every other process of its node its
rows. Each node's reader makes the same plan.
"""

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from dms.io.vocabulary import check_tokenizer, padding_id
from dms_train.data import hub
from dms_train.data.batches import Rows, make_rows, micro_batches
from dms_train.data.cost import Cost
from dms_train.data.jsonl import JsonLines
from dms_train.data.mixture import Mixture, PlannedStep, State
from dms_train.data.packing import deal, imbalance, window_steps
from dms_train.data.prefetch import Ahead, Node, join_node
from dms_train.data.settings import Data, Origin
from dms_train.data.shards import Parquet, TextFiles
from dms_train.data.source_reader import BuiltinReader, Reader
from dms_train.data.tokenization import columns_of, make_render, with_rows

# Of a state in JSON: some 30 for a stretch of a document, and as many for a source.
STATE_BYTES = 4096
SOURCE_BYTES = 64


@dataclass(frozen=True)
class StepData:
    """One step of one process. padding: share of all its rows' tokens, over all processes. cost_balance: the most that a group of ranks
    has to do over the mean. mark: a number of the step's plan, the same on all processes. counts: what became of documents so far. waited: seconds that the caller waited for this."""

    micro_batches: list[dict[str, torch.Tensor]]
    padding: float
    cost_balance: float
    mark: int
    counts: dict[str, int]
    waited: float


@dataclass(frozen=True)
class _Handed:
    """What a process gets of a step."""

    rows: Rows
    padding: float
    cost_balance: float
    mark: int
    counts: dict[str, int]
    state: State


def open_reader(
    tokenizer: Any, origin: Origin, number: int, data: Data, seed: int, num_rows: int, say: Callable[[str], None], render: Any = None
) -> Reader | BuiltinReader:
    """One source's documents, of tokens that an embedding of `num_rows` rows has. Raises ValueError for what is missing or does not fit."""
    check_tokenizer(tokenizer, num_rows)
    if origin.source == "builtin":
        return BuiltinReader(tokenizer, origin, number, data.length, seed, num_rows)
    columns = columns_of(origin)
    if origin.source == "dataset":
        shards: Any = hub.load(origin, columns)
    elif origin.source == "parquet":
        shards = Parquet(origin, columns, skips=data.bad_shards == "skip")
    else:
        shards = {"text": TextFiles, "jsonl": JsonLines}[origin.source](origin)
    render = with_rows(render or make_render(tokenizer, origin), tokenizer, num_rows)
    return Reader(origin, number, shards, render, seed=seed, skips=data.bad_shards == "skip", workers=data.workers, say=say)


def open_mixture(
    tokenizer: Any, data: Data, *, batch_size: int, steps: int, seed: int, cost: Cost, num_rows: int, say: Callable[[str], None] = print
) -> Mixture:
    """The run's rows, step by step, as functions of recipe and files alone. Raises ValueError as `open_reader`."""
    # Of its own: tokenizers may not be used by several threads while one changes its settings.
    tokenizer = copy.deepcopy(tokenizer)
    # What is longer than the model's context is split here, and nothing to warn of.
    tokenizer.model_max_length = int(1e30)
    readers = [open_reader(tokenizer, origin, number, data, seed, num_rows, say) for number, origin in enumerate(data.all_sources)]
    if data.workers > 1:
        executor = ThreadPoolExecutor(data.workers, thread_name_prefix="data")
        for reader in readers:
            reader.executor = executor
    return Mixture(readers, data, batch_size=batch_size, steps=steps, seed=seed, cost=cost)


def open_data(
    tokenizer: Any,
    data: Data,
    *,
    batch_size: int,
    micro_batch_size: int,
    steps: int,
    seed: int,
    cost: Cost,
    num_rows: int,
    group: int = 0,
    num_groups: int = 1,
    timeout: timedelta = timedelta(minutes=30),
    say: Callable[[str], None] = print,
) -> "Stream":
    """The training data of one process; all processes call it together.

    num_rows: of the model's embedding. group, num_groups: which share of each step's rows it trains on, of how many. Ranks of one group get the same rows.

    Raises:
        ValueError: data that is missing, unreadable, empty or not as the recipe says, or has tokens that the model has no row for.
    """
    node = join_node(group, timeout)
    mixture, problem = None, None
    if node.reads:
        try:
            mixture = open_mixture(tokenizer, data, batch_size=batch_size, steps=steps, seed=seed, cost=cost, num_rows=num_rows, say=say)
        except Exception as error:
            if node.group is None:
                raise
            problem = error
    if mixture is not None and data.packs and mixture.together < num_groups * micro_batch_size:
        say(
            f"{num_groups * micro_batch_size} rows are trained on at a time, and {mixture.together} of like cost stand together in a step; "
            f"data.balance_rows={num_groups * micro_batch_size} lets ranks wait less for each other, and mixes a step less"
        )
    return Stream(
        mixture,
        data,
        pad_id=padding_id(tokenizer, num_rows),
        micro_batch_size=micro_batch_size,
        group=group,
        num_groups=num_groups,
        node=node,
        problem=problem,
    )


def all_rows(mixture: Mixture, pad_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """Every row that a run trains on, in order: tensors [T] as in batches, and its number."""
    for planned in mixture.planned(mixture.first_state()):
        for batch in micro_batches(make_rows(planned.rows, mixture.data.length, pad_id), 1):
            yield {name: value[0] for name, value in batch.items()}


class Stream:
    """The run's steps in order. All processes make it, and call `next_step` and `seek`, together.

    mixture: on the node's reader only; problem: why it could not be opened. sample_ids: the first tokens of the run. digest: of the
    sources' files and the first step's rows; whether data that a run goes on with is the data that it began with.
    """

    def __init__(
        self,
        mixture: Mixture | None,
        data: Data,
        *,
        pad_id: int,
        micro_batch_size: int,
        group: int,
        num_groups: int,
        node: Node,
        problem: Exception | None = None,
    ):
        self.mixture, self.data, self.pad_id, self.node = mixture, data, pad_id, node
        self.micro_batch_size, self.group, self.num_groups = micro_batch_size, group, num_groups
        self._planned: Iterator[PlannedStep] = iter(())
        self._made: Iterator[list[_Handed]] | None = None
        self._threads: list[Ahead] = []
        self._state: State | None = None
        self._counts: dict[str, int] = {}
        self.digest, self.sample_ids = self._hand_out(self._look, problem)

    def _look(self) -> list[tuple[str, list[int]]]:
        """Plan the first steps, for what is wrong with the data and for what the run makes sure of."""
        planned = self.mixture.planned(self.mixture.first_state())
        first = next(planned)
        self._planned = itertools.chain([first], planned)
        rows = make_rows(first.rows, self.data.length, self.pad_id)
        digest = hashlib.sha256(json.dumps([reader.fingerprint() for reader in self.mixture.readers]).encode())
        digest.update(rows.ids.tobytes())
        return [(digest.hexdigest()[:32], rows.ids[0].tolist())] * len(self.node.data_groups)

    def seek(self, state: State) -> None:
        """Go to where a checkpoint's `state()` was taken; the next step is the one after."""
        self.close()
        self._state = state
        if self.mixture is not None:
            self._planned = self.mixture.planned(state)

    def state(self) -> State | None:
        """A small JSON-able dictionary: where the run stands after the last step that was handed out. None before the first."""
        assert len(json.dumps(self._state)) <= STATE_BYTES + SOURCE_BYTES * len(self.data.all_sources)
        return self._state

    def next_step(self) -> StepData:
        """The next step's micro-batches. Raises ValueError for data that cannot be read, with its place."""
        start = time.perf_counter()
        handed = self._hand_out(self._read)
        self._state, self._counts = handed.state, handed.counts
        batches = micro_batches(handed.rows, self.micro_batch_size)
        return StepData(batches, handed.padding, handed.cost_balance, handed.mark, handed.counts, time.perf_counter() - start)

    def describe(self) -> str:
        """What became of the documents that were read, where not all of them are trained on whole; else nothing."""
        odd = [f"{count} {why.replace('_', ' ')}" for why, count in self._counts.items() if why != "documents"]
        return f"of the data, {self._counts['documents']} documents were read; {', '.join(odd)}" if odd else ""

    def close(self) -> None:
        """End the threads. A later `next_step` would leave out the steps that they had made, so `seek` first."""
        for ahead in self._threads:
            ahead.stopped.set()
        for ahead in self._threads:
            ahead.close()
        self._made, self._threads = None, []

    def _read(self) -> list[_Handed]:
        if self._made is None:
            self._made = self._start()
        made = next(self._made, None)
        assert made is not None, "the run's last step was read"
        return made

    def _start(self) -> Iterator[list[_Handed]]:
        if self.data.prefetch == 0:
            return map(self._make, self._planned)
        # The next window is read and planned while this one is trained on; only its tokens wait in memory.
        planned = Ahead(self._planned, window_steps(self.mixture.batch_size))
        made = Ahead(map(self._make, planned), self.data.prefetch)
        self._threads = [planned, made]
        return made

    def _make(self, planned: PlannedStep) -> list[_Handed]:
        """What each process of this node gets of a step."""
        costs = [row.cost for row in planned.rows]
        dealt = deal(costs, self.num_groups, self.micro_batch_size)
        used = sum(piece.length for row in planned.rows for piece in row.pieces)
        # Few enough bits for a float32, in which processes compare them.
        mark = int(hashlib.sha256(json.dumps([planned.step, costs]).encode()).hexdigest()[:6], 16)
        padding = 1.0 - used / (len(planned.rows) * self.data.length)
        here = sorted(set(self.node.data_groups))
        rows = {group: make_rows([planned.rows[row] for row in dealt[group]], self.data.length, self.pad_id) for group in here}
        balance = imbalance(costs, dealt)
        return [_Handed(rows[group], padding, balance, mark, planned.counts, planned.state) for group in self.node.data_groups]

    def _hand_out(self, read: Callable[[], list[Any]], problem: Exception | None = None) -> Any:
        """What the node's reader reads for each of its processes, or its error."""
        if self.node.group is None:
            return read()[0]
        parts: list[Any] = [None] * len(self.node.data_groups)
        if self.node.reads and problem is None:
            try:
                parts = read()
            except Exception as error:  # noqa: BLE001 - it is raised below, after the others heard of it
                problem = error
        out: list[Any] = [None]
        reader = torch.distributed.get_global_rank(self.node.group, 0)
        torch.distributed.scatter_object_list(out, parts if self.node.reads else None, src=reader, group=self.node.group)
        if problem is not None:
            raise problem
        if out[0] is None:
            # The reader says it for all, and ends first.
            time.sleep(2.0)
            raise SystemExit(2)
        return out[0]

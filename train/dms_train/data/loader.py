"""The training data stream: each step's micro-batches, made ahead of the training loop by one process of each node.

That process reads, tokenises and plans in threads, a bounded number of steps ahead, and sends every other process of its node its
sequences. The readers of all nodes make the same plan.
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
from dms_train.data.batches import SequenceArrays, make_arrays, micro_batches
from dms_train.data.jsonl import JsonLines
from dms_train.data.mixture import Mixture, PlannedStep, State
from dms_train.data.packing import Cost, deal, imbalance, window_steps
from dms_train.data.prefetch import Ahead, Node, join_node
from dms_train.data.settings import Data, Origin
from dms_train.data.shards import Parquet, TextFiles
from dms_train.data.source_reader import BuiltinReader, Reader
from dms_train.data.tokenization import checking_tokens, columns_of, make_render
from dms_train.trial_length import length_at

# Limits of a state's JSON: a carried piece takes some 30 bytes, a source as many.
STATE_BYTES = 4096
SOURCE_BYTES = 64


@dataclass(frozen=True)
class StepData:
    """One step of one process."""

    micro_batches: list[dict[str, torch.Tensor]]
    padding: float
    """Share of the step's tokens, over all processes."""
    cost_balance: float
    """The most work that a group of ranks has over the mean."""
    plan_mark: int
    """A number of the step's plan: equal on all processes, unless they read different data."""
    counts: dict[str, int]
    """What became of documents so far."""
    waited: float
    """Seconds that the caller waited for this."""


@dataclass(frozen=True)
class _ProcessStep:
    """What the node's reader sends a process of a step; fields as in `StepData`."""

    sequences: SequenceArrays
    padding: float
    cost_balance: float
    plan_mark: int
    counts: dict[str, int]
    state: State


def open_reader(
    tokenizer: Any,
    origin: Origin,
    number: int,
    data: Data,
    seed: int,
    num_embeddings: int,
    say: Callable[[str], None],
    render: Any = None,
    length_of: Callable[[int], int] | None = None,
) -> Reader | BuiltinReader:
    """One source's documents.

    num_embeddings: of the model. render: instead of `make_render`'s. length_of: as BuiltinReader's. Raises ValueError for data that is missing or does not fit.
    """
    check_tokenizer(tokenizer, num_embeddings)
    if origin.source == "builtin":
        return BuiltinReader(tokenizer, origin, number, data.length, seed, num_embeddings, length_of)
    columns = columns_of(origin)
    if origin.source == "dataset":
        shards: Any = hub.load(origin, columns)
    elif origin.source == "parquet":
        shards = Parquet(origin, columns, skips=data.bad_shards == "skip")
    else:
        shards = {"text": TextFiles, "jsonl": JsonLines}[origin.source](origin)
    render = checking_tokens(render or make_render(tokenizer, origin), tokenizer, num_embeddings)
    return Reader(origin, number, shards, render, seed=seed, skips=data.bad_shards == "skip", workers=data.workers, say=say)


def open_mixture(
    tokenizer: Any,
    data: Data,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    cost: Cost,
    num_embeddings: int,
    say: Callable[[str], None] = print,
    lengths: list[int] | None = None,
) -> Mixture:
    """The run's sequences, step by step, as functions of recipe and files alone. Raises ValueError as `open_reader`."""
    # A copy: a tokenizer may not be used by several threads while one changes its settings.
    tokenizer = copy.deepcopy(tokenizer)
    # Documents longer than the model's context are split later; transformers would warn of each.
    tokenizer.model_max_length = int(1e30)
    # The built-in source alone: its documents are a step's sequences in order.
    length_of = None if lengths is None else lambda record: length_at(lengths, record // batch_size + 1)
    readers = [
        open_reader(tokenizer, origin, number, data, seed, num_embeddings, say, length_of=length_of)
        for number, origin in enumerate(data.all_sources)
    ]
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
    num_embeddings: int,
    lengths: list[int] | None = None,
    group: int = 0,
    num_groups: int = 1,
    timeout: timedelta = timedelta(minutes=30),
    say: Callable[[str], None] = print,
) -> "Stream":
    """The training data of one process; all processes call it together.

    Args:
        num_embeddings: rows of the model's embedding.
        lengths: as trial.lengths of a recipe; a sequence of shorter documents has them end to end, as one.
        group, num_groups: which share of each step's sequences this process trains on, of how many. Ranks of one group get the same ones.

    Raises:
        ValueError: data that is missing, unreadable, empty or not as the recipe says, or has tokens beyond the model's embedding.
    """
    node = join_node(group, timeout)
    mixture, problem = None, None
    if node.reads:
        try:
            mixture = open_mixture(
                tokenizer,
                data,
                batch_size=batch_size,
                steps=steps,
                seed=seed,
                cost=cost,
                num_embeddings=num_embeddings,
                say=say,
                lengths=lengths,
            )
        except Exception as error:
            if node.group is None:
                raise
            problem = error
    if mixture is not None and data.packs and mixture.group_size < num_groups * micro_batch_size:
        say(
            f"{num_groups * micro_batch_size} sequences are trained on at a time, and a step groups {mixture.group_size} of like cost; "
            f"data.balance_rows={num_groups * micro_batch_size} makes ranks wait less for each other, and mixes each step less"
        )
    return Stream(
        mixture,
        data,
        pad_id=padding_id(tokenizer, num_embeddings),
        micro_batch_size=micro_batch_size,
        group=group,
        num_groups=num_groups,
        node=node,
        problem=problem,
    )


def all_sequences(mixture: Mixture, pad_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """Every sequence that a run trains on, in order: tensors [T] as in batches, and its number."""
    for planned in mixture.planned(mixture.first_state()):
        for batch in micro_batches(make_arrays(planned.sequences, mixture.data.length, pad_id), 1):
            yield {name: value[0] for name, value in batch.items()}


class Stream:
    """The run's steps in order. All processes make it, and call `next_step` and `seek`, together."""

    digest: str
    """Of the sources' files and the first step's sequences: tells whether a run continues with the data that it began with."""
    sample_ids: list[int]
    """The first sequence of the run."""

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
        """mixture: on the node's reader only; problem: why it could not be opened."""
        self.mixture, self.data, self.pad_id, self.node = mixture, data, pad_id, node
        self.micro_batch_size, self.group, self.num_groups = micro_batch_size, group, num_groups
        self._planned: Iterator[PlannedStep] = iter(())
        self._made: Iterator[list[_ProcessStep]] | None = None
        self._threads: list[Ahead] = []
        self._state: State | None = None
        self._counts: dict[str, int] = {}
        self.digest, self.sample_ids = self._hand_out(self._look, problem)

    def _look(self) -> list[tuple[str, list[int]]]:
        """Plan the first window, which shows most of what can be wrong with data -> (digest, sample_ids) for each process of the node."""
        assert self.mixture is not None, "only the node's reader plans"
        planned = self.mixture.planned(self.mixture.first_state())
        first = next(planned)
        self._planned = itertools.chain([first], planned)
        arrays = make_arrays(first.sequences, self.data.length, self.pad_id)
        digest = hashlib.sha256(json.dumps([reader.fingerprint() for reader in self.mixture.readers]).encode())
        digest.update(arrays.ids.tobytes())
        return [(digest.hexdigest()[:32], arrays.ids[0].tolist())] * len(self.node.data_groups)

    def seek(self, state: State) -> None:
        """Go to where a checkpoint's `state()` was taken; the next step is the one after."""
        self.close()
        self._state = state
        if self.mixture is not None:
            self._planned = self.mixture.planned(state)

    def state(self) -> State | None:
        """The data cursors after the last step that was handed out, as a small dictionary for JSON. None before the first."""
        assert len(json.dumps(self._state)) <= STATE_BYTES + SOURCE_BYTES * len(self.data.all_sources)
        return self._state

    def next_step(self) -> StepData:
        """The next step's micro-batches. Raises ValueError for data that cannot be read, with its place."""
        start = time.perf_counter()
        received: _ProcessStep = self._hand_out(self._read)
        self._state, self._counts = received.state, received.counts
        return StepData(
            micro_batches=micro_batches(received.sequences, self.micro_batch_size),
            padding=received.padding,
            cost_balance=received.cost_balance,
            plan_mark=received.plan_mark,
            counts=received.counts,
            waited=time.perf_counter() - start,
        )

    def describe(self) -> str:
        """What became of the documents that were read; empty where all are trained on whole."""
        odd = [f"{count} {why.replace('_', ' ')}" for why, count in self._counts.items() if why != "documents"]
        return f"of the data, {self._counts['documents']} documents were read; {', '.join(odd)}" if odd else ""

    def close(self) -> None:
        """End the threads. The steps that they made ahead are lost: call `seek` before another `next_step`."""
        for ahead in self._threads:
            ahead.stopped.set()
        for ahead in self._threads:
            ahead.close()
        self._made, self._threads = None, []

    def _read(self) -> list[_ProcessStep]:
        if self._made is None:
            self._made = self._start()
        made = next(self._made, None)
        assert made is not None, "the run's last step was read"
        return made

    def _start(self) -> Iterator[list[_ProcessStep]]:
        if self.data.prefetch == 0:
            return map(self._make, self._planned)
        assert self.mixture is not None, "only the node's reader plans"
        # The next window is read and planned while this one is trained on: of it only the documents' tokens are held in memory.
        planned = Ahead(self._planned, window_steps(self.mixture.batch_size))
        made = Ahead(map(self._make, planned), self.data.prefetch)
        self._threads = [planned, made]
        return made

    def _make(self, planned: PlannedStep) -> list[_ProcessStep]:
        """What each process of this node gets of a step."""
        costs = [sequence.cost for sequence in planned.sequences]
        dealt = deal(costs, self.num_groups, self.micro_batch_size)
        used = sum(piece.length for sequence in planned.sequences for piece in sequence.pieces)
        # 24 bits: processes compare it as a float32.
        plan_mark = int(hashlib.sha256(json.dumps([planned.step, costs]).encode()).hexdigest()[:6], 16)
        padding = 1.0 - used / (len(planned.sequences) * self.data.length)
        here = sorted(set(self.node.data_groups))
        arrays = {group: make_arrays([planned.sequences[at] for at in dealt[group]], self.data.length, self.pad_id) for group in here}
        balance = imbalance(costs, dealt)
        return [_ProcessStep(arrays[group], padding, balance, plan_mark, planned.counts, planned.state) for group in self.node.data_groups]

    def _hand_out(self, read: Callable[[], list[Any]], problem: Exception | None = None) -> Any:
        """This process's part of what `read` gives on the node's reader, one part for each process; its error on all."""
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
            # The reader reports it for all, and ends first.
            time.sleep(2.0)
            raise SystemExit(2)
        return out[0]

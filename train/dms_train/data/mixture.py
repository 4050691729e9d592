"""From sources to the sequences of each optimizer step; a few numbers are its state."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dms_train.data.packing import Cost, Piece, compose, group_size, pack, window_after
from dms_train.data.settings import Data
from dms_train.data.source_reader import BuiltinReader, Cursor, Reader, SourceDocument

State = dict[str, Any]


@dataclass(frozen=True)
class PlannedSequence:
    """A packed sequence, before its tokens are put together."""

    number: int
    """Its number in the run."""
    pieces: list[Piece]
    cost: float
    """In the unit of `Cost`."""


@dataclass(frozen=True)
class PlannedStep:
    """What an optimizer step reads."""

    step: int
    """1, 2, ..."""
    sequences: list[PlannedSequence]
    state: State
    """From which the next step follows."""
    counts: dict[str, int]
    """What became of documents so far."""


class Mixture:
    """All sources together. Each document comes from the source that is furthest behind its share of the tokens."""

    def __init__(self, readers: list[Reader | BuiltinReader], data: Data, *, batch_size: int, steps: int, seed: int, cost: Cost):
        self.readers, self.data, self.cost = readers, data, cost
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.sources = data.all_sources
        self.group_size = group_size(data.balance_rows, batch_size)

    def first_state(self) -> State:
        sources = [[*Cursor(), 0.0] for _ in self.readers]
        return {"step": 0, "window": {"step": 0, "sources": sources, "carried": [], "counts": {}}}

    def planned(self, state: State) -> Iterator[PlannedStep]:
        """The steps after `state`, to the run's end."""
        window = _PlanningWindow(self, state["window"])
        while window.step < self.steps:
            start = window.state()
            for planned in window.plan():
                if planned.step > state["step"]:
                    yield PlannedStep(planned.step, planned.sequences, {"step": planned.step, "window": start}, planned.counts)


class _PlanningWindow:
    """The steps that are planned together, and what is carried from one window to the next."""

    def __init__(self, mixture: Mixture, state: State):
        self.mixture, readers = mixture, mixture.readers
        self.step: int = state["step"]
        self.cursors = [Cursor(*numbers[:4]) for numbers in state["sources"]]
        self.credits = [numbers[4] for numbers in state["sources"]]
        self.counts: Counter[str] = Counter(state["counts"])
        self.carried = [Piece(readers[number].at(Cursor(*place)), start, stop) for number, *place, start, stop in state["carried"]]
        self.fruitful = [cursor.epoch for cursor in self.cursors]
        self.streams = [reader.documents(cursor) for reader, cursor in zip(readers, self.cursors, strict=True)]

    def state(self) -> State:
        sources = [[*cursor, credit] for cursor, credit in zip(self.cursors, self.credits, strict=True)]
        carried = [[piece.document.source, *piece.document.cursor, piece.start, piece.stop] for piece in self.carried]
        return {"step": self.step, "sources": sources, "carried": carried, "counts": dict(self.counts)}

    def plan(self) -> list[PlannedStep]:
        """Read and plan the next window's steps, and move on to the window after it."""
        mixture, data = self.mixture, self.mixture.data
        first, num_steps = self.step + 1, window_after(self.step, mixture.steps, mixture.batch_size)
        documents = self._documents(first, num_steps)
        num_sequences = num_steps * mixture.batch_size
        packed, self.carried = pack(documents, self.carried, num_sequences=num_sequences, length=data.length, cuts=data.cuts)
        costs = [mixture.cost.of_sequence([piece.length for piece in pieces], data.length) for pieces in packed]
        self.step += num_steps
        counts = dict(self.counts)
        planned = []
        for offset, chosen in enumerate(compose(costs, num_steps, mixture.group_size, f"{mixture.seed}:{first}")):
            number = (first + offset - 1) * mixture.batch_size
            sequences = [PlannedSequence(number + place, packed[at], costs[at]) for place, at in enumerate(chosen)]
            planned.append(PlannedStep(first + offset, sequences, {}, counts))
        return planned

    def _documents(self, first: int, num_steps: int) -> Iterator[SourceDocument]:
        """Documents by the sources' weights in the step that they will be part of; each step has as many tokens as its sequences hold."""
        mixture, data = self.mixture, self.mixture.data
        step_tokens, total = mixture.batch_size * data.length, sum(piece.length for piece in self.carried)
        while True:
            step = min(first + total // step_tokens, first + num_steps - 1)
            number = self._behind(step)
            document = self._next(number)
            if document.length > data.length:
                self.counts["dropped" if data.long_documents == "drop" else "split"] += 1
                if data.long_documents == "drop":
                    self._check_epoch(number, document)
                    continue
            self.fruitful[number] = document.cursor.epoch
            for other, weight in enumerate(self._weights(step)):
                self.credits[other] += weight * document.length
            self.credits[number] -= document.length
            total += document.length
            yield document

    def _check_epoch(self, number: int, document: SourceDocument) -> None:
        if document.cursor.epoch > self.fruitful[number] + 1:
            source, length = self.mixture.sources[number], self.mixture.data.length
            raise ValueError(
                f"{source.label}: every document is longer than data.length {length}; raise data.length, or set long_documents: split"
            )

    def _weights(self, step: int) -> list[float]:
        weights = [source.weight_at(step) for source in self.mixture.sources]
        return [weight / sum(weights) for weight in weights]

    def _behind(self, step: int) -> int:
        weights = self._weights(step)
        # A source whose weight was 0 for a while has nothing to catch up.
        self.credits = [credit if weight > 0 else 0.0 for credit, weight in zip(self.credits, weights, strict=True)]
        return max((number for number, weight in enumerate(weights) if weight > 0), key=lambda number: (self.credits[number], -number))

    def _next(self, number: int) -> SourceDocument:
        """The source's next document; records that are none are counted."""
        for outcome in self.streams[number]:
            if outcome.document is not None:
                self.counts["documents"] += 1
                self.cursors[number] = outcome.document.cursor.after
                return outcome.document
            self.counts[outcome.left_out] += 1
        raise AssertionError("a source never ends")

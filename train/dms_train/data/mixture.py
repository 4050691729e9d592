"""From sources to the rows of each optimizer step; a few numbers say where it stands."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dms_train.data.cost import Cost
from dms_train.data.packing import Piece, balance_rows, compose, pack, window_after
from dms_train.data.settings import Data
from dms_train.data.source_reader import BuiltinReader, Cursor, Document, Reader

State = dict[str, Any]


@dataclass(frozen=True)
class PlannedRow:
    """number: that of the row in the run. cost: in the unit of `Cost`."""

    number: int
    pieces: list[Piece]
    cost: float


@dataclass(frozen=True)
class PlannedStep:
    """step: 1, 2, ... state: from which the next step follows. counts: what became of documents so far."""

    step: int
    rows: list[PlannedRow]
    state: State
    counts: dict[str, int]


class Mixture:
    """All sources together. Each document comes from the source that is furthest behind its share of the tokens."""

    def __init__(self, readers: list[Reader | BuiltinReader], data: Data, *, batch_size: int, steps: int, seed: int, cost: Cost):
        self.readers, self.data, self.cost = readers, data, cost
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.sources = data.all_sources
        self.together = balance_rows(data.balance_rows, batch_size)

    def first_state(self) -> State:
        sources = [[*Cursor(), 0.0] for _ in self.readers]
        return {"step": 0, "window": {"step": 0, "sources": sources, "carried": [], "counts": {}}}

    def planned(self, state: State) -> Iterator[PlannedStep]:
        """The steps after `state`, to the run's end."""
        window = _Window(self, state["window"])
        while window.step < self.steps:
            start = window.state()
            for planned in window.plan():
                if planned.step > state["step"]:
                    yield PlannedStep(planned.step, planned.rows, {"step": planned.step, "window": start}, planned.counts)


class _Window:
    """The steps that are planned together, and what goes over from one window to the next."""

    def __init__(self, mixture: Mixture, state: State):
        self.mixture, readers = mixture, mixture.readers
        self.step: int = state["step"]
        self.cursors = [Cursor(*numbers[:4]) for numbers in state["sources"]]
        self.credits = [numbers[4] for numbers in state["sources"]]
        self.counts = Counter(state["counts"])
        self.carried = [Piece(readers[number].at(Cursor(*place)), start, stop) for number, *place, start, stop in state["carried"]]
        self.fruitful = [cursor.epoch for cursor in self.cursors]
        self.streams = [reader.documents(cursor) for reader, cursor in zip(readers, self.cursors, strict=True)]

    def state(self) -> State:
        sources = [[*cursor, credit] for cursor, credit in zip(self.cursors, self.credits, strict=True)]
        carried = [[piece.document.source, *piece.document.cursor, piece.start, piece.stop] for piece in self.carried]
        return {"step": self.step, "sources": sources, "carried": carried, "counts": dict(self.counts)}

    def plan(self) -> list[PlannedStep]:
        """Read and plan the next window's steps; afterwards this stands behind it."""
        mixture, data = self.mixture, self.mixture.data
        first, num_steps = self.step + 1, window_after(self.step, mixture.steps, mixture.batch_size)
        num_rows = num_steps * mixture.batch_size
        documents = self._documents(first, num_steps)
        packed, self.carried = pack(documents, self.carried, num_rows=num_rows, length=data.length, cuts=data.cuts)
        costs = [mixture.cost.of_row([piece.length for piece in row], data.length) for row in packed]
        self.step += num_steps
        counts = dict(self.counts)
        planned = []
        for offset, chosen in enumerate(compose(costs, num_steps, mixture.together, f"{mixture.seed}:{first}")):
            number = (first + offset - 1) * mixture.batch_size
            rows = [PlannedRow(number + place, packed[row], costs[row]) for place, row in enumerate(chosen)]
            planned.append(PlannedStep(first + offset, rows, {}, counts))
        return planned

    def _documents(self, first: int, num_steps: int) -> Iterator[Document]:
        """Documents as the weights of the steps want them: each step as many tokens as its rows hold."""
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

    def _check_epoch(self, number: int, document: Document) -> None:
        if document.cursor.epoch > self.fruitful[number] + 1:
            source, length = self.mixture.sources[number], self.mixture.data.length
            raise ValueError(
                f"{source.label}: every document is longer than data.length {length}; lengthen the rows, or long_documents: split"
            )

    def _weights(self, step: int) -> list[float]:
        weights = [source.weight_at(step) for source in self.mixture.sources]
        return [weight / sum(weights) for weight in weights]

    def _behind(self, step: int) -> int:
        weights = self._weights(step)
        # A source that is out has no claims when it comes back.
        self.credits = [credit if weight > 0 else 0.0 for credit, weight in zip(self.credits, weights, strict=True)]
        return max((number for number, weight in enumerate(weights) if weight > 0), key=lambda number: (self.credits[number], -number))

    def _next(self, number: int) -> Document:
        """The source's next document; what is none is counted."""
        for outcome in self.streams[number]:
            if outcome.document is not None:
                self.counts["documents"] += 1
                self.cursors[number] = outcome.document.cursor.after
                return outcome.document
            self.counts[outcome.left_out] += 1
        raise AssertionError("a source never ends")

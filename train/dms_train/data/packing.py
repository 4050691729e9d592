"""Rows of equal tokens and steps of equal cost, composed from token counts alone.

A window of some 100 rows is planned at once. Documents are packed best fit, longest first. Of the rows, those of like cost stand
together in groups, and each step gets groups from all over the range: so a step is as mixed as the data, and ranks that take a row
of each group have the same to do. What is composed does not depend on how many ranks there are; who gets which row does.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from dms_train.data.source_reader import Document

WINDOW_ROWS = 96
MAX_WINDOW_STEPS = 16
CARRY_LIMIT = 16
# A gap of less than this share of a row is padded even where documents may be cut; so much of all rows is enough elsewhere.
_PADDED_GAP = 1 / 64
_DEFAULT_BALANCE = 4
_MAX_SWAPS = 16
_EVEN_ENOUGH = 1.02
_MAX_EXCHANGES = 8
# Of pairs of rows, over the number of rows in a step, which a try's time grows with: about a second.
_MAX_TRIES = 20_000


class Piece(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: Document
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def window_steps(batch_size: int) -> int:
    """Optimizer steps that are planned together, if the run has so many."""
    return min(MAX_WINDOW_STEPS, max(1, -(-WINDOW_ROWS // batch_size)))


def window_after(step: int, steps: int, batch_size: int) -> int:
    """How many steps the window that begins after `step` has: a run's are alike, so that the last is not too small to balance."""
    count = max(1, steps // window_steps(batch_size))
    return next(end for end in (steps * number // count for number in range(1, count + 1)) if end > step) - step


def balance_rows(asked: int | None, batch_size: int) -> int:
    """Raises ValueError for a number that does not divide the batch."""
    if asked is None:
        return max(size for size in range(1, _DEFAULT_BALANCE + 1) if batch_size % size == 0)
    if batch_size % asked:
        raise ValueError(f"data.balance_rows is {asked} and batch_size {batch_size}; give a divisor of it")
    return asked


def pack(
    documents: Iterator[Document], carried: list[Piece], *, num_rows: int, length: int, cuts: bool
) -> tuple[list[list[Piece]], list[Piece]]:
    """Draw documents and pack them -> (rows, what is carried over: at most CARRY_LIMIT stretches, to come first next time).

    carried: may be longer than a row, as documents may.
    """
    beyond: list[Piece] = []
    if cuts:
        drawn, beyond = _draw_exactly(documents, carried, num_rows * length)
    else:
        drawn = _draw_until_full(documents, carried, num_rows, length)
    pieces = [piece for item in drawn for piece in _split(item, length)]
    num_carried = sum(len(list(_split(item, length))) for item in carried)
    order = sorted(range(len(pieces)), key=lambda number: (number >= num_carried, -pieces[number].length, number))
    rows, left = _best_fit(pieces, order, num_rows, length)
    if cuts:
        left = _cut_to_fill(pieces, rows, left, length)
    elif len(_merge([piece for _, piece in left])) > CARRY_LIMIT:
        # Seldom: then in the order of their coming, where the drawing stopped in time.
        rows, left = _best_fit(pieces, range(len(pieces)), num_rows, length)
    packed = [[piece for _, piece in sorted(row, key=lambda numbered: numbered[0])] for row in rows]
    return packed, _merge([piece for _, piece in sorted(left, key=lambda numbered: (numbered[0], numbered[1].start))] + beyond)


Numbered = tuple[int, Piece]


def _draw_exactly(documents: Iterator[Document], carried: list[Piece], capacity: int) -> tuple[list[Piece], list[Piece]]:
    """As many tokens as the rows hold -> (pieces, the rest of the last ones)."""
    drawn, total = list(carried), sum(piece.length for piece in carried)
    while total < capacity:
        document = next(documents)
        drawn.append(Piece(document, 0, document.length))
        total += document.length
    beyond: list[Piece] = []
    while total > capacity:
        last, excess = drawn.pop(), total - capacity
        total -= last.length
        kept = max(0, last.length - excess)
        if kept:
            drawn.append(last._replace(stop=last.start + kept))
            total += kept
        beyond.insert(0, last._replace(start=last.start + kept))
    return drawn, beyond


def _draw_until_full(documents: Iterator[Document], carried: list[Piece], num_rows: int, length: int) -> list[Piece]:
    """Until the rows are as good as full, or so many do not fit any more that the next ones hardly will."""
    rooms, drawn, unplaced = [length] * num_rows, list(carried), 0

    def place(item: Piece) -> int:
        failed = 0
        for piece in _split(item, length):
            at = bisect_left(rooms, piece.length)
            if at == len(rooms):
                failed = 1
            else:
                insort(rooms, rooms.pop(at) - piece.length)
        return failed

    for item in carried:
        unplaced += place(item)
    while unplaced < min(CARRY_LIMIT, num_rows) and sum(rooms) > _PADDED_GAP * num_rows * length:
        document = next(documents)
        drawn.append(Piece(document, 0, document.length))
        unplaced += place(drawn[-1])
    return drawn


def _split(item: Piece, length: int) -> Iterator[Piece]:
    for start in range(item.start, item.stop, length):
        yield item._replace(start=start, stop=min(item.stop, start + length))


def _best_fit(pieces: Sequence[Piece], order: Sequence[int], num_rows: int, length: int) -> tuple[list[list[Numbered]], list[Numbered]]:
    """Each piece into the row that it leaves least room in -> (rows, what fits nowhere), with the pieces' numbers."""
    rows: list[list[Numbered]] = [[] for _ in range(num_rows)]
    rooms, left = [(length, row) for row in range(num_rows)], []
    for number in order:
        piece = pieces[number]
        at = bisect_left(rooms, (piece.length, -1))
        if at == len(rooms):
            left.append((number, piece))
            continue
        room, row = rooms.pop(at)
        rows[row].append((number, piece))
        insort(rooms, (room - piece.length, row))
    return rows, left


def _cut_to_fill(pieces: Sequence[Piece], rows: list[list[Numbered]], left: list[Numbered], length: int) -> list[Numbered]:
    """Fill the largest gaps with beginnings of what is left; what is left then."""
    rooms = sorted((length - sum(piece.length for _, piece in row), -at) for at, row in enumerate(rows))
    left = sorted(left, key=lambda numbered: numbered[1].length)
    while left and (rooms[-1][0] > _PADDED_GAP * length or len(left) > CARRY_LIMIT):
        room, negative = rooms.pop()
        number, piece = left.pop()
        kept = min(room, piece.length)
        rows[-negative].append((number, piece._replace(stop=piece.start + kept)))
        if kept < piece.length:
            insort(left, (number, piece._replace(start=piece.start + kept)), key=lambda numbered: numbered[1].length)
        insort(rooms, (room - kept, negative))
    return left


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one document become one."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.document is piece.document and last.stop == piece.start:
            merged[-1] = last._replace(stop=piece.stop)
        else:
            merged.append(piece)
    return merged


def compose(costs: Sequence[float], num_steps: int, together: int, key: str) -> list[list[int]]:
    """Rows' numbers step by step: groups of `together` rows of like cost, and in each step groups of all costs.

    Rows that all cost the same stay in their order.
    """
    size = len(costs) // num_steps
    if min(costs) == max(costs):
        return [list(range(step * size, (step + 1) * size)) for step in range(num_steps)]
    ranked = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    groups = [ranked[start : start + together] for start in range(0, len(ranked), together)]
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for start in range(0, len(groups), num_steps):
        stratum = groups[start : start + num_steps]
        Random(f"{key}:{start}").shuffle(stratum)
        for step, group in zip(steps, stratum, strict=True):
            step += group
    _mend(costs, steps, together)
    return steps


def _mend(costs: Sequence[float], steps: list[list[int]], together: int) -> None:
    """Where a few rows cost far more than all others, their steps stay uneven: exchange rows between the worst and others."""

    def unevenness(step: list[int]) -> float:
        chosen = [costs[row] for row in step]
        return imbalance(chosen, deal(chosen, together, 1))

    scores, tries = [unevenness(step) for step in steps], _MAX_TRIES // len(steps[0])
    for _ in range(_MAX_EXCHANGES):
        worst = max(range(len(steps)), key=lambda step: (scores[step], -step))
        if scores[worst] <= _EVEN_ENOUGH:
            return
        best = (scores[worst], ())
        # The dearest rows of the worst step are what makes it uneven.
        dearest = sorted(range(len(steps[worst])), key=lambda row: (-costs[steps[worst][row]], row))
        for other in (step for step in range(len(steps)) if step != worst):
            for here, there in itertools.product(dearest, range(len(steps[other]))):
                tries -= 1
                if tries < 0:
                    break
                mine, theirs = list(steps[worst]), list(steps[other])
                mine[here], theirs[there] = theirs[there], mine[here]
                score = unevenness(mine)
                if score < best[0] and (score := max(score, unevenness(theirs))) < best[0]:
                    best = (score, (other, mine, theirs))
        if not best[1]:
            return
        other, steps[worst], steps[other] = best[1]
        scores[worst], scores[other] = unevenness(steps[worst]), unevenness(steps[other])


def deal(costs: Sequence[float], num_groups: int, micro_batch_size: int) -> list[list[int]]:
    """A step's rows, by number, for each of the groups of ranks that train on different rows: so many each, of equal cost.

    Each group's come dearest first, so that micro-batches that are computed at the same time cost alike. Rows that all cost the
    same are dealt out in order.
    """
    share = len(costs) // num_groups
    if min(costs) == max(costs):
        turns = range(0, len(costs), micro_batch_size)
        return [[row for turn in turns[group::num_groups] for row in range(turn, turn + micro_batch_size)] for group in range(num_groups)]
    dealt: list[list[int]] = [[] for _ in range(num_groups)]
    sums = [0.0] * num_groups
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        group = min((group for group in range(num_groups) if len(dealt[group]) < share), key=lambda group: (sums[group], group))
        dealt[group].append(row)
        sums[group] += costs[row]
    _even_out(costs, dealt, sums)
    return [sorted(rows, key=lambda row: (-costs[row], row)) for rows in dealt]


def _even_out(costs: Sequence[float], dealt: list[list[int]], sums: list[float]) -> None:
    """Swap rows of the dearest group against cheaper ones of others while that lowers the most that a group has."""
    for _ in range(_MAX_SWAPS):
        most = max(range(len(sums)), key=lambda group: (sums[group], -group))
        best = None
        for other in range(len(sums)):
            gap = sums[most] - sums[other]
            for here, mine in enumerate(dealt[most]):
                for there, theirs in enumerate(dealt[other]):
                    moved = costs[mine] - costs[theirs]
                    # Both stay below what the dearest has now; best where they meet in the middle.
                    if 0 < moved < gap and (best is None or abs(gap - 2 * moved) < best[0]):
                        best = (abs(gap - 2 * moved), other, here, there)
        if best is None:
            return
        _, other, here, there = best
        moved = costs[dealt[most][here]] - costs[dealt[other][there]]
        dealt[most][here], dealt[other][there] = dealt[other][there], dealt[most][here]
        sums[most] -= moved
        sums[other] += moved


def imbalance(costs: Sequence[float], dealt: list[list[int]]) -> float:
    """The most that a group has to do over what they have on average."""
    sums = [sum(costs[row] for row in rows) for rows in dealt]
    return max(sums) * len(sums) / sum(sums)

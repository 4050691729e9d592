"""Packed sequences of equal length and steps of equal cost, composed from token counts alone.

A window of some 100 sequences is planned at once. Documents are packed best fit, longest first. Sequences of like cost then form groups,
and each step gets groups from the whole range of costs: a step is as mixed as the data, and ranks that take one sequence of each group
have equal work. What a step holds does not depend on the number of ranks; which rank gets which sequence does.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from dms_train.data.source_reader import SourceDocument

WINDOW_SEQUENCES = 96
MAX_WINDOW_STEPS = 16
CARRY_LIMIT = 16
# A gap of less than this share of a sequence is padded even where documents may be cut. Without cutting, drawing stops when no more than
# this share of all sequences is empty.
_PADDED_GAP = 1 / 64
_DEFAULT_BALANCE = 4
_MAX_SWAPS = 16
_EVEN_ENOUGH = 1.02
_MAX_EXCHANGES = 8
# Exchanges tried, over the sequences in a step, which the time of a try grows with: about a second in all.
_MAX_TRIES = 20_000


@dataclass(frozen=True)
class Cost:
    """What training on a sequence costs, in multiplications of a forward pass: a part grows with its tokens, and attention with their
    square."""

    token: float
    """Of one token, outside attention."""
    pair: float
    """Of a query and a key that it sees, over the layers with full attention."""
    sliding: float = 0.0
    """The same over the layers that see the last `window` tokens only."""
    window: int = 0

    def of_document(self, length: int) -> float:
        pairs = length * (length + 1) / 2
        beyond = max(0, length - self.window)
        return self.token * length + self.pair * pairs + self.sliding * (pairs - beyond * (beyond + 1) / 2)

    def of_sequence(self, lengths: list[int], num_tokens: int) -> float:
        """A sequence of `num_tokens`, packed with documents of these lengths; padding is computed as one more document."""
        return sum(map(self.of_document, lengths)) + self.of_document(num_tokens - sum(lengths))


def cost_of(config: Any) -> Cost:
    """A decoder's cost by its transformers configuration; of mixtures of experts, the experts that a token uses."""
    text = config.get_text_config()
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    experts = getattr(text, "num_experts_per_tok", None) or 1
    inner = (
        (getattr(text, "moe_intermediate_size", None) if experts > 1 else None) or getattr(text, "intermediate_size", None) or 4 * hidden
    )
    layer = hidden * head_dim * 2 * (heads + kv_heads) + 3 * hidden * inner * experts
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None) or 0
    num_sliding = sum(kind == "sliding_attention" for kind in kinds) if window else 0
    pair = 2.0 * heads * head_dim
    return Cost(float(layers * layer + hidden * text.vocab_size), pair * (layers - num_sliding), pair * num_sliding, int(window))


class Piece(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: SourceDocument
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def window_steps(batch_size: int) -> int:
    """Optimizer steps that are planned together, if the run has so many."""
    return min(MAX_WINDOW_STEPS, max(1, -(-WINDOW_SEQUENCES // batch_size)))


def window_after(step: int, steps: int, batch_size: int) -> int:
    """How many steps the window that begins after `step` has: a run's are alike, so that the last is not too small to balance."""
    count = max(1, steps // window_steps(batch_size))
    return next(end for end in (steps * number // count for number in range(1, count + 1)) if end > step) - step


def group_size(asked: int | None, batch_size: int) -> int:
    """Raises ValueError for a number that does not divide the batch."""
    if asked is None:
        return max(size for size in range(1, _DEFAULT_BALANCE + 1) if batch_size % size == 0)
    if batch_size % asked:
        raise ValueError(f"data.balance_rows is {asked} and batch_size {batch_size}; give a divisor of it")
    return asked


def pack(
    documents: Iterator[SourceDocument], carried: list[Piece], *, num_sequences: int, length: int, cuts: bool
) -> tuple[list[list[Piece]], list[Piece]]:
    """Draw documents and pack them -> (sequences, what is carried over to come first next time: at most CARRY_LIMIT pieces).

    carried: from last time; may be longer than a sequence, as documents may. cuts: documents may be cut to fill sequences.
    """
    beyond: list[Piece] = []
    if cuts:
        drawn, beyond = _draw_exactly(documents, carried, num_sequences * length)
    else:
        drawn = _draw_until_full(documents, carried, num_sequences, length)
    pieces = [piece for item in drawn for piece in _split(item, length)]
    num_carried = sum(len(list(_split(item, length))) for item in carried)
    order = sorted(range(len(pieces)), key=lambda number: (number >= num_carried, -pieces[number].length, number))
    sequences, left = _best_fit(pieces, order, num_sequences, length)
    if cuts:
        left = _cut_to_fill(pieces, sequences, left, length)
    elif len(_merge([piece for _, piece in left])) > CARRY_LIMIT:
        # Rare. In the order that they were drawn in, the limit holds: drawing stopped when too much did not fit.
        sequences, left = _best_fit(pieces, range(len(pieces)), num_sequences, length)
    packed = [[piece for _, piece in sorted(sequence, key=lambda numbered: numbered[0])] for sequence in sequences]
    return packed, _merge([piece for _, piece in sorted(left, key=lambda numbered: (numbered[0], numbered[1].start))] + beyond)


Numbered = tuple[int, Piece]


def _draw_exactly(documents: Iterator[SourceDocument], carried: list[Piece], capacity: int) -> tuple[list[Piece], list[Piece]]:
    """As many tokens as the sequences hold -> (pieces, the rest of the last ones)."""
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


def _draw_until_full(documents: Iterator[SourceDocument], carried: list[Piece], num_sequences: int, length: int) -> list[Piece]:
    """Until the sequences are nearly full, or so many documents did not fit that the next ones hardly will."""
    rooms, drawn, unplaced = [length] * num_sequences, list(carried), 0

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
    while unplaced < min(CARRY_LIMIT, num_sequences) and sum(rooms) > _PADDED_GAP * num_sequences * length:
        document = next(documents)
        drawn.append(Piece(document, 0, document.length))
        unplaced += place(drawn[-1])
    return drawn


def _split(item: Piece, length: int) -> Iterator[Piece]:
    for start in range(item.start, item.stop, length):
        yield item._replace(start=start, stop=min(item.stop, start + length))


def _best_fit(
    pieces: Sequence[Piece], order: Sequence[int], num_sequences: int, length: int
) -> tuple[list[list[Numbered]], list[Numbered]]:
    """Each piece into the sequence that it leaves least room in -> (sequences, what fits nowhere), with the pieces' numbers."""
    sequences: list[list[Numbered]] = [[] for _ in range(num_sequences)]
    rooms, left = [(length, at) for at in range(num_sequences)], []
    for number in order:
        piece = pieces[number]
        place = bisect_left(rooms, (piece.length, -1))
        if place == len(rooms):
            left.append((number, piece))
            continue
        room, at = rooms.pop(place)
        sequences[at].append((number, piece))
        insort(rooms, (room - piece.length, at))
    return sequences, left


def _cut_to_fill(pieces: Sequence[Piece], sequences: list[list[Numbered]], left: list[Numbered], length: int) -> list[Numbered]:
    """Fill the largest gaps with beginnings of what is left; what is left then."""
    rooms = sorted((length - sum(piece.length for _, piece in sequence), -at) for at, sequence in enumerate(sequences))
    left = sorted(left, key=lambda numbered: numbered[1].length)
    while left and (rooms[-1][0] > _PADDED_GAP * length or len(left) > CARRY_LIMIT):
        room, negative = rooms.pop()
        number, piece = left.pop()
        kept = min(room, piece.length)
        sequences[-negative].append((number, piece._replace(stop=piece.start + kept)))
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
    """Numbers of sequences step by step: groups of `together` sequences of like cost, and in each step groups of all costs.

    Sequences that all cost the same stay in their order.
    """
    size = len(costs) // num_steps
    if min(costs) == max(costs):
        return [list(range(step * size, (step + 1) * size)) for step in range(num_steps)]
    ranked = sorted(range(len(costs)), key=lambda number: (-costs[number], number))
    groups = [ranked[start : start + together] for start in range(0, len(ranked), together)]
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for start in range(0, len(groups), num_steps):
        stratum = groups[start : start + num_steps]
        Random(f"{key}:{start}").shuffle(stratum)
        for step, group in zip(steps, stratum, strict=True):
            step += group
    _exchange(costs, steps, together)
    return steps


def _exchange(costs: Sequence[float], steps: list[list[int]], together: int) -> None:
    """Where a few sequences cost far more than all others, their steps stay uneven: exchange sequences between the worst step and others."""

    def unevenness(step: list[int]) -> float:
        chosen = [costs[number] for number in step]
        return imbalance(chosen, deal(chosen, together, 1))

    scores, tries = [unevenness(step) for step in steps], _MAX_TRIES // len(steps[0])
    for _ in range(_MAX_EXCHANGES):
        worst = max(range(len(steps)), key=lambda step: (scores[step], -step))
        if scores[worst] <= _EVEN_ENOUGH:
            return
        # (score, the other step's number, both steps after the exchange)
        best: tuple[float, int, list[int], list[int]] | None = None
        # The most costly sequences of the worst step are what makes it uneven.
        costly = sorted(range(len(steps[worst])), key=lambda place: (-costs[steps[worst][place]], place))
        for other in (step for step in range(len(steps)) if step != worst):
            for here, there in itertools.product(costly, range(len(steps[other]))):
                tries -= 1
                if tries < 0:
                    break
                mine, theirs = list(steps[worst]), list(steps[other])
                mine[here], theirs[there] = theirs[there], mine[here]
                least = scores[worst] if best is None else best[0]
                score = unevenness(mine)
                if score < least and (score := max(score, unevenness(theirs))) < least:
                    best = (score, other, mine, theirs)
        if best is None:
            return
        _, other, steps[worst], steps[other] = best
        scores[worst], scores[other] = unevenness(steps[worst]), unevenness(steps[other])


def deal(costs: Sequence[float], num_groups: int, micro_batch_size: int) -> list[list[int]]:
    """A step's sequences, by number, for each group of ranks: equally many each, of equal cost.

    Each group's come most costly first, so that micro-batches that are computed at the same time cost alike. Sequences that all cost
    the same are dealt out in order.
    """
    share = len(costs) // num_groups
    if min(costs) == max(costs):
        turns = range(0, len(costs), micro_batch_size)
        return [
            [number for turn in turns[group::num_groups] for number in range(turn, turn + micro_batch_size)] for group in range(num_groups)
        ]
    dealt: list[list[int]] = [[] for _ in range(num_groups)]
    sums = [0.0] * num_groups
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        group = min((group for group in range(num_groups) if len(dealt[group]) < share), key=lambda group: (sums[group], group))
        dealt[group].append(number)
        sums[group] += costs[number]
    _even_out(costs, dealt, sums)
    return [sorted(share_of, key=lambda number: (-costs[number], number)) for share_of in dealt]


def _even_out(costs: Sequence[float], dealt: list[list[int]], sums: list[float]) -> None:
    """Swap sequences of the busiest group for cheaper ones of others while that lowers the most that a group has."""
    for _ in range(_MAX_SWAPS):
        most = max(range(len(sums)), key=lambda group: (sums[group], -group))
        best = None
        for other in range(len(sums)):
            gap = sums[most] - sums[other]
            for here, mine in enumerate(dealt[most]):
                for there, theirs in enumerate(dealt[other]):
                    moved = costs[mine] - costs[theirs]
                    # Both stay below what the busiest has now; best where they meet in the middle.
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
    """The most work that a group has over the mean."""
    sums = [sum(costs[number] for number in numbers) for numbers in dealt]
    return max(sums) * len(sums) / sum(sums)

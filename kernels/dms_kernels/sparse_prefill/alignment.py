"""Bring a ring and new tokens, with padding anywhere, into one order that ends with each row's newest token.

Shapes: B batch, T queries, N new tokens, M columns of ring and new tokens, Hq query heads, H KV heads, D head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """q [B, Hq, T, D], k and v [B, H, S, D], evicted [B, H, S], start [B] int32 as `sparse_prefill` takes them.

    column [B, T] int64: where each query went, -1 for padding; None: they stand where they stood.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    evicted: Tensor
    start: Tensor
    column: Tensor | None

    def restore(self, out_BTHqD: Tensor) -> Tensor:
        """The answers in the queries' old order."""
        if self.column is None:
            return out_BTHqD
        rows = torch.arange(len(out_BTHqD), device=out_BTHqD.device)[:, None]
        return out_BTHqD[rows, self.column.clamp(min=0)].masked_fill_((self.column < 0)[:, :, None, None], 0.0)


def align(q: Tensor, q_position: Tensor, recent: list, holes: bool | None) -> Aligned:
    """As `attend` takes its arguments.

    Raises:
        ValueError: entries came without positions or decisions.
    """
    if any(keys.position is None or keys.evicted is None for keys in recent):
        raise ValueError("the ring and the new tokens must come with their positions and decisions")
    if len(recent) == 1:
        new = recent[0]
        if holes is None:
            holes = _unknowable(q.device) or bool(_has_holes(new.position, q_position))
        if not holes:
            return Aligned(q, new.k, new.v, new.evicted, (new.position < 0).sum(1, dtype=torch.int32), None)
    position = torch.cat([keys.position for keys in recent], 1)
    last = position.amax(1, keepdim=True)
    entry_at, _ = _order(position, last, position.shape[1])
    query_at, column = _order(q_position, last, q_position.shape[1])
    rows = torch.arange(len(q), device=q.device)[:, None]
    k, v = (torch.cat(x, 2)[rows, :, entry_at].transpose(1, 2) for x in ([keys.k for keys in recent], [keys.v for keys in recent]))
    evicted = torch.cat([keys.evicted for keys in recent], 2)
    evicted = evicted.gather(2, entry_at[:, None].expand(evicted.shape))
    start = (position < 0).sum(1, dtype=torch.int32)
    return Aligned(q[rows, :, query_at].transpose(1, 2), k, v, evicted, start, column)


def _order(position: Tensor, last: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which column goes to each place when those with positions stand in order and end with `last` [B, 1], and the place of each
    column, -1 for none. Both [B, length] int64. Places before the first have column 0."""
    place = length - 1 - (last - position).long()
    there = position >= 0
    columns = torch.arange(length, device=position.device).expand(place.shape)
    # One place more, for columns that go nowhere.
    at = torch.zeros(len(position), length + 1, dtype=torch.long, device=position.device)
    at.scatter_(1, torch.where(there, place, length), columns)
    return at[:, :length], torch.where(there, place, -1)


def _has_holes(position: Tensor, q_position: Tensor) -> Tensor:
    """Whether padding follows a token, or the last queries are not the last tokens', [] bool."""
    follows = [(x[:, 1:] < 0) & (x[:, :-1] >= 0) for x in (position, q_position)]
    return follows[0].any() | follows[1].any() | (position[:, -1] != q_position[:, -1]).any()


def _unknowable(device: torch.device) -> bool:
    """Whether a number can't be read from the device now."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())

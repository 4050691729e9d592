"""Which tokens see which: documents, positions, alignment of decisions, visibility. Every other file asks here.

Key k is visible to query q iff both belong to one document, k <= q, and (q - k <= w or k is not evicted or k < sinks), in
positions of the document. With several windows w_1 < ... < w_K there is a decision for each, and k is visible iff no decision j with
q - k > w_j evicts it. Shapes: B batch, T new tokens, S all tokens, H KV heads, K windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dms.training.soft_decisions import Documents


@dataclass(frozen=True)
class Tokens:
    """Document and position of each token."""

    segment_BT: torch.Tensor
    """int32: number of the document in its row, from 1; 0 is padding."""
    position_BT: torch.Tensor
    """int32: position within that document, from 0."""

    @cached_property
    def unpadded(self) -> bool:
        """No token is padding. Reads from the device, once."""
        return bool((self.segment_BT > 0).all())

    @cached_property
    def has_holes(self) -> bool:
        """Padding elsewhere than on the left. Reads from the device, once."""
        return bool((self.real.cummax(1).values & ~self.real).any())

    @cached_property
    def packed(self) -> bool:
        """A row holds several documents. Reads from the device, once."""
        return bool((self.segment_BT > 1).any())

    @cached_property
    def real(self) -> torch.Tensor:
        """[B, T] bool: no padding."""
        return self.segment_BT > 0

    @cached_property
    def documents(self) -> "Documents":
        """Where documents begin and end, which the attention of all layers in training reads: found once, by whichever is first."""
        # Exported folders come without `dms.training`.
        from dms.training.soft_decisions import Documents

        return Documents(self.segment_BT)

    def to(self, device: torch.device) -> "Tokens":
        return self if self.segment_BT.device == device else self.map(lambda x: x.to(device))

    def cat(self, other: "Tokens") -> "Tokens":
        return Tokens(torch.cat([self.segment_BT, other.segment_BT], 1), torch.cat([self.position_BT, other.position_BT], 1))

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        return Tokens(fn(self.segment_BT), fn(self.position_BT))


def locate_tokens(
    batch: int,
    num_tokens: int,
    device: torch.device,
    attention_mask_BS: torch.Tensor | None,
    position_ids_BT: torch.Tensor | None,
    past: Tokens | None,
) -> Tokens:
    """Documents and positions of the T newest tokens.

    attention_mask_BS: 1 for tokens and 0 for padding (None: no padding), over all S tokens or the T new ones; padding between
    two tokens hides but does not part them. position_ids_BT: positions that restart or jump mean packed documents. With `past`
    [B, S - T] the new tokens continue each row's last document.

    Raises:
        ValueError: an attention mask that is not two-dimensional.
    """
    if attention_mask_BS is None:
        valid = torch.ones(batch, num_tokens, dtype=torch.bool, device=device)
    elif not isinstance(attention_mask_BS, torch.Tensor) or attention_mask_BS.dim() != 2:
        given = tuple(getattr(attention_mask_BS, "shape", ())) or type(attention_mask_BS).__name__
        raise ValueError(f"the attention mask is {given}; with gates active it must be [batch, tokens] (1 token, 0 padding)")
    else:
        valid = attention_mask_BS[:, -num_tokens:].to(device=device, dtype=torch.bool)
    if past is not None and past.segment_BT.shape[1] > 0:
        last = past.segment_BT.amax(1, keepdim=True).clamp(min=1)
        in_document = past.segment_BT == last
        next_position = torch.where(in_document, past.position_BT + 1, 0).amax(1, keepdim=True)
        segment = torch.where(valid, last, 0)
        position = torch.where(valid, next_position + valid.cumsum(1) - 1, 0)
        return Tokens(segment.int(), position.int())
    index = torch.arange(num_tokens, device=device)
    # Each token's predecessor, skipping padding; -1: it has none and starts a document.
    previous = torch.full_like(valid, -1, dtype=torch.long)
    previous[:, 1:] = torch.where(valid, index, -1).cummax(1).values[:, :-1]
    starts = valid & (previous < 0)
    if position_ids_BT is not None and position_ids_BT.dim() == 2:
        ids = position_ids_BT.to(device).expand(batch, -1)
        step = ids - ids.gather(1, previous.clamp(min=0))
        # Positions may count the padding between two tokens or not.
        starts |= valid & ((step < 1) | (step > index - previous))
    segment = starts.cumsum(1)
    count = valid.cumsum(1)
    position = count - torch.where(starts, count, 0).cummax(1).values
    return Tokens(torch.where(valid, segment, 0).int(), torch.where(valid, position, 0).int())


def require_unbroken(tokens: Tokens) -> None:
    """Raises ValueError where padding is between two tokens of a document: training counts distances in columns."""
    successor, has = _successor(tokens.segment_BT)
    if bool((has & (successor != torch.arange(has.shape[1], device=has.device) + 1)).any()):
        raise ValueError("the attention mask has padding between two tokens of a document; in train mode pad at a row's start or end")


def align(decision_BTX: torch.Tensor, segment_BT: torch.Tensor, alignment: str, undecided: float | bool) -> torch.Tensor:
    """Move decisions from the token whose gate made them to the token that they are for.

    decision_BTX: [B, T, H] or [B, T, H, K]. Under `next` the gate at k + 1 decides for k; a document's last token is `undecided` until
    its successor comes.
    """
    if alignment == "own":
        return decision_BTX
    successor, has = _successor(segment_BT)
    trailing = (1,) * (decision_BTX.dim() - 2)
    index = successor.view(*successor.shape, *trailing).expand_as(decision_BTX)
    return torch.where(has.view(*has.shape, *trailing), decision_BTX.gather(1, index), undecided)


def decided_tokens(segment_BT: torch.Tensor, alignment: str) -> torch.Tensor:
    """Which tokens have a decision, [B, T] bool: real ones, without each document's last under `next`."""
    return segment_BT > 0 if alignment == "own" else _successor(segment_BT)[1]


def _successor(segment_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the next token that is not padding, and whether it is one of the same document, both [B, T]."""
    last = segment_BT.shape[1] - 1
    index = torch.arange(last + 1, device=segment_BT.device)
    token_from = torch.where(segment_BT > 0, index, last).flip(1).cummin(1).values.flip(1)
    successor = token_from[:, (index + 1).clamp(max=last)]
    has = (segment_BT > 0) & (successor > index) & (segment_BT.gather(1, successor) == segment_BT)
    return successor, has


def visible(query: Tokens, key: Tokens, evicted_BSH: torch.Tensor, *, window: int | Sequence[int], sinks: int) -> torch.Tensor:
    """Visibility [B, H, T, S] bool. Within a document keys are in order, so that k <= q is a comparison of positions.

    evicted_BSH: of several windows [B, S, H, K].
    """
    q_position, k_position = query.position_BT[:, :, None], key.position_BT[:, None, :]
    causal = (query.segment_BT[:, :, None] == key.segment_BT[:, None, :]) & (key.segment_BT[:, None, :] > 0) & (k_position <= q_position)
    see = causal[:, None]
    for delay, evicted in each_window(window, evicted_BSH):
        near = (q_position - k_position <= delay) | (k_position < sinks)
        kept = ~evicted.permute(0, 2, 1)[:, :, None, :]
        see = see & (near[:, None] | kept)
    return see


def alive(tokens: Tokens, evicted_BSH: torch.Tensor, *, window: int | Sequence[int], sinks: int) -> torch.Tensor:
    """Entries alive at each document's end, [B, S, H] bool: its window and sinks included, padding not. evicted_BSH: as in `visible`."""
    position = tokens.position_BT
    there = (tokens.segment_BT > 0)[..., None]
    for delay, evicted in each_window(window, evicted_BSH):
        near = (document_end(tokens) - position <= delay) | (position < sinks)
        there = there & (near[..., None] | ~evicted)
    return there


def alive_steps(tokens: Tokens, evicted_BSH: torch.Tensor, *, window: int | Sequence[int], sinks: int) -> torch.Tensor:
    """For how many positions of its document each entry is alive, its own among them, [B, S, H] int64; 0 for padding.

    Summed over a document's tokens, and divided by its length, these are the entries alive in the mean over positions. evicted_BSH: as in
    `visible`.
    """
    position = tokens.position_BT.long()
    rest = (document_end(tokens) - tokens.position_BT).long()
    steps = rest[..., None].expand(evicted_BSH.shape[:3])
    for delay, evicted in each_window(window, evicted_BSH):
        steps = torch.where(evicted & (position >= sinks)[..., None], steps.clamp(max=delay), steps)
    return torch.where(tokens.real[..., None], steps + 1, 0)


def classes(evicted_BSH: torch.Tensor) -> torch.Tensor:
    """Of each token the first decision that evicts it, from 1, or 0 where none does: [B, S, H] uint8. evicted_BSH: as in `visible`."""
    if evicted_BSH.dim() == 3:
        return evicted_BSH.to(torch.uint8)
    # Of equal ones argmax finds the first.
    first = evicted_BSH.to(torch.uint8).argmax(-1) + 1
    return torch.where(evicted_BSH.any(-1), first, 0).to(torch.uint8)


def each_window(window: int | Sequence[int], evicted_BSH: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Each window with its decisions [B, S, H]."""
    if isinstance(window, int):
        return [(window, evicted_BSH)]
    return list(zip(window, evicted_BSH.unbind(-1), strict=True))


def document_end(tokens: Tokens) -> torch.Tensor:
    """Position of the last token of each token's document, [B, S]."""
    segment = tokens.segment_BT.long()
    # As many documents as tokens at most; how many there are would have to be asked of the device.
    ends = torch.zeros(segment.shape[0], segment.shape[1] + 1, dtype=tokens.position_BT.dtype, device=segment.device)
    ends.scatter_reduce_(1, segment, tokens.position_BT, "amax")
    return ends.gather(1, segment)

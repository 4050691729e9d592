"""What a target ratio counts: the share of KV entries that decisions save, as gates learn it.

Shapes: B batch, T tokens, H KV heads, K windows.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from dms import masks
from dms.masks import Tokens

Budget = Literal["decided", "end", "mean"]


def savings(tokens: Tokens, windows: Sequence[int], *, sinks: int, alignment: str, budget: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """What evicting by each window saves, [B, T, K], and what there is to save, [B, T], by the token whose gate decides; float32.

    decided: each decision counts alike, whenever it takes effect (one window). end: entries that are gone at their document's end.
    mean: entries times the queries that they are gone for. Padding has nothing to save, and under `next` a document's first token neither.
    """
    position, real = tokens.position_BT, tokens.real
    after = masks.document_end(tokens) - position
    deciding = real
    if alignment == "next":
        # The gate at k + 1 decides for k.
        after, position, deciding = after + 1, position - 1, real & (position > 0)
    if budget == "decided":
        saved = torch.ones(*deciding.shape, len(windows), device=deciding.device)
        return saved * deciding[..., None], deciding.float()
    delays = torch.tensor(list(windows), device=position.device)
    gone = (after[..., None] - delays).clamp(min=0) * (deciding & (position >= sinks))[..., None]
    if budget == "end":
        return (gone > 0).float(), real.float()
    return gone.float(), (masks.document_end(tokens) - tokens.position_BT + 1).float() * real


def saved_by(evicted_BTHK: torch.Tensor, saved_BTK: torch.Tensor) -> torch.Tensor:
    """[B, T, H]: what each token's decisions save, where an entry leaves by the first window that evicts it."""
    total = evicted_BTHK[..., 0] * saved_BTK[:, :, None, 0]
    still_there = 1.0 - evicted_BTHK[..., 0]
    for j in range(1, evicted_BTHK.shape[-1]):
        total = total + still_there * evicted_BTHK[..., j] * saved_BTK[:, :, None, j]
        still_there = still_there * (1.0 - evicted_BTHK[..., j])
    return total

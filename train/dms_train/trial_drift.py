"""Under trial: do gates decide beyond their training length as they do within it?

B documents, T tokens, L layers with gates, H KV heads, Q ranges of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dms.attention import evict_pass
from dms.lm_head import hidden_states, make_logits
from dms.modes import set_mode


@dataclass(frozen=True)
class Drift:
    """What gates do by position, over documents. Each range of positions is also read alone, as a document of its own: the same tokens
    at positions from 0, so that what differs is the position and what came before."""

    edges: list[int]
    """[Q + 1]: range i has the positions edges[i]..edges[i + 1] - 1."""
    evicted_LHQ: torch.Tensor
    """Share of the range's tokens that are evicted, by any window."""
    kl_Q: torch.Tensor
    """Mean KL(dense || evict) of next-token distributions, in nats."""
    evicted_alone_LHQ: torch.Tensor
    kl_alone_Q: torch.Tensor


@torch.no_grad()
def drift(model: Any, documents: Sequence[Sequence[int]], edges: list[int]) -> Drift:
    """Read each document's ids, and their ranges alone, dense and in masked evict mode. Documents have the last edge's number of tokens."""
    ranges = list(pairwise(edges))
    found = []
    for document in documents:
        kl_T, evicted_LHT = _read(model, document)
        alone = [_read(model, document[a:b]) for a, b in ranges]
        found.append(
            (
                torch.stack([evicted_LHT[..., a:b].mean(-1) for a, b in ranges], -1),
                torch.stack([kl_T[a:b].mean() for a, b in ranges]),
                torch.stack([evicted.mean(-1) for _, evicted in alone], -1),
                torch.stack([kl.mean() for kl, _ in alone]),
            )
        )
    return Drift(edges, *(torch.stack(parts).mean(0) for parts in zip(*found, strict=True)))


def _read(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """KL [T], and which tokens each layer and head evicts [L, H, T] float32."""
    inputs, log_probs = {"input_ids": torch.tensor([list(ids)])}, []
    for mode in ("dense", "evict"):
        set_mode(model, mode)
        log_probs.append(make_logits(model, hidden_states(model, inputs)).float().log_softmax(-1)[0])
    dense, evict = log_probs
    decided = evict_pass(model).evicted
    evicted = [gone if gone.dim() == 3 else gone.any(-1) for _, gone in sorted(decided.items())]
    return (dense.exp() * (dense - evict)).sum(-1), torch.stack([gone[0].T.float() for gone in evicted])

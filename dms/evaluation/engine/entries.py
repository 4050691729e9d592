"""How many KV entries a cache has alive: at the end, in the mean over positions, and of those what forks share.

Compacted caches count what they hold; in masked ones, which evict mode falls back to, what is alive is found from the decisions. Shapes:
B sequences, T tokens, H KV heads, K windows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from dms import masks
from dms.cache import CompactedLayer
from dms.cache.layer import MaskedLayer
from dms.masks import Tokens
from dms.modes import state_of

Decisions = dict[int, torch.Tensor]
"""By layer index: [B, T, H] bool, of several windows [B, T, H, K], as the gates at these tokens made them."""


def memory_of_cache(cache: Cache | None) -> str | None:
    """`masked` where evicted entries stay in memory, `compacted` where they are freed; None: dense, or no cache."""
    layers = [] if cache is None else cache.layers
    for kind, name in ((MaskedLayer, "masked"), (CompactedLayer, "compacted")):
        if any(isinstance(layer, kind) for layer in layers):
            return name
    return None


def count_entries(model: Any, cache: Cache, length_B: torch.Tensor | None = None) -> torch.Tensor:
    """[4, B] int64: alive, seen, evicted and decided entries of each sequence over the heads of the layers with gates.

    length: tokens of each sequence, where columns of a dense cache hold padding; None: none do.
    """
    total_4B = torch.zeros((), dtype=torch.long)
    for layer in state_of(model).layers:
        held, H = cache.layers[layer.index], layer.num_heads
        if isinstance(held, CompactedLayer):
            seen_B = held.row_lengths().long()
            counts = held.entries_alive().sum(1), seen_B * H, held.store.evicted.long().sum(1), held.store.decided.long() * H
        elif isinstance(held, MaskedLayer):
            counts = _count_masked(held)
        else:
            B, H, S = _keys(held).shape[:3]
            full_B = H * (torch.full((B,), S) if length_B is None else length_B.cpu())
            counts = full_B, full_B, torch.zeros_like(full_B), full_B
        total_4B = total_4B + torch.stack([count.cpu() for count in counts])
    return total_4B


def alive_entries(held: CompactedLayer | MaskedLayer) -> torch.Tensor:
    """[B, H] int64: of a layer's cache."""
    if isinstance(held, CompactedLayer):
        return held.entries_alive()
    return masks.alive(_tokens(held), held.evicted(), window=held.dms.window, sinks=held.dms.sinks).sum(1)


def _count_masked(held: MaskedLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, evicted, config = _tokens(held), held.evicted(), held.dms
    gone_BTH = evicted if evicted.dim() == 3 else evicted.any(-1)
    decided_BT = masks.decided_tokens(tokens.segment_BT, config.alignment)
    evicted_B = (gone_BTH & decided_BT[..., None]).sum((1, 2))
    H = evicted.shape[2]
    return alive_entries(held).sum(1), tokens.real.sum(1) * H, evicted_B, decided_BT.sum(1) * H


def count_shared(model: Any, cache: Cache) -> int:
    """Entries of a cache of one sequence that its forks share for good, over the heads of the layers with gates: those that have left the
    ring and that no decision evicts, and all of a dense cache. To the entry, where pages round up."""
    total = 0
    for layer in state_of(model).layers:
        held = cache.layers[layer.index]
        if isinstance(held, CompactedLayer):
            total += int(held.store.kept_for_good().sum())
        elif isinstance(held, MaskedLayer):
            tokens, evicted, config = _tokens(held), held.evicted(), held.dms
            gone = evicted if evicted.dim() == 3 else evicted.any(-1)
            stays = ~gone | (tokens.position_BT < config.sinks)[..., None]
            old = tokens.real & (masks.document_end(tokens) - tokens.position_BT > config.windows[0])
            total += int((stays & old[..., None]).sum())
        else:
            total += _keys(held).shape[1:3].numel()
    return total


def _tokens(held: MaskedLayer) -> Tokens:
    assert held.tokens is not None, "documents were read"
    return held.tokens


def _keys(layer: Any) -> torch.Tensor:
    """Of a dense layer that has read a prompt."""
    assert isinstance(layer.keys, torch.Tensor)
    return layer.keys


@contextmanager
def collect_decisions(model: Any) -> Iterator[Decisions]:
    """Within it, what the gates decided in the latest pass of several tokens, whatever cache it had."""
    state, found = state_of(model), Decisions()

    def hook_of(index: int):
        def note(gate: Any, args: Any, logits: torch.Tensor) -> None:
            # As evict mode decides.
            found[index] = (logits + state.evict_bias if state.evict_bias else logits) > 0

        return note

    hooks = [layer.gate.register_forward_hook(hook_of(layer.index)) for layer in state.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def join_decisions(parts: Sequence[Decisions]) -> Decisions:
    """Of a text that was read in parts."""
    return {index: torch.cat([part[index] for part in parts], 1) for index in parts[0]}


def entries_by_position(model: Any, decisions: Decisions) -> torch.Tensor:
    """[B] float64: entries alive after each token of documents without padding, a head's, summed over their positions.

    decisions: of whole documents, or of their beginnings.
    """
    config = state_of(model).config
    total: Any = 0
    for decided in decisions.values():
        B, T = decided.shape[:2]
        position_BT = torch.arange(T, dtype=torch.int32, device=decided.device).expand(B, T)
        tokens = Tokens(torch.ones_like(position_BT), position_BT)
        evicted = masks.align(decided, tokens.segment_BT, config.alignment, False)
        total = total + masks.alive_steps(tokens, evicted, window=config.window, sinks=config.sinks).sum((1, 2)).cpu()
    return total.double() / sum(layer.num_heads for layer in state_of(model).layers)


def mean_of_budget(budget: float, num_seen: int) -> float:
    """Entries alive in the mean over `num_seen` positions, of a policy that holds `budget` once it has seen so many: min(q + 1, budget) at
    position q. What it holds beyond while a prompt is read in parts is not counted."""
    held = min(budget, num_seen)
    return held - held * (held - 1) / (2 * num_seen)

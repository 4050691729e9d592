"""The masked cache: keeps every entry and remembers what was decided. The reference that a compacting cache is held to."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dms import hf_compat, masks
from dms.config import DMSConfig
from dms.masks import Tokens
from dms.modes import state_of


class MaskedLayer(DynamicLayer):
    """A DynamicLayer with decisions: `decision` [B, S, H] bool as its gates made them, and where each token stands."""

    def __init__(self, config: DMSConfig):
        super().__init__()
        self.dms = config
        self.decision: torch.Tensor | None = None
        self.tokens: Tokens | None = None

    def decide(self, decision_BTH: torch.Tensor, tokens: Tokens) -> None:
        """Append the newest tokens' gates; their keys and values follow through `update`.

        Raises:
            ValueError: keys and values came in between without decisions.
        """
        num_decided = 0 if self.decision is None else self.decision.shape[1]
        if num_decided != self.get_seq_length():
            raise ValueError(
                f"the given cache holds {self.get_seq_length()} tokens and decisions for {num_decided}: "
                "it was used in another mode between; start evict mode with an empty cache"
            )
        if self.decision is None:
            self.decision, self.tokens = decision_BTH, tokens
        else:
            self.decision = torch.cat([self.decision, decision_BTH], 1)
            self.tokens = self.tokens.cat(tokens)

    def evicted(self) -> torch.Tensor:
        """[B, S, H] bool, aligned to the tokens that are ruled."""
        return masks.align(self.decision, self.tokens.segment_BT, self.dms.alignment, False)

    def _map(self, fn) -> None:
        if self.decision is not None:
            self.decision, self.tokens = fn(self.decision), self.tokens.map(fn)

    def reset(self) -> None:
        super().reset()
        self.decision = self.tokens = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._map(lambda x: x[:, : -abs(tokens_to_remove)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices, ...])


class MaskedCache(DynamicCache):
    """What `masked_cache` makes."""

    def reset(self) -> None:
        super().reset()
        for layer in self.layers:
            hf_compat.empty_layer(layer)


def masked_cache(model) -> MaskedCache:
    """An empty cache that hides what is evicted and keeps it: pass it as `past_key_values` in evict mode."""
    state = state_of(model)
    cache = MaskedCache(config=model.config)
    for layer in state.layers:
        cache.layers[layer.index] = MaskedLayer(state.config)
    return cache


def cache_ratios(cache: Cache) -> dict[str, float]:
    """`cr_decided`, `cr` (ratios of sums over gated layers), and the entries behind them: `seen`, `alive`."""
    evicted = decided = seen = alive = 0
    for layer in cache.layers:
        if not isinstance(layer, MaskedLayer) or layer.decision is None:
            continue
        ruled, segment = layer.evicted(), layer.tokens.segment_BT
        has = masks.decided_tokens(segment, layer.dms.alignment)[..., None].expand_as(ruled)
        evicted += int((ruled & has).sum())
        decided += int(has.sum())
        seen += int((segment > 0).sum()) * ruled.shape[-1]
        alive += int(masks.alive(layer.tokens, ruled, window=layer.dms.window, sinks=layer.dms.sinks).sum())
    return {
        "cr_decided": 1.0 / max(1e-9, 1.0 - evicted / max(1, decided)),
        "cr": seen / max(1, alive),
        "seen": seen,
        "alive": alive,
    }

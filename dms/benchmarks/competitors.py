"""What is compared: the compacted cache at given shares of eviction, and two dense caches, all filled with the same tokens.

Shapes: B batch, N new tokens, S all tokens, Hq query heads, H KV heads, G = Hq / H, D head dim, L layers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dms import hf_compat
from dms.benchmarks.model import Shape, keep_shares, share_weights, with_gates
from dms.cache import DMSCache
from dms.masks import Tokens

_PACKED = "dms_bench_packed"
# Tokens that a cache is filled with at a time.
_PIECE = 2048


class PreallocatedLayer(DynamicLayer):
    """A dense layer at its best: tokens are written in their places in buffers made once, and attention reads the filled part.

    transformers' StaticCache reads its whole length under a mask instead.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        B, H, _, D = key_states.shape
        self.buffers = key_states.new_zeros(2, B, H, self.capacity, D)
        self.keys, self.values = self.buffers[:, :, :, :0]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.buffers[0, :, :, start:end] = key_states
        self.buffers[1, :, :, start:end] = value_states
        self.keys, self.values = self.buffers[0, :, :, :end], self.buffers[1, :, :, :end]
        return self.keys, self.values


def packed_attention(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' SDPA; in decoding a KV head's queries stand side by side, so that each key is read once for all of them."""
    B, Hq, N, D = query.shape
    if N > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = F.scaled_dot_product_attention(query.view(B, key.shape[1], -1, D), key, value, scale=scaling)
    return out.reshape(B, 1, Hq, D), None


hf_compat.register_attention(_PACKED, packed_attention, mask="sdpa")


@dataclass
class NewToken:
    """One token a sequence, the same in all layers: q [B, Hq, 1, D]; k, v [B, H, 1, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: Tokens


@dataclass
class Competitor:
    """A model and the cache that it decodes with.

    evicted: the share that its gates evict, and keep_LH: what each head keeps; None for a dense cache. decisions: of the
    tokens that were put into the cache by hand, [B, N, H] bool each, by layer.
    """

    policy: str
    model: nn.Module
    evicted: float | None = None
    keep_LH: torch.Tensor | None = None
    cache: Cache | None = None
    decisions: list[list[torch.Tensor]] = field(default_factory=list)

    def empty_cache(self, capacity: int) -> Cache:
        if self.policy == "dms":
            return DMSCache(self.model)
        if self.policy == "dynamic":
            return DynamicCache(config=self.model.config)
        return Cache(layers=[PreallocatedLayer(capacity) for _ in range(self.model.config.num_hidden_layers)])

    def decide(self, layer: int, shape_BNH: tuple[int, int, int], generator: torch.Generator) -> None:
        """Draw and note what becomes of the next tokens."""
        keep_H = self.keep_LH[layer].to(generator.device)
        self.decisions[layer].append(torch.rand(shape_BNH, generator=generator, device=generator.device) >= keep_H)

    def attend(self, layer: int, new: NewToken, decision: torch.Tensor | None) -> torch.Tensor:
        """One token a sequence into one layer's cache, and its attention: [B, 1, Hq, D]."""
        held, scale = self.cache.layers[layer], new.q.shape[-1] ** -0.5
        if self.keep_LH is None:
            keys, values = held.update(new.k, new.v)
            function = hf_compat.attention_function(hf_compat.attention_name(self.model.config))
            return function(self.model.model.layers[layer].self_attn, new.q, keys, values, None, scaling=scale)[0]
        held.decide(decision, new.tokens)
        held.update(new.k, new.v)
        return held.attend(new.q, scale=scale, softcap=None, sink_logits=None)


def competitors(model: nn.Module, shape: Shape, evicted: tuple[float, ...], seed: int) -> list[Competitor]:
    """Two dense ones, and one for each share; all over the same weights."""
    packed = share_weights(model)
    hf_compat.set_attention(packed.config, _PACKED)
    found = [Competitor("dynamic", model), Competitor("preallocated", packed)]
    for share in evicted:
        keep_LH = keep_shares(shape.layers, shape.kv_heads, share, seed)
        gated = with_gates(model, shape, keep_LH, seed)
        gated.dms.page_size = shape.page_size
        found.append(Competitor("dms", gated, share, keep_LH))
    return found


@torch.no_grad()
def fill(found: list[Competitor], shape: Shape, batch: int, context: int, capacity: int, generator: torch.Generator) -> None:
    """Give each a cache with `context` random keys and values in every layer, and decisions by its heads' shares."""
    for one in found:
        one.cache, one.decisions = one.empty_cache(capacity), [[] for _ in range(shape.layers)]
    dynamic, preallocated, *compacted = found
    for layer in range(shape.layers):
        for start in range(0, context, _PIECE):
            num_new = min(_PIECE, context - start)
            k, v = _random((2, batch, shape.kv_heads, num_new, shape.head_dim), generator)
            preallocated.cache.layers[layer].update(k, v)
            for one in compacted:
                one.decide(layer, (batch, num_new, shape.kv_heads), generator)
                one.cache.layers[layer].extend(k, v, one.decisions[layer][-1], _tokens(batch, start, num_new, k.device))
        held = preallocated.cache.layers[layer]
        dynamic.cache.layers[layer].update(held.keys, held.values)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _tokens(batch: int, start: int, num_new: int, device: torch.device) -> Tokens:
    position = torch.arange(start, start + num_new, dtype=torch.int32, device=device).expand(batch, -1)
    return Tokens(torch.ones_like(position), position)


def new_tokens(found: list[Competitor], shape: Shape, batch: int, count: int, generator: torch.Generator) -> list[NewToken]:
    """The next tokens to put into every cache, and what each competitor decides of them."""
    tokens, length = [], found[0].cache.get_seq_length()
    for n in range(count):
        q = _random((batch, shape.query_heads, 1, shape.head_dim), generator)
        k, v = _random((2, batch, shape.kv_heads, 1, shape.head_dim), generator)
        tokens.append(NewToken(q, k, v, _tokens(batch, length + n, 1, q.device)))
        for one in found:
            for layer in range(shape.layers if one.keep_LH is not None else 0):
                one.decide(layer, (batch, 1, shape.kv_heads), generator)
    return tokens


@torch.no_grad()
def check_equal(found: list[Competitor], shape: Shape, batch: int, generator: torch.Generator, tolerance: float = 1e-5) -> None:
    """One more token through every cache: each must answer as SDPA over all entries with the evicted ones masked.

    Raises:
        RuntimeError: one answers otherwise.
    """
    (token,) = new_tokens(found, shape, batch, 1, generator)
    reference = found[1]
    for layer in range(shape.layers):
        for one in (reference, *(one for one in found if one is not reference)):
            out = one.attend(layer, token, one.decisions[layer][-1] if one.decisions[layer] else None)
            held = reference.cache.layers[layer]
            expected = _masked(token.q, held.keys, held.values, one.decisions[layer], shape.window)
            error = (out - expected).abs().max().item()
            # Not a number is no match either.
            if not error <= tolerance:
                raise RuntimeError(
                    f"{one.policy} differs from attention over the same entries by {error:.2g} in layer {layer}, more than {tolerance:g}; its times would mean nothing"
                )


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decisions: list[torch.Tensor], window: int) -> torch.Tensor:
    B, Hq, _, D = q.shape
    see = None
    if decisions:
        see = ~torch.cat(decisions, 1).transpose(1, 2)[:, :, None]
        see[..., -(window + 1) :] = True
    out = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, attn_mask=see)
    return out.reshape(B, 1, Hq, D)

"""The caches that are compared: the compacted one at given shares of eviction, and two dense ones, all filled with the same tokens.

Shapes: B batch, N new tokens, S all tokens, Hq query heads, H KV heads, G = Hq / H, D head dim, L layers, K windows.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dms import hf_compat, masks
from dms.benchmarks.model import RandomLlama, keep_by_window, keep_shares, share_weights, with_gates
from dms.cache import CompactedLayer, DMSCache
from dms.masks import Tokens
from dms.modes import state_of

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
        assert self.keys is not None
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
        return hf_compat.attention_function("sdpa")(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = F.scaled_dot_product_attention(query.view(B, key.shape[1], -1, D), key, value, scale=scaling)
    return out.reshape(B, 1, Hq, D), None


hf_compat.register_attention(_PACKED, packed_attention, mask="sdpa")


@dataclass
class NextToken:
    """One token a sequence, the same in all layers: q [B, Hq, 1, D]; k, v [B, H, 1, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: Tokens


@dataclass
class MeasuredCache:
    """A model, and the cache that it decodes with."""

    policy: str
    """"dms", or one of the dense ones: "dynamic", "preallocated"."""
    model: LlamaForCausalLM
    cache: Cache
    evicted: float | None = None
    """The share that its gates evict; None: it is dense."""
    keep_LHK: torch.Tensor | None = None
    """What each head keeps by each decision; None: it is dense."""
    decisions: list[list[torch.Tensor]] = field(default_factory=list)
    """By layer, of the tokens that were put into the cache by hand: [B, N, H] bool each, with several windows [B, N, H, K]."""

    @property
    def is_dense(self) -> bool:
        return self.keep_LHK is None

    @property
    def window(self) -> int | tuple[int, ...]:
        """Of one that is not dense."""
        return state_of(self.model).config.window

    def empty_cache(self, capacity: int) -> Cache:
        return _empty_cache(self.policy, self.model, capacity)

    def forget(self) -> None:
        """Let go of what it holds."""
        self.cache, self.decisions = self.empty_cache(0), []

    @property
    def ratio(self) -> float:
        """The compression of what it holds."""
        return ratio_of(self.cache)

    def dense_layer(self, layer: int) -> DynamicLayer:
        held = self.cache.layers[layer]
        assert isinstance(held, DynamicLayer)
        return held

    def entries(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a dense cache [B, H, S, D]."""
        held = self.dense_layer(layer)
        assert held.keys is not None and held.values is not None
        return held.keys, held.values

    def compacted_layer(self, layer: int) -> CompactedLayer:
        held = self.cache.layers[layer]
        assert isinstance(held, CompactedLayer)
        return held

    def decide(self, layer: int, shape_BNH: tuple[int, int, int], generator: torch.Generator) -> None:
        """Draw and note what becomes of the next tokens."""
        assert self.keep_LHK is not None
        drawn = torch.rand(shape_BNH, generator=generator, device=generator.device)
        evicted = drawn[..., None] >= self.keep_LHK[layer].to(generator.device)
        self.decisions[layer].append(evicted[..., 0] if isinstance(self.window, int) else evicted)

    def attend(self, layer: int, new: NextToken, decision: torch.Tensor | None) -> torch.Tensor:
        """One token a sequence into one layer's cache, and its attention: [B, 1, Hq, D]."""
        scale = new.q.shape[-1] ** -0.5
        if decision is None:
            keys, values = self.dense_layer(layer).update(new.k, new.v)
            function = hf_compat.attention_function(hf_compat.attention_name(self.model.config))
            return function(self.model.model.layers[layer].self_attn, new.q, keys, values, None, scaling=scale)[0]
        held = self.compacted_layer(layer)
        held.decide(decision, new.tokens)
        held.update(new.k, new.v)
        return held.attend(new.q, scale=scale, softcap=None, sink_logits=None)


def ratio_of(cache: Cache) -> float:
    return cache.report().cr if isinstance(cache, DMSCache) else 1.0


def _empty_cache(policy: str, model: LlamaForCausalLM, capacity: int) -> Cache:
    if policy == "dms":
        return DMSCache(model)
    if policy == "dynamic":
        return DynamicCache(config=model.config)
    return Cache(layers=[PreallocatedLayer(capacity) for _ in range(model.config.num_hidden_layers)])


def measured_caches(
    model: LlamaForCausalLM, shape: RandomLlama, windows: tuple[int | tuple[int, ...], ...], evicted: tuple[float, ...], seed: int
) -> list[MeasuredCache]:
    """Two dense ones, and one for each share and each of `windows`; all empty, and over the same weights."""
    packed = share_weights(model)
    hf_compat.set_attention(packed.config, _PACKED)
    found = [MeasuredCache(policy, one, _empty_cache(policy, one, 0)) for policy, one in (("dynamic", model), ("preallocated", packed))]
    for share in evicted:
        keep_LH = keep_shares(shape.layers, shape.kv_heads, share, seed)
        for window in windows:
            gated = with_gates(model, window, keep_LH, seed)
            state_of(gated).page_size = shape.page_size
            keep_LHK = keep_by_window(keep_LH, len(state_of(gated).config.windows))
            found.append(MeasuredCache("dms", gated, DMSCache(gated), share, keep_LHK))
    return found


@torch.no_grad()
def fill(found: list[MeasuredCache], shape: RandomLlama, batch: int, context: int, capacity: int, generator: torch.Generator) -> None:
    """Give each a cache with `context` random keys and values in every layer, and decisions by its heads' shares."""
    for one in found:
        one.cache, one.decisions = one.empty_cache(capacity), [[] for _ in range(shape.layers)]
    dynamic, preallocated, *compacted = found
    for layer in range(shape.layers):
        for start in range(0, context, _PIECE):
            num_new = min(_PIECE, context - start)
            k, v = _random((2, batch, shape.kv_heads, num_new, shape.head_dim), generator)
            preallocated.dense_layer(layer).update(k, v)
            for one in compacted:
                one.decide(layer, (batch, num_new, shape.kv_heads), generator)
                one.compacted_layer(layer).extend(k, v, one.decisions[layer][-1], _tokens(batch, start, num_new, k.device))
        dynamic.dense_layer(layer).update(*preallocated.entries(layer))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _tokens(batch: int, start: int, num_new: int, device: torch.device) -> Tokens:
    position = torch.arange(start, start + num_new, dtype=torch.int32, device=device).expand(batch, -1)
    return Tokens(torch.ones_like(position), position)


def new_tokens(found: list[MeasuredCache], shape: RandomLlama, batch: int, count: int, generator: torch.Generator) -> list[NextToken]:
    """The next tokens to put into every cache, and what each competitor decides of them."""
    tokens: list[NextToken] = []
    length = found[0].cache.get_seq_length()
    for n in range(count):
        q = _random((batch, shape.query_heads, 1, shape.head_dim), generator)
        k, v = _random((2, batch, shape.kv_heads, 1, shape.head_dim), generator)
        tokens.append(NextToken(q, k, v, _tokens(batch, length + n, 1, q.device)))
        for one in found:
            for layer in range(0 if one.is_dense else shape.layers):
                one.decide(layer, (batch, 1, shape.kv_heads), generator)
    return tokens


@torch.no_grad()
def check_equal(found: list[MeasuredCache], shape: RandomLlama, batch: int, generator: torch.Generator, tolerance: float = 1e-5) -> None:
    """One more token through every cache: each must answer as SDPA over all entries with the evicted ones masked.

    Raises:
        RuntimeError: one answers otherwise.
    """
    (token,) = new_tokens(found, shape, batch, 1, generator)
    reference = found[1]
    for layer in range(shape.layers):
        for one in (reference, *(one for one in found if one is not reference)):
            out = one.attend(layer, token, one.decisions[layer][-1] if one.decisions[layer] else None)
            expected = _masked(token.q, *reference.entries(layer), one.decisions[layer], 0 if one.is_dense else one.window)
            error = (out - expected).abs().max().item()
            # Not a number is no match either.
            if not error <= tolerance:
                raise RuntimeError(
                    f"{one.policy} differs from attention over the same entries by {error:.2g} in layer {layer}, more than {tolerance:g}; its times would mean nothing"
                )


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decisions: list[torch.Tensor], window: int | tuple[int, ...]
) -> torch.Tensor:
    B, Hq, _, D = q.shape
    see = None
    if decisions:
        see = masks.alive(_tokens(B, 0, k.shape[2], k.device), torch.cat(decisions, 1), window=window, sinks=0).transpose(1, 2)[:, :, None]
    out = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, attn_mask=see)
    return out.reshape(B, 1, Hq, D)

"""Attention in gated layers: what transformers calls, the hard decisions of evict mode, and the attention that follows from them.

A gated layer's decision waits on its module, as the attention function to call (`dms_pending`), from the hook before the layer until
transformers calls the attention interface.

Shapes: B batch, T query tokens, S keys, Hq query heads, H KV heads, G = Hq / H, D head dim, M model dim, C queries of a chunk.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from dms import hf_compat, masks
from dms.cache import CompactedLayer, DMSCache, compact_layers
from dms.cache.layer import MaskedLayer
from dms.cache.pending import PendingGate
from dms.gates import AnyGate, Gate
from dms.layer_discovery import AttentionLayer
from dms.masks import Tokens
from dms.modes import AttentionFunction, DMSState, ForwardPass, state_of

# Scores of one chunk of queries are the largest temporary of the masked reference.
_CHUNK_BYTES = 64 * 2**20


# Exported folders bring their own code of this into the same process.
OF_THIS_CODE = "" if __package__ == "dms" else f"_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"


def register(original: str, all_gated: bool) -> str:
    """Register our attention over `original` ("eager", "sdpa", ...) and return its name.

    Layers without a gate call `original` with its own mask. Where every layer is gated no mask is built at all.
    """
    name = f"dms_over_{original}" + ("" if all_gated else "_mixed") + OF_THIS_CODE

    def attention(module: Any, query, key, value, attention_mask, **kwargs):
        pending = take_decision(module)
        if pending is None:
            # Eager attention is a function of each modelling file, not an entry of the table.
            function = hf_compat.eager_attention(module) if original == "eager" else hf_compat.attention_function(original)
            return function(module, query, key, value, attention_mask, **kwargs)
        # Some layers take another view of it.
        return pending(query, key, value, **kwargs).contiguous(), None

    hf_compat.register_attention(name, attention, mask=None if all_gated else original)
    return name


# In the place of a decision that attention has taken.
_TAKEN = object()


def take_decision(module: Any) -> AttentionFunction | None:
    """The attention function that waits on an attention layer, once; None where the layer has no gate, or gates are off.

    Raises:
        RuntimeError: the layer's attention was called twice for one decision.
    """
    pending = getattr(module, "dms_pending", None)
    if pending is _TAKEN:
        raise RuntimeError(
            f"{type(module).__name__} (layer {module.layer_idx}) called attention more than once in a pass, and its gate decided once: the other "
            "calls would not evict; such a model cannot be retrofitted"
        )
    if pending is not None:
        module.dms_pending = _TAKEN
    return pending


def release_decision(module: Any) -> bool:
    """After a layer's pass: whether attention has taken its decision, or there was none."""
    pending, module.dms_pending = getattr(module, "dms_pending", None), None
    return pending is None or pending is _TAKEN


@dataclass(frozen=True)
class EvictPass(ForwardPass):
    """One pass in evict mode. The dictionaries collect by layer index, where there is no compacted cache."""

    evicted: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, T, H] bool, aligned: which tokens are evicted."""
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, T, H] evict logits, without a cache alone."""
    read: list[tuple[CompactedLayer, Cache]] = field(default_factory=list)
    """Layers of a cache that other layers' queries come to as well, and their cache: they store their tokens at the end of the pass."""

    @classmethod
    def begin(cls, state: DMSState, tokens: Tokens, *, has_cache: bool) -> EvictPass:
        return cls("evict", tokens, has_cache=has_cache)

    def decide(
        self, state: DMSState, layer: AttentionLayer, gate: AnyGate, hidden_BTM: torch.Tensor, cache: Cache | None
    ) -> AttentionFunction:
        """Raises RuntimeError where the model keeps the cache that it was given from its attention layers."""
        if cache is None and self.has_cache:
            raise RuntimeError(
                f"{layer.name} ({type(layer.module).__name__}) was called without the cache that the model was given: what its gate evicts would "
                "be kept there or lost; such a model cannot be retrofitted"
            )
        config, tokens = state.config, self.tokens.to(hidden_BTM.device)
        masked = functools.partial(evict_attention, query_tokens=tokens, window=config.window, sinks=config.sinks)
        if cache is None:
            logits = self.logits[layer.index] = _evict_logits(gate, hidden_BTM, state.evict_bias)
            evicted = self.evicted[layer.index] = masks.align(logits > 0, tokens.segment_BT, config.alignment, False)
            if state.masked_attention is not None:
                masked = functools.partial(state.masked_attention, **masked.keywords)
            return functools.partial(masked, evicted_BSH=evicted, key_tokens=tokens)
        held: Any = cache.layers[layer.index] if layer.index < len(cache.layers) else None
        if not isinstance(held, MaskedLayer | CompactedLayer):
            compact_layers(cache, state)
            held = cache.layers[layer.index]
        # The append kernel can run a linear gate by itself. Not where hooks must see its call, and ZeRO-3's bring its weights.
        runs = isinstance(held, CompactedLayer) and not hf_compat.has_forward_hooks(gate) and held.runs_gate(hidden_BTM.shape[1])
        if runs and isinstance(gate, Gate):
            held.decide(PendingGate(gate, hidden_BTM, state.evict_bias), tokens)
        else:
            held.decide(_evict_logits(gate, hidden_BTM, state.evict_bias) > 0, tokens)
        if isinstance(held, MaskedLayer):
            evicted = self.evicted[layer.index] = held.evicted()
            return functools.partial(masked, evicted_BSH=evicted, key_tokens=held.tokens)
        followed = layer.index in state.followed
        if followed:
            self.read.append((held, cache))
        return functools.partial(compacted_attention, held=held, cache=cache, masked=masked, followed=followed)

    def end(self) -> None:
        while self.read:
            held, cache = self.read.pop()
            with _undone_on_failure(cache), torch.no_grad():
                held.end_reading()


@contextmanager
def _undone_on_failure(cache: Cache) -> Iterator[None]:
    """A pass that fails leaves a DMSCache as it was, where it is bounded."""
    try:
        yield
    except BaseException:
        if isinstance(cache, DMSCache):
            cache.undo_forward()
        raise


def evict_pass(model: nn.Module) -> EvictPass:
    """The latest pass of a model in evict mode, with what its gates decided."""
    forward = state_of(model).forward
    assert isinstance(forward, EvictPass), "the latest pass was in evict mode"
    return forward


def _evict_logits(gate: AnyGate, hidden_BTM: torch.Tensor, bias: float) -> torch.Tensor:
    logits = gate(hidden_BTM)
    return logits + bias if bias else logits


class _Inference(torch.autograd.Function):
    """Hands a result on, and refuses a gradient of it."""

    @staticmethod
    def forward(ctx, out, query):
        return out

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("evict mode with a cache is for inference and has no gradient; call the model with use_cache=False")


def compacted_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    held: CompactedLayer,
    cache: Cache,
    masked: AttentionFunction,
    followed: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """Hard decisions over a compacted cache layer. key, value: the new tokens', which the layer has by now.

    masked: `evict_attention` with the pass's tokens, window and sinks. followed: queries of other layers come to the same tokens, until
    the pass ends.
    """
    with _undone_on_failure(cache), torch.no_grad():
        new = held.pending
        if new is None:
            raise RuntimeError(f"a {type(held).__name__} was asked for attention before the pass's keys and values were put into it")
        if new.is_packed:
            # Of a sequence's documents the cache keeps the last one; the others are read here and then gone.
            evicted = masks.align(new.decision, new.tokens.segment_BT, held.dms.alignment, False)
            out = masked(query, key, value, evicted_BSH=evicted, key_tokens=new.tokens, scaling=scaling, softcap=softcap, s_aux=s_aux)
        else:
            # Under autocast the projections were cast; scores and sums stay float32.
            with torch.autocast(query.device.type, enabled=False):
                out = held.attend(query, scale=scale_of(scaling, query), softcap=softcap, sink_logits=s_aux, ends=False)
        if not followed:
            held.end_reading()
    return _Inference.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out


def evict_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    evicted_BSH: torch.Tensor,
    query_tokens: Tokens,
    key_tokens: Tokens,
    window: int | tuple[int, ...],
    sinks: int,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """Hard decisions, masked: the reference that caches and kernels are compared with.

    query [B, Hq, T, D], key and value [B, H, S, D] -> [B, T, Hq, D]; queries of padding give 0. query_tokens: their last T are the
    queries'. scaling, softcap, s_aux: as transformers' attention interface gives them.
    """
    B, Hq, T, D = query.shape
    query_tokens = query_tokens.map(lambda x: x[:, x.shape[1] - T :])
    H, S = key.shape[1], key.shape[2]
    G = Hq // H
    scale = scale_of(scaling, query)
    out = query.new_empty(B, T, Hq, value.shape[-1])
    chunk = max(1, _CHUNK_BYTES // (4 * B * Hq * S))
    for start in range(0, T, chunk):
        part = slice(start, min(T, start + chunk))
        asking = Tokens(query_tokens.segment_BT[:, part], query_tokens.position_BT[:, part])
        see = masks.visible(asking, key_tokens, evicted_BSH, window=window, sinks=sinks)
        q = query[:, :, part]
        if softcap is None and s_aux is None:
            # A query without keys (padding) sees key 0 and is zeroed after: softmax over nothing is NaN.
            any_key = see.any(-1, keepdim=True)
            mask = (see | (~any_key & (torch.arange(S, device=see.device) == 0))).repeat_interleave(G, 1)
            y = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale, enable_gqa=G > 1)
            y = y * any_key.repeat_interleave(G, 1)
        else:
            y = _explicit(q, key, value, see, G, scale, softcap, s_aux)
        out[:, part] = y.transpose(1, 2)
    return out


def _explicit(q_BqCD, k, v, see_BHCS, G: int, scale: float, softcap: float | None, s_aux: torch.Tensor | None):
    """Softmax written out, float32: with gemma2's capped scores or gpt_oss's sink logit in the denominator."""
    B, Hq, C, _ = q_BqCD.shape
    weights = attention_weights(q_BqCD, k, see_BHCS, G, scale, softcap, s_aux)
    return torch.einsum("bhgcs,bhsd->bhgcd", weights, v.float()).reshape(B, Hq, C, -1).to(q_BqCD.dtype)


def attention_weights(q_BqCD, k, see_BHCS, G: int, scale: float, softcap: float | None, s_aux: torch.Tensor | None) -> torch.Tensor:
    """[B, H, G, C, S] float32; 0 for a query that sees nothing."""
    B, Hq, C, D = q_BqCD.shape
    H = k.shape[1]
    scores = torch.einsum("bhgcd,bhsd->bhgcs", q_BqCD.reshape(B, H, G, C, D).float(), k.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see_BHCS[:, :, None], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    if s_aux is not None:
        sink = s_aux.float().reshape(1, H, G, 1, 1)
        top = torch.maximum(top, sink)
    top = torch.where(top.isinf(), 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + (sink - top).exp()
    return weights / total.clamp(min=torch.finfo(torch.float32).tiny)


def scale_of(scaling: float | None, query: torch.Tensor) -> float:
    """What scores are multiplied by."""
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)

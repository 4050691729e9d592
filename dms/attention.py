"""The attention function that transformers calls in gated layers, and the masked reference of evict mode.

Shapes: B batch, T query tokens, S keys, Hq query heads, H KV heads, G = Hq / H, D head dim, C queries of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dms import hf_compat, masks
from dms.cache import DMSCache
from dms.masks import Tokens
from dms_kernels import gated_attention

# Scores of one chunk of queries are the largest temporary of the masked reference.
_CHUNK_BYTES = 64 * 2**20


def register(original: str, all_gated: bool) -> str:
    """Register our attention over `original` ("eager", "sdpa", ...) and return its name.

    Layers without a gate call `original` with its own mask. Where every layer is gated no mask is built at all.
    """
    name = f"dms_over_{original}" + ("" if all_gated else "_mixed")

    def attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
        pending = take_decision(module)
        if pending is None:
            # Eager attention is a function of each modelling file, not an entry of the table.
            function = hf_compat.eager_attention(module) if original == "eager" else hf_compat.attention_function(original)
            return function(module, query, key, value, attention_mask, **kwargs)
        return pending(query, key, value, **kwargs), None

    hf_compat.register_attention(name, attention, mask=None if all_gated else original)
    return name


# What stands in the place of a decision that attention has taken.
_TAKEN = object()


def take_decision(module: nn.Module):
    """What the gate of an attention layer left for its attention function, once; None where it has no gate, or gates are off.

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


def release_decision(module: nn.Module) -> bool:
    """After a layer's pass: whether attention has taken its decision, or there was none."""
    pending, module.dms_pending = getattr(module, "dms_pending", None), None
    return pending is None or pending is _TAKEN


def train_attention(
    query,
    key,
    value,
    *,
    log_keep_BTH,
    tokens: Tokens,
    window: int,
    sinks: int,
    first_pass=None,
    scaling=None,
    softcap=None,
    s_aux=None,
    **_,
):
    """Noisy soft masking of whole documents. query [B, Hq, T, D], key and value [B, H, T, D] -> [B, T, Hq, D]."""
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"train mode reads whole documents: {query.shape[2]} queries met {key.shape[2]} keys; call the model with use_cache=False"
        )
    return gated_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        log_keep_BTH,
        window=window,
        scale=_scale(scaling, query),
        segment_ids=tokens.segment_BT,
        sinks=sinks,
        softcap=softcap,
        sink_logits=s_aux,
        first_pass=first_pass,
    )


class _Inference(torch.autograd.Function):
    """Passes a result on and says, where a gradient is asked of it, that there is none."""

    @staticmethod
    def forward(ctx, out, query):
        return out

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("evict mode with a cache is for inference and has no gradient; call the model with use_cache=False")


def compacted_attention(query, key, value, *, held, cache, masked, scaling=None, softcap=None, s_aux=None, **_):
    """Hard decisions over a compacted cache layer. key, value: the new tokens', which the layer has by now."""
    try:
        with torch.no_grad():
            if held.pending is None:
                raise RuntimeError(f"a layer of {type(held).__name__} was to attend, and no keys and values of the pass were put into it")
            if query.shape[2] > 1 and held.pending.is_packed():
                # Of several documents in a row the last one goes on; the others are read here and then gone.
                new = held.pending
                evicted = masks.align(new.decision, new.tokens.segment_BT, held.dms.alignment, False)
                out = masked(query, key, value, evicted_BSH=evicted, key_tokens=new.tokens, scaling=scaling, softcap=softcap, s_aux=s_aux)
                held.keep_last_documents()
            else:
                # Under autocast the projections were cast; scores and sums stay float32.
                with torch.autocast(query.device.type, enabled=False):
                    out = held.attend(query, scale=_scale(scaling, query), softcap=softcap, sink_logits=s_aux)
    except BaseException:
        if isinstance(cache, DMSCache):
            cache.undo_forward()
        raise
    return _Inference.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out


def evict_attention(
    query,
    key,
    value,
    *,
    evicted_BSH,
    query_tokens: Tokens,
    key_tokens: Tokens,
    window: int,
    sinks: int,
    scaling=None,
    softcap=None,
    s_aux=None,
    **_,
):
    """Hard decisions, masked: the oracle that caches and kernels are held to. Shapes as `train_attention`, with S keys.

    Rows of padding give 0.
    """
    B, Hq, T, D = query.shape
    H, S = key.shape[1], key.shape[2]
    G = Hq // H
    scale = _scale(scaling, query)
    out = query.new_empty(B, T, Hq, value.shape[-1])
    chunk = max(1, _CHUNK_BYTES // (4 * B * Hq * S))
    for start in range(0, T, chunk):
        part = slice(start, min(T, start + chunk))
        see = masks.visible(query_tokens.map(lambda x, part=part: x[:, part]), key_tokens, evicted_BSH, window=window, sinks=sinks)
        q = query[:, :, part]
        if softcap is None and s_aux is None:
            # A row without keys (padding) sees key 0 and is zeroed after: softmax over nothing is NaN.
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
    weights = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.einsum("bhgcs,bhsd->bhgcd", weights, v.float()).reshape(B, Hq, C, -1).to(q_BqCD.dtype)


def _scale(scaling, query) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)

"""Find what gates attach to in any Hugging Face decoder: its full-attention layers, without a modelling file per family."""

import re
from dataclasses import dataclass

from torch import nn

from dms import hf_compat
from dms.probe import LayerCalls, probe

# Norms that stand before attention are named input_layernorm, ln_1, self_attn_layer_norm, operator_norm ...; these are not.
_NOT_BEFORE_ATTENTION = re.compile(r"post|ffn|feedforward|feed_forward|mlp|final|ln_2|norm2|q_norm|k_norm")


@dataclass(frozen=True)
class AttentionLayer:
    """A layer that can carry a gate. `normalized_input`: its decoder layer normalises what attention reads."""

    index: int
    name: str
    module: nn.Module
    num_heads: int
    num_query_heads: int
    normalized_input: bool


@dataclass(frozen=True)
class DecoderLayers:
    """`decoder` owns the layers; `gated` in order; `skipped` maps a layer's name to why it is left alone."""

    decoder: nn.Module
    gated: list[AttentionLayer]
    skipped: dict[str, str]


def find_layers(model: nn.Module) -> DecoderLayers:
    """Look through the model for its decoder's attention layers.

    Raises:
        ValueError: a model that gates cannot be attached to, by name and with the reason.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"{name} cannot be retrofitted: {reason}; what works is a Hugging Face decoder whose layers call transformers' attention interface"
        )

    if config is None or not hasattr(config, "get_text_config"):
        raise refuse("it is not a transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder")
    text = config.get_text_config()
    found = [(path, module) for path, module in model.named_modules() if _is_decoder_attention(module, text)]
    if not found:
        raise refuse("no attention layer with a layer_idx was found in its decoder")
    modules = dict(model.named_modules())
    probed = probe(model)
    gated, skipped = [], {}
    if probed and all(calls.cached_heads is None for calls in probed.values()):
        raise refuse("it keeps no keys and values from one pass to the next (an encoder, or is_decoder is not set)")
    for path, module in found:
        reason = _bounded_cache(module, text)
        if reason:
            skipped[path] = reason
            continue
        calls = _from_attributes(module, text) if probed is None else probed.get(path)
        if reason := _why_no_gate(path, module, calls):
            raise refuse(reason)
        block = modules[path.rsplit(".", 1)[0]]
        layer = AttentionLayer(int(module.layer_idx), path, module, calls.num_heads, calls.num_query_heads, _normalizes_input(block))
        gated.append(layer)
    num_other = int(text.num_hidden_layers) - len(found)
    if num_other > 0:
        skipped[f"{num_other} other layers"] = "no softmax attention (linear attention, state space or convolution)"
    if not gated:
        raise refuse("no layer has full attention, and a cache that grows without bound (" + "; ".join(sorted(set(skipped.values()))) + ")")
    indices = [layer.index for layer in gated]
    if twice := next((layer for layer in gated if indices.count(layer.index) > 1), None):
        raise refuse(f"{sum(i == twice.index for i in indices)} attention modules have layer_idx {twice.index}, such as {twice.name}")
    layers_path = re.sub(r"\.\d+\..*$", "", gated[0].name)
    decoder = modules[layers_path.rsplit(".", 1)[0]] if "." in layers_path else model
    return DecoderLayers(decoder, gated, skipped)


def _is_decoder_attention(module: nn.Module, text) -> bool:
    if not type(module).__name__.endswith("Attention") or getattr(module, "layer_idx", None) is None:
        return False
    own = getattr(module, "config", text)
    # Vision and audio towers of multi-modal models have attention layers of their own.
    return own is text or type(own) is type(text)


def _from_attributes(module: nn.Module, text) -> LayerCalls | None:
    """What `probe` would have found, by what modelling files call things; None where the layer computes attention by itself."""
    if not hf_compat.calls_attention_interface(module):
        return None
    heads = int(text.num_attention_heads)
    # The attention interface repeats KV heads by this number; a layer without it has one KV head per query head.
    kv_heads = heads // int(getattr(module, "num_key_value_groups", 1))
    head_dim = int(getattr(module, "head_dim", 0) or text.hidden_size // heads)
    key_dim = int(getattr(module, "qk_head_dim", head_dim))
    return LayerCalls(1, heads, kv_heads, key_dim, int(getattr(module, "v_head_dim", key_dim)), kv_heads)


def _why_no_gate(path: str, module: nn.Module, calls: LayerCalls | None) -> str | None:
    """Why a full-attention layer cannot have a gate, or None."""
    named = f"{path} ({type(module).__name__})"
    if calls is None:
        return f"{named} computes attention by itself"
    if calls.num_calls != 1:
        return f"{named} calls attention {calls.num_calls} times in a pass, and its gate decides once"
    if calls.cached_heads is None:
        return f"{named} has no keys and values of its own in the cache: it reads another layer's, which that layer's gate would evict"
    if calls.key_dim != calls.value_dim:
        return (
            f"{named} has keys of {calls.key_dim} numbers and values of {calls.value_dim}, and a page of the cache holds both at one width"
        )
    if calls.cached_heads != calls.num_heads:
        return f"{named} caches {calls.cached_heads} KV heads and attends to {calls.num_heads}"
    if calls.num_query_heads % calls.num_heads:
        return f"{named} has {calls.num_query_heads} query heads, which {calls.num_heads} KV heads do not divide"
    return None


def _bounded_cache(module: nn.Module, text) -> str | None:
    """Why this layer's cache is bounded already, or None for full attention."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types:
        kind = layer_types[module.layer_idx]
        return None if kind in ("full_attention", "attention") else kind.replace("_", " ")
    sliding = getattr(module, "sliding_window", None) or (
        getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    )
    return f"sliding attention of {sliding} tokens" if sliding else None


def _normalizes_input(block: nn.Module) -> bool:
    norms = [name for name, child in block.named_children() if "norm" in type(child).__name__.lower()]
    return any(not _NOT_BEFORE_ATTENTION.search(name) for name in norms)

"""Find what gates attach to in any Hugging Face decoder: its full-attention layers, without a modelling file per family."""

import re
from dataclasses import dataclass

from torch import nn

from dms import hf_compat

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
    gated, skipped = [], {}
    for path, module in found:
        reason = _bounded_cache(module, text)
        if reason:
            skipped[path] = reason
            continue
        if not hf_compat.calls_attention_interface(module):
            raise refuse(f"{path} ({type(module).__name__}) computes attention by itself")
        key_dim, value_dim = getattr(module, "qk_head_dim", None), getattr(module, "v_head_dim", None)
        if key_dim is not None and value_dim is not None and key_dim != value_dim:
            raise refuse(
                f"{path} has keys of {key_dim} numbers and values of {value_dim} (latent attention), and its cache is compressed already"
            )
        heads = int(text.num_attention_heads)
        # The attention interface repeats KV heads by this number; a layer without it has one KV head per query head.
        kv_heads = heads // int(getattr(module, "num_key_value_groups", 1))
        block = modules[path.rsplit(".", 1)[0]]
        gated.append(AttentionLayer(int(module.layer_idx), path, module, kv_heads, heads, _normalizes_input(block)))
    num_other = int(text.num_hidden_layers) - len(found)
    if num_other > 0:
        skipped[f"{num_other} other layers"] = "no softmax attention (linear attention, state space or convolution)"
    if not gated:
        raise refuse("every layer keeps a bounded cache already (" + "; ".join(sorted(set(skipped.values()))) + ")")
    layers_path = re.sub(r"\.\d+\..*$", "", gated[0].name)
    decoder = modules[layers_path.rsplit(".", 1)[0]] if "." in layers_path else model
    return DecoderLayers(decoder, gated, skipped)


def _is_decoder_attention(module: nn.Module, text) -> bool:
    if not type(module).__name__.endswith("Attention") or getattr(module, "layer_idx", None) is None:
        return False
    own = getattr(module, "config", text)
    # Vision and audio towers of multi-modal models have attention layers of their own.
    return own is text or type(own) is type(text)


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

"""Find what gates attach to in any Hugging Face decoder: its full-attention layers, without a modelling file per family."""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms import hf_compat
from dms.gates import Gate

_PROBE = "dms_probe"


@dataclass(frozen=True)
class LayerCalls:
    """What one attention layer did in one pass. The numbers are those of its first call of the attention interface."""

    num_calls: int
    num_query_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    cached_heads: int | None
    """KV heads that it wrote to its own layer of the cache; None: it has none there."""
    source: str | None = None
    """The layer, called before, whose keys and values it attends to; None: its own."""


def probe(model: Any) -> dict[str, LayerCalls] | None:
    """Run a copy of the model on fake tensors, and return the layers that called transformers' attention interface, by module name.

    None where the modelling file does not run on fake tensors. Takes milliseconds for each layer, whatever the model's size.
    """
    first_calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    times: Counter[nn.Module] = Counter()

    def note(module: nn.Module, query, key, value, attention_mask, **kwargs):
        times[module] += 1
        first_calls.setdefault(module, (query, key, value))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    hf_compat.register_attention(_PROBE, note)
    dtype = torch.get_default_dtype()
    try:
        # On fake tensors, products of experts run in bfloat16 alone.
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.no_grad(), hf_compat.unchecked_distributions():
            twin = type(model)(copy.deepcopy(model.config)).eval()
            twin.set_attn_implementation(_PROBE)
            # Some models would look for padding in the tokens, which have no values here.
            for module in twin.modules():
                module.warn_if_padding_and_no_attention_mask = lambda *_: None
            cache = hf_compat.output_cache(twin(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True))
    except Exception:  # noqa: BLE001 - modelling files fail in their own ways where they ask tensors for values
        return None
    finally:
        torch.set_default_dtype(dtype)
    names = {module: name for name, module in twin.named_modules()}
    found: dict[str, LayerCalls] = {}
    owners: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for module, (query, key, value) in first_calls.items():
        # A layer that attends to another's keys and values is handed the same tensors.
        source = next((owner for owner, k, v in owners if k is key and v is value), None)
        if source is None:
            owners.append((names[module], key, value))
        sizes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        found[names[module]] = LayerCalls(times[module], *sizes, _cached_heads(cache, module), source)
    return found


def _cached_heads(cache: Cache | None, module: nn.Module) -> int | None:
    layers = getattr(cache, "layers", ())
    index = getattr(module, "layer_idx", None)
    keys = getattr(layers[index], "keys", None) if index is not None and index < len(layers) else None
    return None if keys is None or keys.dim() != 4 else keys.shape[1]


# Norms that stand before attention are named input_layernorm, ln_1, self_attn_layer_norm, operator_norm ...; these are not.
_NOT_BEFORE_ATTENTION = re.compile(r"post|ffn|feedforward|feed_forward|mlp|final|ln_2|norm2|q_norm|k_norm")


@dataclass(frozen=True)
class AttentionLayer:
    """A layer that can carry a gate."""

    index: int
    """Its `layer_idx`: its place in a cache."""
    name: str
    """Of the module within the model."""
    module: nn.Module
    num_heads: int
    """KV heads."""
    num_query_heads: int
    normalized_input: bool
    """Its decoder layer normalises what attention reads."""

    @property
    def gate(self) -> Gate:
        """Its gate, in a model that was retrofitted."""
        gate = self.module.get_submodule("dms_gate")
        assert isinstance(gate, Gate)
        return gate


@dataclass(frozen=True)
class FollowingLayer:
    """A layer without keys and values of its own: it attends to another one's, by the decisions of that one's gate."""

    index: int
    """Its `layer_idx`."""
    name: str
    """Of the module within the model."""
    module: nn.Module
    source: int
    """`layer_idx` of the layer whose keys and values it attends to, which has a gate."""


@dataclass(frozen=True)
class DecoderLayers:
    """What `find_layers` found."""

    decoder: nn.Module
    """The module that owns the layers."""
    gated: list[AttentionLayer]
    """Those that can carry gates, in order."""
    following: list[FollowingLayer]
    """Those that attend to the keys and values of a layer with a gate, in order."""
    skipped: dict[str, str]
    """Why the others have no gate, by name; the following ones among them."""


def find_layers(model: Any) -> DecoderLayers:
    """Look through the model for its decoder's attention layers.

    Raises:
        ValueError: a model that gates cannot be attached to, by name and with the reason.
    """
    try:
        return _find_layers(model)
    except _NoDecoder as reason:
        raise ValueError(
            f"{type(model).__name__} cannot be retrofitted: {reason}; what works is a Hugging Face decoder whose layers call transformers' "
            "attention interface"
        ) from None


class _NoDecoder(Exception):
    """Why a model cannot have gates."""


def _find_layers(model: Any) -> DecoderLayers:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise _NoDecoder("it is not a transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise _NoDecoder("it is an encoder-decoder")
    text = config.get_text_config()
    found = {path: module for path, module in model.named_modules() if _is_decoder_attention(module, text)}
    if not found:
        raise _NoDecoder("no attention layer with a layer_idx was found in its decoder")
    probed = probe(model)
    if probed and all(calls.cached_heads is None for calls in probed.values()):
        raise _NoDecoder("it keeps no keys and values from one pass to the next (an encoder, or is_decoder is not set)")

    modules = dict(model.named_modules())
    gated: dict[str, AttentionLayer] = {}
    following: list[FollowingLayer] = []
    skipped: dict[str, str] = {}
    for path, module in found.items():
        calls = _from_attributes(module, text) if probed is None else probed.get(path)
        source = None if calls is None or calls.source is None else gated.get(calls.source)
        if bounded := _bounded_cache(module, text):
            if source is not None:
                raise _NoDecoder(
                    f"{path} ({type(module).__name__}, {bounded}) reads keys and values that the gate of {source.name} would evict"
                )
            skipped[path] = bounded
            continue
        if calls is None:
            raise _NoDecoder(f"{path} ({type(module).__name__}) computes attention by itself")
        if reason := _why_no_gate(calls, follows=source is not None):
            raise _NoDecoder(f"{path} ({type(module).__name__}) {reason}")
        if source is not None:
            following.append(FollowingLayer(int(module.layer_idx), path, module, source.index))
            skipped[path] = f"follows layer {source.index}: it reads that layer's keys and values, by the decisions of its gate"
            continue
        normalized = _normalizes_input(modules[path.rsplit(".", 1)[0]])
        gated[path] = AttentionLayer(int(module.layer_idx), path, module, calls.num_heads, calls.num_query_heads, normalized)
    num_other = int(text.num_hidden_layers) - len(found)
    if num_other > 0:
        skipped[f"{num_other} other layers"] = "no softmax attention (linear attention, state space or convolution)"

    if not gated:
        raise _NoDecoder(
            "no layer has full attention, and a cache that grows without bound (" + "; ".join(sorted(set(skipped.values()))) + ")"
        )
    layers: list[AttentionLayer | FollowingLayer] = [*gated.values(), *following]
    indices = [layer.index for layer in layers]
    if twice := next((layer for layer in layers if indices.count(layer.index) > 1), None):
        raise _NoDecoder(f"{indices.count(twice.index)} attention modules have layer_idx {twice.index}, such as {twice.name}")
    layers_path = re.sub(r"\.\d+\..*$", "", layers[0].name)
    decoder = modules[layers_path.rsplit(".", 1)[0]] if "." in layers_path else model
    return DecoderLayers(decoder, list(gated.values()), following, skipped)


def _is_decoder_attention(module: nn.Module, text: Any) -> bool:
    if not type(module).__name__.endswith("Attention") or getattr(module, "layer_idx", None) is None:
        return False
    own = getattr(module, "config", text)
    # Vision and audio towers of multi-modal models have attention layers of their own.
    return own is text or type(own) is type(text)


def _from_attributes(module: nn.Module, text: Any) -> LayerCalls | None:
    """What `probe` would have found, by what modelling files call things; None where the layer computes attention by itself."""
    if not hf_compat.calls_attention_interface(module):
        return None
    heads = int(text.num_attention_heads)
    # The attention interface repeats KV heads by this number; a layer without it has one KV head per query head.
    kv_heads = heads // int(getattr(module, "num_key_value_groups", 1))
    head_dim = int(getattr(module, "head_dim", 0) or text.hidden_size // heads)
    key_dim = int(getattr(module, "qk_head_dim", head_dim))
    cached_heads = None if getattr(module, "is_kv_shared_layer", False) else kv_heads
    return LayerCalls(1, heads, kv_heads, key_dim, int(getattr(module, "v_head_dim", key_dim)), cached_heads)


def _why_no_gate(calls: LayerCalls, follows: bool) -> str | None:
    """Why a full-attention layer cannot have a gate, or (follows) follow another's, or None."""
    if calls.num_calls != 1:
        return f"calls attention {calls.num_calls} times in a pass, and its gate decides once"
    if calls.cached_heads is None and not follows:
        return "has no keys and values of its own in the cache: it reads another layer's, which that layer's gate would evict"
    if calls.key_dim != calls.value_dim:
        return f"has keys of {calls.key_dim} numbers and values of {calls.value_dim}, and a page of the cache holds both at one width"
    if not follows and calls.cached_heads != calls.num_heads:
        return f"caches {calls.cached_heads} KV heads and attends to {calls.num_heads}"
    if calls.num_query_heads % calls.num_heads:
        return f"has {calls.num_query_heads} query heads, which {calls.num_heads} KV heads do not divide"
    return None


def _bounded_cache(module: Any, text: Any) -> str | None:
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

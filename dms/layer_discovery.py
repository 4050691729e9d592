"""Find what gates attach to in any Hugging Face decoder: its full-attention layers, without a modelling file per family."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dms import hf_compat
from dms.gates import AnyGate, BorrowedGate, Gate
from dms.layer_probe import ATTENTION, LayerCalls, NoDecoder, is_decoder_attention, own_attention, probe

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
    def gate(self) -> AnyGate:
        """Its gate, in a model that was retrofitted."""
        gate = self.module.get_submodule("dms_gate")
        assert isinstance(gate, (Gate, BorrowedGate))
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
    head_counts: list[tuple[int, int]]
    """Query and KV heads of the attention layers, gated or not, each pair once."""


def find_layers(model: Any) -> DecoderLayers:
    """Look through the model for its decoder's attention layers.

    Raises:
        ValueError: a model that gates cannot be attached to, by name and with the reason.
    """
    try:
        return _find_layers(model)
    except NoDecoder as reason:
        raise ValueError(
            f"{type(model).__name__} cannot be retrofitted: {reason}; what works is a Hugging Face decoder whose layers call transformers' "
            "attention interface"
        ) from None


NOT_CALLED = "not called for text alone (cross-attention)"
"""In `DecoderLayers.skipped`."""


def _find_layers(model: Any) -> DecoderLayers:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise NoDecoder("it is not a transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise NoDecoder("it is an encoder-decoder")
    text = config.get_text_config()
    found = {path: module for path, module in model.named_modules() if is_decoder_attention(module, text)}
    if not found:
        raise NoDecoder(_why_none_found(model))
    if all(kinds := [_bounded_cache(module, text) for module in found.values()]):
        raise NoDecoder(_nothing_to_evict(kinds))
    modules = dict(model.named_modules())
    decoder = _decoder_of(modules, next(iter(found)))
    probed = probe(model, decoder)
    if probed is not None and not probed.keys() & found.keys():
        # BigBird puts other layers in their place while it reads.
        raise NoDecoder(own_attention(found) or f"none of its attention layers, such as {next(iter(found))}, is called for text alone")
    if probed and all(calls is None or calls.cached_heads is None for calls in probed.values()) and any(probed.values()):
        raise NoDecoder(
            "it keeps no keys and values from one pass to the next (an encoder, or is_decoder is not set), or not where transformers does"
        )

    if hf_compat.attention_name(text) == "sdpa" and any(calls is not None and calls.caps for calls in (probed or {}).values()):
        raise NoDecoder(
            "its scores are capped, and transformers' sdpa attention leaves the cap out: load it with attn_implementation='eager'"
        )

    gated: dict[str, AttentionLayer] = {}
    following: list[FollowingLayer] = []
    skipped: dict[str, str] = {}
    head_counts: set[tuple[int, int]] = set()
    for path, module in found.items():
        if probed is not None and path not in probed:
            skipped[path] = NOT_CALLED
            continue
        calls = _from_attributes(module, text) if probed is None else probed[path]
        source = None if calls is None or calls.source is None else gated.get(calls.source)
        if calls is not None:
            head_counts.add((calls.num_query_heads, calls.num_heads))
        if bounded := _bounded_cache(module, text):
            if source is not None:
                raise NoDecoder(
                    f"{path} ({type(module).__name__}, {bounded}) reads keys and values that the gate of {source.name} would evict"
                )
            skipped[path] = bounded
            continue
        if calls is None:
            raise NoDecoder(f"{path} ({type(module).__name__}) computes attention by itself")
        if reason := _why_no_gate(calls, follows=source is not None):
            raise NoDecoder(f"{path} ({type(module).__name__}) {reason}")
        if source is not None:
            following.append(FollowingLayer(int(module.layer_idx), path, module, source.index))
            skipped[path] = f"follows layer {source.index}: it reads that layer's keys and values, by the decisions of its gate"
            continue
        normalized = _normalizes_input(modules[path.rsplit(".", 1)[0]])
        gated[path] = AttentionLayer(int(module.layer_idx), path, module, calls.num_heads, calls.num_query_heads, normalized)
    num_other = int(text.num_hidden_layers) - len({module.layer_idx for module in found.values()})
    if num_other > 0:
        skipped[f"{num_other} other layers"] = "no softmax attention (linear attention, state space or convolution)"

    if not gated:
        raise NoDecoder(_nothing_to_evict(skipped.values()))
    layers: list[AttentionLayer | FollowingLayer] = [*gated.values(), *following]
    indices = [layer.index for layer in layers]
    if twice := next((layer for layer in layers if indices.count(layer.index) > 1), None):
        raise NoDecoder(f"{indices.count(twice.index)} attention modules have layer_idx {twice.index}, such as {twice.name}")
    return DecoderLayers(modules[decoder], list(gated.values()), following, skipped, sorted(head_counts))


def _why_none_found(model: Any) -> str:
    """Why a decoder has no attention layers of the kind that is looked for."""
    others = ((path, module) for path, module in model.named_modules() if type(module).__name__.endswith(ATTENTION))
    path, module = next(others, ("", None))
    if module is None:
        return "its decoder has no attention layers"
    name = f"{path} ({type(module).__name__})"
    if getattr(module, "layer_idx", None) is not None:
        return f"its own decoder has no attention layers, and those such as {name} belong to models within it"
    if not hf_compat.calls_attention_interface(module):
        return f"{name} computes attention by itself"
    return f"{name} has no layer_idx, its place in a cache"


def _nothing_to_evict(kinds: Iterable[str | None]) -> str:
    return f"no layer has full attention of the kind whose cache a gate could evict from ({'; '.join(sorted({*filter(None, kinds)}))})"


def _decoder_of(modules: dict[str, nn.Module], layer: str) -> str:
    """The name of the module that owns the layers, from an attention layer's: the nearest around their list that reads tokens."""
    path = re.sub(r"\.\d+\..*$", "", layer)
    while path:
        path = path.rpartition(".")[0]
        if "input_ids" in inspect.signature(modules[path].forward).parameters:
            break
    return path


def _from_attributes(module: nn.Module, text: Any) -> LayerCalls | None:
    """What `probe` would have found, by what modelling files call things; None where the layer computes attention by itself."""
    if not hf_compat.calls_attention_interface(module):
        return None
    # Where layers differ the configuration has no number for all of them.
    heads = int(getattr(module, "num_heads", 0) or getattr(module, "num_attention_heads", 0) or text.num_attention_heads)
    # The attention interface repeats KV heads by this number; a layer without it has one KV head per query head.
    kv_heads = heads // int(getattr(module, "num_key_value_groups", 1) or 1)
    head_dim = int(getattr(module, "head_dim", 0) or text.hidden_size // heads)
    key_dim = int(getattr(module, "qk_head_dim", head_dim))
    cached = (None, None) if getattr(module, "is_kv_shared_layer", False) else (kv_heads, key_dim)
    return LayerCalls(1, heads, kv_heads, key_dim, int(getattr(module, "v_head_dim", key_dim)), *cached)


def _why_no_gate(calls: LayerCalls, follows: bool) -> str | None:
    """Why a full-attention layer cannot have a gate, or (follows) follow another's, or None."""
    if calls.adds is not None:
        return f"adds something of its own to the scores ({calls.adds}), which attention by its gate's decisions does not know"
    if calls.looks_ahead:
        return "attends both ways, and what a gate evicts only later tokens may not see"
    if calls.num_calls != 1:
        return f"calls attention {calls.num_calls} times in a pass, and its gate decides once"
    if calls.cached_heads is None and not follows:
        return "has no keys and values of its own in the cache: it reads another layer's, which that layer's gate would evict"
    if not follows and (calls.cached_heads, calls.cached_dim) != (calls.num_heads, calls.key_dim):
        return (
            f"caches {calls.cached_heads} heads of {calls.cached_dim} and makes of them, in each pass anew, the {calls.num_heads} KV heads of "
            f"{calls.key_dim} that it attends to (latent attention does)"
        )
    if calls.key_dim != calls.value_dim:
        return f"has keys of {calls.key_dim} numbers and values of {calls.value_dim}, and a page of the cache holds both at one width"
    if calls.num_query_heads % calls.num_heads:
        return f"has {calls.num_query_heads} query heads, which {calls.num_heads} KV heads do not divide"
    return None


# Kinds of layers whose caches grow, and which are left alone all the same.
_KINDS = {
    "hybrid": "attention beside another mixer, in one layer of the cache",
    "hybrid_sliding": "sliding attention beside another mixer",
    **dict.fromkeys(
        ("indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention"), "attention to keys that an indexer chooses"
    ),
}


def _bounded_cache(module: Any, text: Any) -> str | None:
    """Why this layer's cache is bounded already, or is of a kind of its own, or None for full attention."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types:
        kind = layer_types[module.layer_idx]
        return None if kind in ("full_attention", "attention") else _KINDS.get(kind, kind.replace("_", " "))
    sliding = getattr(module, "sliding_window", None) or (
        getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    )
    return f"sliding attention of {sliding} tokens" if sliding else None


def _normalizes_input(block: nn.Module) -> bool:
    norms = [name for name, child in block.named_children() if "norm" in type(child).__name__.lower()]
    return any(not _NOT_BEFORE_ATTENTION.search(name) for name in norms)

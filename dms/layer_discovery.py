"""Find what gates attach to in any Hugging Face decoder: its full-attention layers, without a modelling file per family."""

import copy
import inspect
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache

from dms import hf_compat
from dms.gates import Gate

_PROBE = "dms_probe"

# What layers hand the attention interface by name, and what our attention understands or what says nothing about scores.
_KNOWN_OPTIONS = frozenset(
    [
        "scaling",
        "softcap",
        "s_aux",
        "sliding_window",
        "is_causal",
        "dropout",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "image_sizes",
        "token_type_ids",
    ]
)


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
    beyond: str | None = None
    """What it asks of attention beyond weighing the tokens before each; None: nothing."""


def probe(model: Any) -> dict[str, LayerCalls] | None:
    """Run a copy of the model on fake tensors, and return the layers that called transformers' attention interface, by module name.

    None where the modelling file does not run on fake tensors. Takes milliseconds for each layer, whatever the model's size.
    """
    first_calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor, str | None]] = {}
    times: Counter[nn.Module] = Counter()

    def note(module: nn.Module, query, key, value, attention_mask=None, **options):
        times[module] += 1
        first_calls.setdefault(module, (query, key, value, _beyond(attention_mask, options)))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    # Without a mask function of that name no masks are made: what layers hand over is then their own.
    AttentionInterface.register(_PROBE, note)
    dtype = torch.get_default_dtype()
    try:
        # On fake tensors, products of experts run in bfloat16 alone.
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.no_grad(), hf_compat.unchecked_distributions(), hf_compat.all_nonzero():
            twin = type(model)(copy.deepcopy(model.config)).eval().to(torch.bfloat16)
            twin.set_attn_implementation(_PROBE)
            # Some models would look for padding in the tokens, which have no values here.
            for module in twin.modules():
                module.warn_if_padding_and_no_attention_mask = lambda *_: None
            tokens = torch.zeros(1, 2, dtype=torch.long)
            cache = hf_compat.output_cache(twin(input_ids=tokens, use_cache=True))
            if cache is None and set(hf_compat.CACHE_NAMES) & inspect.signature(type(twin).forward).parameters.keys():
                # Some models fill a cache, and make none by themselves.
                first_calls.clear()
                times.clear()
                cache = DynamicCache(config=twin.config.get_text_config())
                twin(input_ids=tokens, use_cache=True, **hf_compat.cache_argument(twin, cache))
    except Exception:  # noqa: BLE001 - modelling files fail in their own ways where they ask tensors for values
        return None
    finally:
        torch.set_default_dtype(dtype)
    names = {module: name for name, module in twin.named_modules()}
    found: dict[str, LayerCalls] = {}
    owners: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for module, (query, key, value, beyond) in first_calls.items():
        # A layer that attends to another's keys and values is handed the same tensors.
        source = next((owner for owner, k, v in owners if k is key and v is value), None)
        if source is None:
            owners.append((names[module], key, value))
        sizes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        found[names[module]] = LayerCalls(times[module], *sizes, _cached_heads(cache, module), source, beyond)
    return found


def _beyond(attention_mask: torch.Tensor | None, options: dict[str, Any]) -> str | None:
    """What a call of the attention interface asks for that attention with evictions does not do, or None."""
    if attention_mask is not None:
        return "adds a mask or a bias of its own to the scores"
    if options.get("is_causal") is False:
        return _BOTH_WAYS
    if (window := options.get("sliding_window")) is not None:
        return f"attends to a sliding window of {window} tokens, of which its configuration does not tell"
    given = {name for name, value in options.items() if value is not None and not (isinstance(value, int | float) and value == 0)}
    if unknown := sorted(given - _KNOWN_OPTIONS):
        return f"hands its attention {', '.join(unknown)}, which attention with evictions does not know"
    return None


_BOTH_WAYS = "says that it attends both ways (is_causal is False)"


def _cached_heads(cache: Cache | None, module: nn.Module) -> int | None:
    layers = getattr(hf_compat.own_cache(cache), "layers", ())
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
    modules = dict(model.named_modules())
    found = {path: module for path, module in modules.items() if _is_decoder_attention(module, text)}
    if not found:
        raise _NoDecoder(_why_none_found(modules))
    decoder_path = _decoder_path(modules, next(iter(found)))
    decoder = modules[decoder_path]
    probed = probe(model)
    if _without_cache(probed) and decoder_path and (alone := probe(decoder)) is not None:
        # Some models around a decoder do not read text alone, or do not hand back its cache.
        probed = {f"{decoder_path}.{path}": calls for path, calls in alone.items()}
    if probed and _without_cache(probed):
        raise _NoDecoder("its passes leave no keys and values in the layers of a cache (an encoder, or a cache of a kind of its own)")

    if probed is None:
        _refuse_twins(found)
    gated: dict[str, AttentionLayer] = {}
    following: list[FollowingLayer] = []
    skipped: dict[str, str] = {}
    for path, module in found.items():
        calls = _from_attributes(module, text) if probed is None else probed.get(path)
        source = None if calls is None or calls.source is None else gated.get(calls.source)
        if other := _other_kind(module, text):
            if source is not None:
                raise _NoDecoder(
                    f"{path} ({type(module).__name__}, {other}) reads keys and values that the gate of {source.name} would evict"
                )
            skipped[path] = other
            continue
        if calls is None and hf_compat.calls_attention_interface(module):
            skipped[path] = "cross-attention, which reading text alone does not call"
            continue
        if calls is None:
            raise _NoDecoder(f"{path} ({type(module).__name__}) computes attention by itself")
        if reason := _why_no_gate(calls, module, follows=source is not None):
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
        raise _NoDecoder("no layer has plain full attention (" + "; ".join(sorted(set(skipped.values()))) + ")")
    attending: list[AttentionLayer | FollowingLayer] = [*gated.values(), *following]
    _refuse_twins({layer.name: layer.module for layer in attending})
    return DecoderLayers(decoder, list(gated.values()), following, skipped)


def _without_cache(probed: dict[str, LayerCalls] | None) -> bool:
    return all(calls.cached_heads is None for calls in (probed or {}).values())


def _refuse_twins(layers: dict[str, Any]) -> None:
    indices = [module.layer_idx for module in layers.values()]
    if twice := next((name for name, module in layers.items() if indices.count(module.layer_idx) > 1), None):
        index = layers[twice].layer_idx
        raise _NoDecoder(f"{indices.count(index)} attention modules have layer_idx {index}, such as {twice}")


def _is_decoder_attention(module: nn.Module, text: Any) -> bool:
    if not type(module).__name__.endswith(("Attention", "MLA")) or getattr(module, "layer_idx", None) is None:
        return False
    own = getattr(module, "config", text)
    # Vision and audio towers of multi-modal models have attention layers of their own.
    return own is text or type(own) is type(text)


def _decoder_path(modules: dict[str, nn.Module], path: str) -> str:
    """The innermost module around a layer that takes tokens or their embeddings."""
    while path:
        path = path.rpartition(".")[0]
        if {"input_ids", "inputs_embeds"} & inspect.signature(type(modules[path]).forward).parameters.keys():
            break
    return path


def _why_none_found(modules: dict[str, nn.Module]) -> str:
    """Why a decoder has no attention layers of the kind that is looked for."""
    others = ((path, module) for path, module in modules.items() if re.search(r"Attention|MLA$", type(module).__name__))
    path, module = next(others, ("", None))
    if module is None:
        return "its decoder has no attention layers"
    name = f"{path} ({type(module).__name__})"
    if getattr(module, "layer_idx", None) is not None:
        return f"its own decoder has no attention layers, and those such as {name} belong to models within it"
    if not hf_compat.calls_attention_interface(module):
        return f"{name} computes attention by itself"
    return f"{name} has no layer_idx, its place in a cache"


def _from_attributes(module: nn.Module, text: Any) -> LayerCalls | None:
    """What `probe` would have found, by what modelling files call things; None where the layer computes attention by itself."""
    if not hf_compat.calls_attention_interface(module):
        return None
    heads = int(text.num_attention_heads)
    # The attention interface repeats KV heads by this number; a layer without it has one KV head per query head.
    kv_heads = heads // int(getattr(module, "num_key_value_groups", 1) or 1)
    head_dim = int(getattr(module, "head_dim", 0) or text.hidden_size // heads)
    key_dim = int(getattr(module, "qk_head_dim", head_dim))
    # A layer may repeat its KV heads before it attends.
    cached_heads = None if getattr(module, "is_kv_shared_layer", False) else int(getattr(module, "num_key_value_heads", None) or kv_heads)
    return LayerCalls(1, heads, kv_heads, key_dim, int(getattr(module, "v_head_dim", key_dim)), cached_heads)


def _why_no_gate(calls: LayerCalls, module: Any, follows: bool) -> str | None:
    """Why a full-attention layer cannot have a gate, or (follows) follow another's, or None."""
    if calls.beyond is not None:
        return calls.beyond
    if False in (getattr(module, "is_causal", True), getattr(getattr(module, "config", None), "is_causal", True)):
        return _BOTH_WAYS
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


# Kinds of layers whose cache may well grow, and why they are left alone.
_OTHER_KINDS = {
    "indexed_attention": "indexed attention, whose keys an indexer chooses",
    "hybrid": "hybrid, whose layers of a cache hold another mixer's state beside keys and values",
}


def _other_kind(module: Any, text: Any) -> str | None:
    """What this layer has instead of full attention with a cache of its own that grows, or None."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types:
        kind = layer_types[module.layer_idx]
        return None if kind in ("full_attention", "attention") else _OTHER_KINDS.get(kind, kind.replace("_", " "))
    sliding = getattr(module, "sliding_window", None) or (
        getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    )
    return f"sliding attention of {sliding} tokens" if sliding else None


def _normalizes_input(block: nn.Module) -> bool:
    norms = [name for name, child in block.named_children() if "norm" in type(child).__name__.lower()]
    return any(not _NOT_BEFORE_ATTENTION.search(name) for name in norms)

"""Find what gates attach to in any Hugging Face decoder: its full-attention layers, without a modelling file per family."""

import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from dms import hf_compat
from dms.gates import Gate
from dms.upstream import UpstreamChanged

_PROBE = "dms_probe"
# What a layer may hand to the attention interface by name: what our attention follows, and what changes nothing in one text.
_FOLLOWED = frozenset(
    [
        "scaling",
        "softcap",
        "s_aux",
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
# How classes of attention layers end.
_ATTENTION = ("Attention", "MLA")


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
    cached_dim: int | None
    """Numbers of a key there."""
    source: str | None = None
    """The layer, called before, whose keys and values it attends to; None: its own."""
    looks_ahead: bool = False
    """Its tokens see those that come after."""
    adds: str | None = None
    """What it adds to the scores beside keys and queries, as it named it; None: nothing."""
    caps: bool = False
    """Its scores are capped."""


def probe(model: Any, decoder: str) -> dict[str, LayerCalls | None] | None:
    """Read two tokens, and return the attention layers that ran, by module name; None for one that did not call transformers' interface.

    A copy reads them on fake tensors, which takes milliseconds a layer whatever the model's size. Where its class does not run on those, the
    model itself does; where it has no weights, a copy of its decoder (its name) alone. None: that does not run either.

    Raises:
        _NoDecoder: the model cannot read two tokens of text alone.
        UpstreamChanged: transformers is not as this version expects it.
    """
    found = _read_on_fake_tensors(model, "")
    if found is not None:
        return found
    weights = list(model.parameters())
    if any(weight.device.type == "meta" or weight.numel() == 0 for weight in weights):
        return _read_on_fake_tensors(model, decoder)
    training = [module for module in model.modules() if module.training]
    try:
        # Some forwards draw random numbers, which a run's seed is for.
        with torch.random.fork_rng({weight.device.index for weight in weights if weight.device.type == "cuda"}):
            return _read(model.eval(), "", weights[0].device)
    except Exception as error:
        raise _NoDecoder(_why_not_read(model, error)) from error
    finally:
        for module in training:
            module.training = True


def _why_not_read(model: Any, error: Exception) -> str:
    """Why a model failed on two tokens of text alone, without a mask.

    Raises:
        UpstreamChanged: it is the error, and not a consequence of attention that is none of transformers' interface.
    """
    text = model.config.get_text_config()
    if own := _own_attention({path: module for path, module in model.named_modules() if _is_decoder_attention(module, text)}):
        return own
    if isinstance(error, UpstreamChanged):
        raise error
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    needs = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "input_ids"]
    if needs:
        return f"it does not read text alone (it needs {' and '.join(needs)} as well)"
    words = " ".join(str(error).split())
    return f"it does not read text alone ({type(error).__name__}: {words if len(words) <= 120 else words[:117] + '...'})"


def _own_attention(layers: dict[str, nn.Module]) -> str | None:
    """The first of these layers that does not call transformers' attention interface, in a sentence."""
    others = (f"{path} ({type(module).__name__})" for path, module in layers.items() if not hf_compat.calls_attention_interface(module))
    name = next(others, None)
    return None if name is None else f"{name} computes attention by itself"


def _read_on_fake_tensors(model: Any, name: str) -> dict[str, LayerCalls | None] | None:
    """None where this part of the model does not run on them."""
    original = model.get_submodule(name)
    with _on_fake_tensors():
        try:
            twin = type(original)(copy.deepcopy(original.config)).eval().to(torch.bfloat16)
            # Some models would look for padding in the tokens, which have no values here.
            for module in twin.modules():
                module.warn_if_padding_and_no_attention_mask = lambda *_: None
            return _read(twin, f"{name}." if name else "", torch.device("meta"))
        except Exception:  # noqa: BLE001 - modelling files fail in their own ways where they ask tensors for values
            return None


@contextmanager
def _on_fake_tensors() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    # Products of experts run in bfloat16 alone there.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), hf_compat.unchecked_distributions(), hf_compat.all_nonzero():
            yield
    finally:
        torch.set_default_dtype(dtype)


def _read(model: Any, prefix: str, device: torch.device) -> dict[str, LayerCalls | None]:
    first_calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    times: Counter[nn.Module] = Counter()
    added: dict[nn.Module, str] = {}
    looking_ahead: set[nn.Module] = set()
    capped: set[nn.Module] = set()
    ran: list[nn.Module] = []
    ahead = torch.zeros(1, 1, 2, 2, device=device)

    def note(module: nn.Module, query, key, value, attention_mask, **kwargs):
        times[module] += 1
        first_calls.setdefault(module, (query, key, value))
        # No other mask is made here: what comes as one is the layer's own.
        causal = (kwargs.get("is_causal"), getattr(module, "is_causal", True), getattr(getattr(module, "config", None), "is_causal", True))
        if attention_mask is ahead or False in causal:
            looking_ahead.add(module)
            attention_mask = None
        if kwargs.get("softcap") is not None:
            capped.add(module)
        given = {"attention_mask": attention_mask} | {name: x for name, x in kwargs.items() if name not in _FOLLOWED}
        for name in (name for name, x in given.items() if x is not None and not (isinstance(x, int | float) and x == 0)):
            added.setdefault(module, name)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    def note_mask(*args, mask_function: Any = None, **kwargs) -> torch.Tensor | None:
        return ahead if _looks_ahead(mask_function, torch.device("cpu") if device.type == "meta" else device) else None

    hf_compat.register_attention(_PROBE, note, mask=note_mask)
    modules = {module: name for name, module in model.named_modules() if type(module).__name__.endswith(_ATTENTION)}
    handles = [module.register_forward_pre_hook(lambda module, args: ran.append(module)) for module in modules]
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules()) if isinstance(c, PreTrainedConfig)}
    before = [(config, hf_compat.set_attention(config, _PROBE)) for config in configs.values()]
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
            cache = hf_compat.output_cache(model(input_ids=tokens, use_cache=True))
            if cache is None and set(hf_compat.CACHE_NAMES) & inspect.signature(type(model).forward).parameters.keys():
                # Some models fill a cache, and make none by themselves.
                first_calls.clear()
                times.clear()
                ran.clear()
                cache = DynamicCache(config=model.config.get_text_config())
                model(input_ids=tokens, use_cache=True, **hf_compat.cache_argument(model, cache))
    finally:
        for config, name in before:
            hf_compat.set_attention(config, name)
        for handle in handles:
            handle.remove()
        # What stays registered would keep the modules that it has seen.
        hf_compat.register_attention(_PROBE, _after_probe)
    found: dict[str, LayerCalls | None] = {prefix + modules[module]: None for module in ran}
    owners: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    names = {module: prefix + name for name, module in model.named_modules()}
    for module, (query, key, value) in first_calls.items():
        # A layer that attends to another's keys and values is handed the same tensors.
        source = next((owner for owner, k, v in owners if k is key and v is value), None)
        if source is None:
            owners.append((names[module], key, value))
        sizes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        found[names[module]] = LayerCalls(
            times[module], *sizes, *_cached(cache, module), source, module in looking_ahead, added.get(module), module in capped
        )
    return found


def _after_probe(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a layer asks for the attention of dms.layer_discovery.probe, which has ended")


def _looks_ahead(mask_function: Any, device: torch.device) -> bool:
    """Whether a token sees its successor, by a mask function of (sequence, head, query, key)."""
    at = [torch.tensor(index, device=device) for index in (0, 0, 0, 1)]
    try:
        return bool(mask_function(*at))
    except Exception:  # noqa: BLE001 - on fake tensors nothing is known of it
        return False


def _cached(cache: Cache | None, module: nn.Module) -> tuple[int | None, int | None]:
    """Heads and width of the keys in a layer's own layer of the cache."""
    layers = getattr(hf_compat.own_cache(cache), "layers", ())
    index = getattr(module, "layer_idx", None)
    keys = getattr(layers[index], "keys", None) if index is not None and index < len(layers) else None
    return (None, None) if keys is None or keys.dim() != 4 else (keys.shape[1], keys.shape[3])


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
    head_counts: list[tuple[int, int]]
    """Query and KV heads of the attention layers, gated or not, each pair once."""


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


NOT_CALLED = "not called for text alone (cross-attention)"
"""In `DecoderLayers.skipped`."""


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
        raise _NoDecoder(_why_none_found(model))
    if all(kinds := [_bounded_cache(module, text) for module in found.values()]):
        raise _NoDecoder(_nothing_to_evict(kinds))
    modules = dict(model.named_modules())
    decoder = _decoder_of(modules, next(iter(found)))
    probed = probe(model, decoder)
    if probed is not None and not probed.keys() & found.keys():
        # BigBird puts other layers in their place while it reads.
        raise _NoDecoder(_own_attention(found) or f"none of its attention layers, such as {next(iter(found))}, is called for text alone")
    if probed and all(calls is None or calls.cached_heads is None for calls in probed.values()) and any(probed.values()):
        raise _NoDecoder(
            "it keeps no keys and values from one pass to the next (an encoder, or is_decoder is not set), or not where transformers does"
        )

    if hf_compat.attention_name(text) == "sdpa" and any(calls is not None and calls.caps for calls in (probed or {}).values()):
        raise _NoDecoder(
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
    num_other = int(text.num_hidden_layers) - len({module.layer_idx for module in found.values()})
    if num_other > 0:
        skipped[f"{num_other} other layers"] = "no softmax attention (linear attention, state space or convolution)"

    if not gated:
        raise _NoDecoder(_nothing_to_evict(skipped.values()))
    layers: list[AttentionLayer | FollowingLayer] = [*gated.values(), *following]
    indices = [layer.index for layer in layers]
    if twice := next((layer for layer in layers if indices.count(layer.index) > 1), None):
        raise _NoDecoder(f"{indices.count(twice.index)} attention modules have layer_idx {twice.index}, such as {twice.name}")
    return DecoderLayers(modules[decoder], list(gated.values()), following, skipped, sorted(head_counts))


def _why_none_found(model: Any) -> str:
    """Why a decoder has no attention layers of the kind that is looked for."""
    others = ((path, module) for path, module in model.named_modules() if type(module).__name__.endswith(_ATTENTION))
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


def _is_decoder_attention(module: nn.Module, text: Any) -> bool:
    if not type(module).__name__.endswith(_ATTENTION) or getattr(module, "layer_idx", None) is None:
        return False
    own = getattr(module, "config", text)
    # Vision and audio towers of multi-modal models have attention layers of their own.
    return own is text or type(own) is type(text)


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

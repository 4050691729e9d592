"""Let a model read two tokens, and note what each of its attention layers does: the calls, widths and cache entries that gates depend on."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from dms import hf_compat
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
ATTENTION = ("Attention", "MLA")
"""How the names of attention layers' classes end."""


class NoDecoder(Exception):
    """Why a model cannot have gates."""


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
        NoDecoder: the model cannot read two tokens of text alone.
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
        raise NoDecoder(_why_not_read(model, error)) from error
    finally:
        for module in training:
            module.training = True


def _why_not_read(model: Any, error: Exception) -> str:
    """Why a model failed on two tokens of text alone, without a mask.

    Raises:
        UpstreamChanged: it is the error, and not a consequence of attention that is none of transformers' interface.
    """
    text = model.config.get_text_config()
    if own := own_attention({path: module for path, module in model.named_modules() if is_decoder_attention(module, text)}):
        return own
    if isinstance(error, UpstreamChanged):
        raise error
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    needs = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "input_ids"]
    if needs:
        return f"it does not read text alone (it needs {' and '.join(needs)} as well)"
    words = " ".join(str(error).split())
    return f"it does not read text alone ({type(error).__name__}: {words if len(words) <= 120 else words[:117] + '...'})"


def own_attention(layers: dict[str, nn.Module]) -> str | None:
    """The first of these layers that does not call transformers' attention interface, in a sentence."""
    others = (f"{path} ({type(module).__name__})" for path, module in layers.items() if not hf_compat.calls_attention_interface(module))
    name = next(others, None)
    return None if name is None else f"{name} computes attention by itself"


def is_decoder_attention(module: nn.Module, text: Any) -> bool:
    """Whether a module is an attention layer of the decoder with this text configuration."""
    if not type(module).__name__.endswith(ATTENTION) or getattr(module, "layer_idx", None) is None:
        return False
    own = getattr(module, "config", text)
    # Vision and audio towers of multi-modal models have attention layers of their own.
    return own is text or type(own) is type(text)


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
    modules = {module: name for name, module in model.named_modules() if type(module).__name__.endswith(ATTENTION)}
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
    raise RuntimeError("a layer asks for the attention of dms.layer_probe.probe, which has ended")


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

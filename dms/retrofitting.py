"""`retrofit`: attach gates to a model, and the hooks that follow each of its passes.

A pass, in the order of its hooks: `_before_whole_model` (multimodal models), `_before_decoder` fixes the pass (`DMSState.begin`), and in
each gated layer `_before_attention` runs the gate and leaves its decision on the layer, transformers calls the attention function of
`dms.attention`, which takes it, and `_after_attention` sees to it that it was taken. A layer that attends to another's keys and values is
left that one's decision (`_before_following`); where there are such layers, `_after_decoder` ends the pass.
"""

import copy
import functools
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms import attention, borrowed, hf_compat, masks
from dms.cache import CompactedLayer, DMSCache
from dms.cache.layer import MaskedLayer
from dms.config import DMSConfig
from dms.gates import BorrowedGate, Gate
from dms.generation import with_decoding
from dms.layer_discovery import AttentionLayer, FollowingLayer, find_layers
from dms.modes import DMSState, ForwardPass, RotaryLengths, state_of


def retrofit(model: Any, config: DMSConfig) -> Any:
    """Attach gates to every full-attention layer of a Hugging Face decoder, in place; dense mode.

    Linear gates are zero-initialised. Borrowed ones take a channel of the queries as it is, and out of attention, in dense mode too.

    `model.dms` tells what was gated and what was left alone, and why (`.layers`, `.skipped`).

    Raises:
        ValueError: a model that has gates already or cannot carry them, or a window that its context cannot use.
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError(f"{type(model).__name__} carries gates already; load the base model to retrofit it anew")
    hf_compat.mend_text_outputs()
    found = find_layers(model)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is not None:
        config.check_context(context)
    if config.is_borrowed:
        for layer in found.gated:
            borrowed.check_family(layer)
    hf_compat.keep_packed_layout(model)
    original = hf_compat.attention_name(text)
    layers: list[AttentionLayer | FollowingLayer] = [*found.gated, *found.following]
    all_gated = len(found.skipped) == len(found.following)
    if not all_gated:
        _separate_configs([layer.module for layer in layers])
    configs = {id(c): c for c in (getattr(layer.module, "config", text) for layer in layers)}
    if all_gated:
        # No mask is made where the decoder's asks for our attention too.
        configs[id(text)] = text
    others = {id(c): c for c in (text, *(getattr(m, "config", text) for m in found.decoder.modules())) if isinstance(c, type(text))}
    around = _around(model, found.decoder)
    state = DMSState(
        config=config,
        layers=found.gated,
        following=found.following,
        skipped=found.skipped,
        head_counts=found.head_counts,
        decoder=found.decoder,
        decoder_is_inside=bool(around),
        layer_configs=list(configs.values()),
        other_configs=[c for c in others.values() if id(c) not in configs],
        original_attention=original,
        attention_name=attention.register(original, all_gated),
        dense_attention=borrowed.register_dense(original) if config.gate == "borrowed" else original,
        rotary=RotaryLengths(found.decoder),
        takes_cache=hf_compat.makes_default_cache(model),
        kv_dtype=config.kv_dtype,
    )
    for layer in found.gated:
        gate: nn.Module = (
            BorrowedGate(config)
            if config.is_borrowed
            else Gate(_hidden_size(layer, text), layer.num_heads, config, normalize=not layer.normalized_input)
        )
        # accelerate, which moves only what was there before, is not to move it: it stays where the layer computes.
        device = hf_compat.execution_device(layer.module)
        if device is None:
            device = next((p.device for p in layer.module.parameters() if p.device.type != "meta"), None)
        layer.module.add_module("dms_gate", gate if device is None else gate.to(device))
        layer.module.register_forward_pre_hook(functools.partial(_before_attention, state, layer), with_kwargs=True)
        layer.module.register_forward_hook(functools.partial(_after_attention, layer))
        if config.is_borrowed:
            borrowed.borrow(state, layer)
    for following in found.following:
        following.module.register_forward_pre_hook(functools.partial(_before_following, state, following))
        following.module.register_forward_hook(functools.partial(_after_attention, following))
    for module in around:
        module.register_forward_pre_hook(functools.partial(_before_whole_model, state), with_kwargs=True)
        module.register_forward_hook(functools.partial(_after_whole_model, state), always_call=True)
    found.decoder.register_forward_pre_hook(functools.partial(_before_decoder, state), with_kwargs=True)
    if found.following:
        found.decoder.register_forward_hook(functools.partial(_after_decoder, state))
    model.dms = state
    if config.is_borrowed:
        # Dense is no longer as the model came.
        state.activate("dense")
    if hasattr(model, "generate"):
        own: type = type(model)
        hf_compat.change_class(model, with_decoding(own))
    return model


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gates' parameters by their names in gates.safetensors: `layers.{i}.gate.weight`, `layers.{i}.gate.bias`."""
    return {f"layers.{layer.index}.gate.{name}": p for layer in state_of(model).layers for name, p in layer.gate.named_parameters()}


def _separate_configs(modules: list[nn.Module]) -> None:
    """Give attention layers a configuration apart from that of the layers beside them, which go on with the attention function that they had.

    Some build their own masks for attention functions that they know, by name.
    """
    separate: dict[int, Any] = {}
    for module in modules:
        config = getattr(module, "config", None)
        if config is not None:
            module.config = separate.setdefault(id(config), copy.copy(config))


def _hidden_size(layer: AttentionLayer, text: Any) -> int:
    return int(getattr(layer.module, "hidden_size", None) or text.hidden_size)


def _around(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """What stands around a text decoder within a multimodal model, that model first; nothing where the model only adds a head.

    The part that joins text and images is one between them, or the model itself (Llama 4).
    """
    around = [module for module in model.modules() if module is not decoder and decoder in module.modules()]
    return around if len(around) > 1 else []


# What multimodal models call images, video and sound, and what was made of them.
_MORE_THAN_TEXT = re.compile(r"pixel_values|image|video|input_features|input_values|audio|mm_encoder_outputs|(mm_)?token_type_ids$")


def _before_whole_model(state: DMSState, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the attention mask: a multimodal model turns it into others before its decoder, which no longer show the padding.

    Raises:
        ValueError: images, with gates active: their tokens see each other both ways, which no gate was made for.
    """
    if state.mode == "dense":
        return
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**bound.get("kwargs", {}), **bound}
    for name, value in given.items():
        if _MORE_THAN_TEXT.match(name) and _holds_something(name, value):
            raise ValueError(
                f"{type(module).__name__} was given images, video or sound ({name}); gates are for text: set_mode(model, 'dense') reads them"
            )
    state.given_mask = given.get("attention_mask")
    # Those of images read before, in dense mode.
    state.rope_deltas[module] = hf_compat.swap_rope_deltas(module, None)


def _holds_something(name: str, value: Any) -> bool:
    """Whether an argument brings more than text: marks of which tokens are images' may all be 0, and encoders' outputs may be none."""
    if name.endswith("token_type_ids"):
        return value is not None and bool((value != 0).any())
    return bool(value) if isinstance(value, dict) else value is not None


def _after_whole_model(state: DMSState, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if module in state.rope_deltas:
        hf_compat.swap_rope_deltas(module, state.rope_deltas.pop(module))


# What cross-attention reads.
_OF_ENCODERS = ("encoder_hidden_states", "cross_attention_states")


def _before_decoder(
    state: DMSState, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Begin a pass: find its tokens' documents and positions, and the cache that it evicts from.

    Raises:
        ValueError: an encoder's output, with gates active.
    """
    if state.mode == "dense":
        state.forward = None
        return None
    bound = state.decoder_signature.bind_partial(*args, **kwargs)
    given = {**bound.arguments.get("kwargs", {}), **bound.arguments}
    if (encoder := next((name for name in _OF_ENCODERS if given.get(name) is not None), None)) is not None:
        raise ValueError(
            f"{type(decoder).__name__} was given {encoder}; gates are for text alone: set_mode(model, 'dense') attends to an encoder's output"
        )
    source = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    batch, num_tokens = source.shape[:2]
    mask = given.get("attention_mask")
    given_mask, state.given_mask = state.given_mask, None
    if isinstance(mask, dict) and state.decoder_is_inside:
        mask = given_mask

    cache = hf_compat.own_cache(next((given[name] for name in hf_compat.CACHE_NAMES if given.get(name) is not None), None))
    if state.mode == "evict" and cache is None and state.takes_cache and _wants_cache(decoder, given):
        cache = DMSCache(decoder, state=state)
    if cache is not None:
        args, kwargs = _with_cache(decoder, state.decoder_signature, cache, args, kwargs)
    for module in (layer.module for layers in (state.layers, state.following) for layer in layers):
        # A pass that failed half-way may have left its decision, and with it its cache.
        attention.release_decision(module)
    past = _past(cache, state, batch)
    past = None if past is None else past.to(source.device)
    if isinstance(cache, DMSCache):
        cache.before_forward(num_tokens)

    if state.mode in ("train", "label") and state.tokens is not None:
        tokens = _given_tokens(state, state.tokens, source)
    else:
        tokens = masks.locate_tokens(batch, num_tokens, source.device, mask, given.get("position_ids"), past)
    if state.mode == "evict" and cache is not None and state.rotary.changes:
        _follow_length(state, decoder, cache, past, tokens)
    state.begin(tokens, has_cache=cache is not None)
    return args, _with_all_queries(state, kwargs) if state.following else kwargs


def _with_all_queries(state: DMSState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments with which the layers that follow others see every query, or the last one alone.

    Where only the last tokens' logits are wanted, some decoders leave the other tokens out of these layers. Several queries without their
    masks would then be taken for the first ones, and training weighs whole documents.
    """
    wanted = kwargs.get("logits_to_keep", 0)
    fits = isinstance(wanted, int) and wanted == 1 and state.mode == "evict" and state.original_attention in ("eager", "sdpa")
    return kwargs if fits or "logits_to_keep" not in kwargs else {**kwargs, "logits_to_keep": 0}


def _after_decoder(state: DMSState, module: Any, args: tuple[Any, ...], output: Any) -> None:
    if state.forward is not None:
        state.forward.end()


def _with_cache(
    decoder: nn.Module, signature: inspect.Signature, cache: Cache, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder's arguments with this cache under the name that its release takes, whatever name it was given by."""
    name = hf_compat.cache_name(decoder)
    place = list(signature.parameters).index(name)
    kwargs = {key: value for key, value in kwargs.items() if key not in hf_compat.CACHE_NAMES}
    if place < len(args):
        return (*args[:place], cache, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: cache}


def _follow_length(state: DMSState, decoder: nn.Module, cache: Any, past: masks.Tokens | None, tokens: masks.Tokens) -> None:
    """Note with the cache which length its keys' rotary frequencies are for.

    Raises:
        ValueError: the new keys would have others than those that it holds.
    """
    length = max(state.rotary.length or 0, int(tokens.position_BT.max()) + 1)
    if past is not None and bool((past.segment_BT > 0).any()):
        held = getattr(cache, "rotary_length", None) or int(past.position_BT.max()) + 1
        on_trial = any(getattr(layer, "record_past", False) for layer in cache.layers)
        state.rotary.check(type(decoder).__name__, held, length, decodes=on_trial or tokens.position_BT.shape[1] == 1)
    cache.rotary_length = length


def _given_tokens(state: DMSState, given: masks.Tokens, source: torch.Tensor) -> masks.Tokens:
    """The tokens that `set_mode` was given, whose sequences may be divided among processes."""
    shape, parts = given.segment_BT.shape, 1 if state.rows is None else state.rows.size
    if shape != (source.shape[0], source.shape[1] * parts):
        raise ValueError(
            f"set_mode was given tokens {tuple(shape)}, and the batch has {tuple(source.shape[:2])} in each of {parts} processes"
        )
    return given.to(source.device)


def _wants_cache(decoder: Any, given: dict[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache)


def _past(cache: Cache | None, state: DMSState, batch: int) -> masks.Tokens | None:
    """Of the tokens that a cache holds, as much as the next ones' positions need.

    Raises:
        ValueError: another number of sequences, or a cache that a failed pass has left with some layers ahead of others.
    """
    held = [cache.layers[layer.index] for layer in state.layers if layer.index < len(cache.layers)] if cache is not None else []
    lengths = {layer.get_seq_length() for layer in held if isinstance(layer, MaskedLayer | CompactedLayer)}
    if len(lengths) > 1:
        raise ValueError(
            f"a forward pass over this cache failed half-way: its layers hold {', '.join(map(str, sorted(lengths)))} tokens; "
            "reset it, or go on from a fork or a saved cache of before"
        )
    if any(isinstance(layer, CompactedLayer) and layer.pending is not None for layer in held):
        # Layers without gates may be ahead of it, and do not tell.
        raise ValueError(
            "a forward pass over this cache failed half-way: keys and values of its tokens were not stored; reset it, or go on from a fork or a "
            "saved cache of before"
        )
    layer = held[0] if held else None
    if isinstance(layer, MaskedLayer):
        return layer.tokens
    seen = layer.row_lengths() if isinstance(layer, CompactedLayer) and not layer.is_empty else None
    if seen is None:
        return None
    if len(seen) != batch:
        raise ValueError(
            f"the cache holds {len(seen)} sequences and the batch has {batch}; use cache.batch_repeat_interleave or batch_select_indices, or a fork"
        )
    return masks.Tokens((seen > 0).int()[:, None], (seen - 1).clamp(min=0)[:, None])


def _enter(state: DMSState, layer: AttentionLayer | FollowingLayer, module: Any) -> ForwardPass | None:
    """The pass that a layer is called in; None where gates are off."""
    forward = state.forward
    if forward is None:
        module.dms_pending = None
    # A compiled graph would be guarded by each layer's number, and made again for each.
    elif not torch.compiler.is_compiling():
        forward.enter(layer)
    return forward


def _before_attention(state: DMSState, layer: AttentionLayer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the gate on what attention reads, and leave what follows from its decision for the attention function."""
    forward = _enter(state, layer, module)
    if state.config.is_borrowed:
        # What a failed pass has left goes too.
        module.dms_waiting = None
    if forward is None:
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = hf_compat.own_cache(next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None))
    if state.config.is_borrowed:
        module.dms_waiting = forward, cache
        return
    pending = module.dms_pending = forward.decide(state, layer, module.dms_gate, hidden, cache)
    if layer.index in state.followed:
        # A layer that activation checkpointing runs again finds its first decision here, whose gradient is the one that counts.
        forward.followed.setdefault(layer.index, pending)


def _before_following(state: DMSState, layer: FollowingLayer, module: Any, args: tuple[Any, ...]) -> None:
    """Leave the decision of the layer whose keys and values this one attends to."""
    forward = _enter(state, layer, module)
    if forward is not None:
        module.dms_pending = forward.follow(layer)


def _after_attention(layer: AttentionLayer | FollowingLayer, module: Any, args: tuple[Any, ...], output: Any) -> None:
    if getattr(module, "dms_waiting", None) is not None:
        raise RuntimeError(f"{layer.name} ({type(module).__name__}) did not call what makes its queries: its borrowed gate did not decide")
    if not attention.release_decision(module):
        raise RuntimeError(
            f"{layer.name} ({type(module).__name__}) did not call transformers' attention interface: decisions had no effect on it"
        )

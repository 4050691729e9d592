"""`retrofit`: attach gates to a model through hooks and the attention interface, and switch its modes.

Modes: "dense" is the untouched model, bit for bit. "train" makes noisy soft decisions over whole documents. "evict" makes hard
ones, in prefill as in decode.
"""

import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms import attention, gates, hf_compat, masks
from dms.cache import CompactedLayer, DMSCache, compact_layers
from dms.cache.layer import MaskedLayer
from dms.cache.store import PendingGate
from dms.config import DMSConfig
from dms.generation import with_decoding
from dms.io.weights import refuse_quantized
from dms.layer_discovery import AttentionLayer, find_layers
from dms.modes import DMSState, Forward, Mode, Noise, state_of
from dms.rotary import RotaryLengths
from dms.training.offload import HostStore


def retrofit(model: nn.Module, config: DMSConfig) -> nn.Module:
    """Attach zero-initialised gates to every full-attention layer of a Hugging Face decoder, in place; dense mode.

    `model.dms` tells what was gated and what was left alone, and why (`.layers`, `.skipped`).

    Raises:
        ValueError: a model that has gates already or cannot carry them, or a window that its context cannot use.
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError(f"{type(model).__name__} carries gates already; load the base model to retrofit it anew")
    found = find_layers(model)
    refuse_quantized(model.config, type(model).__name__)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and config.window >= context:
        raise ValueError(
            f"window is {config.window} and the model's context is {context} tokens: nothing could ever be evicted; choose a window below the context"
        )
    original = hf_compat.attention_name(text)
    name = attention.register(original, all_gated=not found.skipped)
    configs = {id(c): c for c in (text, *(getattr(layer.module, "config", text) for layer in found.gated))}
    state = DMSState(config, found.gated, found.skipped, found.decoder, list(configs.values()), original, name)
    state.decoder_is_inside = bool(_around(model, found.decoder))
    state.takes_cache = hf_compat.makes_default_cache(model)
    state.rotary = RotaryLengths(found.decoder)
    for layer in found.gated:
        gate = gates.Gate(_hidden_size(layer, text), layer.num_heads, config, normalize=not layer.normalized_input)
        weight = next((p for p in layer.module.parameters() if p.device.type != "meta"), None)
        layer.module.add_module("dms_gate", gate.to(weight.device) if weight is not None else gate)
        layer.module.register_forward_pre_hook(functools.partial(_before_attention, state, layer), with_kwargs=True)
        layer.module.register_forward_hook(functools.partial(_after_attention, layer))
    for module in _around(model, found.decoder):
        module.register_forward_pre_hook(functools.partial(_before_whole_model, state), with_kwargs=True)
    found.decoder.register_forward_pre_hook(functools.partial(_before_decoder, state), with_kwargs=True)
    model.dms = state
    if hasattr(model, "generate"):
        hf_compat.change_class(model, with_decoding(type(model)))
    return model


def set_mode(model: nn.Module, mode: Mode, noise: Noise | None = None, tokens: masks.Tokens | None = None, rows: Any = None) -> None:
    """Switch a retrofitted model to "dense", "train" or "evict". `noise` names the training forwards' noise.

    tokens: where the tokens of training forwards stand. Packed documents beside padding need it; None: the attention mask and
    the positions say it. rows: training's rows are divided among processes; `tokens` are then those of whole rows.

    Raises:
        ValueError: an unknown mode, or a model without gates.
    """
    state = state_of(model)
    if mode not in ("dense", "train", "evict"):
        raise ValueError(f"mode is {mode!r}; the modes are 'dense', 'train' and 'evict'")
    state.noise, state.tokens, state.rows = noise, tokens, rows
    if rows is not None:
        if mode == "evict" or tokens is None:
            raise ValueError(
                "rows are divided among processes in training only (mode 'train' or the teacher's 'dense'), and their tokens must be told"
            )
        rows.tokens = tokens
    state.activate(mode)


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gates' parameters by their names in gates.safetensors: `layers.{i}.gate.weight`, `layers.{i}.gate.bias`."""
    return {
        f"layers.{layer.index}.gate.{name}": p for layer in state_of(model).layers for name, p in layer.module.dms_gate.named_parameters()
    }


def _hidden_size(layer: AttentionLayer, text) -> int:
    return int(getattr(layer.module, "hidden_size", None) or text.hidden_size)


def _around(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """What stands between a model and its text decoder: of multimodal models the part that joins text and images."""
    return [module for name, module in model.named_modules() if name and module is not decoder and decoder in module.modules()]


def _before_whole_model(state: DMSState, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Note the attention mask: a multimodal model makes others of it before its decoder, in which padding is no longer to be seen.

    Raises:
        ValueError: images, with gates active: their tokens see each other both ways, which no gate was made for.
    """
    if state.mode == "dense":
        return
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    if given.get("pixel_values") is not None:
        raise ValueError(f"{type(module).__name__} was given images; gates are for text: set_mode(model, 'dense') reads images")
    state.given_mask = given.get("attention_mask")


def _before_decoder(state: DMSState, decoder: nn.Module, args: tuple, kwargs: dict):
    """Fix this pass's state: where its tokens stand, whose noise it uses, and the cache that it evicts from."""
    if state.mode == "dense":
        state.forward = None
        return None
    signature = state.decoder_signature
    bound = signature.bind_partial(*args, **kwargs)
    given = {**bound.arguments.get("kwargs", {}), **bound.arguments}
    mask = given.get("attention_mask")
    if isinstance(mask, dict) and state.decoder_is_inside:
        mask, state.given_mask = state.given_mask, None
    source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    cache = next((given[name] for name in hf_compat.CACHE_NAMES if given.get(name) is not None), None)
    if state.mode == "evict" and cache is None and state.takes_cache and _wants_cache(decoder, given):
        cache = DMSCache(decoder, state=state)
    if cache is not None:
        args, kwargs = _with_cache(decoder, signature, cache, args, kwargs)
    for layer in state.layers:
        # A pass that failed half-way may have left its decision, and with it its cache.
        layer.module.dms_pending = None
    past = _past(cache, state, source.shape[0])
    past = None if past is None else past.map(lambda x: x.to(source.device))
    if isinstance(cache, DMSCache):
        cache.before_forward(source.shape[1])
    if state.mode == "train" and state.tokens is not None:
        tokens = _told(state, source)
    else:
        tokens = masks.locate_tokens(source.shape[0], source.shape[1], source.device, mask, given.get("position_ids"), past)
    if state.mode == "evict" and cache is not None and state.rotary.changes:
        _follow_length(state, decoder, cache, past, tokens)
    if state.mode == "train":
        _require_recomputation(state, decoder)
        masks.require_unbroken(tokens)
    offloads = state.mode == "train" and state.offload_activations and torch.is_grad_enabled()
    store = HostStore() if offloads else None
    state.forward = Forward(state.mode, tokens, state.noise, state.rows, has_cache=cache is not None, store=store)
    return args, kwargs


def _with_cache(decoder: nn.Module, signature: inspect.Signature, cache: Cache, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A decoder's arguments with this cache under the name that its release takes, whatever name it was given by."""
    name = hf_compat.cache_name(decoder)
    place = list(signature.parameters).index(name)
    kwargs = {key: value for key, value in kwargs.items() if key not in hf_compat.CACHE_NAMES}
    if place < len(args):
        return (*args[:place], cache, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: cache}


def _follow_length(state: DMSState, decoder: nn.Module, cache: Cache, past: masks.Tokens | None, tokens: masks.Tokens) -> None:
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


def _told(state: DMSState, source: torch.Tensor) -> masks.Tokens:
    told, parts = state.tokens.segment_BT.shape, 1 if state.rows is None else state.rows.size
    if told != (source.shape[0], source.shape[1] * parts):
        raise ValueError(
            f"set_mode was told of tokens {tuple(told)}, and the batch has {tuple(source.shape[:2])} in each of {parts} processes"
        )
    return state.tokens.to(source.device)


def _wants_cache(decoder: nn.Module, given: dict) -> bool:
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


def _require_recomputation(state: DMSState, decoder: nn.Module) -> None:
    """Give activation checkpointing the state of its own forward; refuse the reentrant kind, which cuts the count's gradient."""
    for module in decoder.modules():
        hf_compat.wrap_checkpointing(module, functools.partial(_recomputing, state))


def _recomputing(state: DMSState, checkpoint):
    keywords = getattr(checkpoint, "keywords", {})
    if keywords.get("use_reentrant", True):
        raise ValueError(
            "activation checkpointing is of the reentrant kind, which cuts the gradient of the compression count; "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if keywords.get("context_fn") is not None:
        return checkpoint
    return functools.partial(_checkpoint, state, checkpoint, use_reentrant=False, context_fn=state.checkpoint_contexts)


def _checkpoint(state: DMSState, checkpoint, *args, **kwargs):
    """Run a layer under activation checkpointing; what it saves are its inputs."""
    store = None if state.forward is None else state.forward.store
    if store is None:
        return checkpoint(*args, **kwargs)
    store.begin_group()
    with store.hooks():
        return checkpoint(*args, **kwargs)


def _before_attention(state: DMSState, layer: AttentionLayer, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Run the gate on what attention reads and leave the decision for the attention function."""
    forward = state.forward
    if forward is None:
        module.dms_pending = None
        return
    # A compiled graph would be guarded by each layer's number, and made again for each.
    if not torch.compiler.is_compiling():
        forward.enter(layer)
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if forward.mode == "train":
        module.dms_pending = _decide_softly(state, layer, forward, module.dms_gate(hidden))
    else:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None and forward.has_cache:
            raise RuntimeError(
                f"{layer.name} ({type(module).__name__}) was called without the cache that the model was given: what its gate evicts would be kept "
                "there or lost; such a model cannot be retrofitted"
            )
        module.dms_pending = _decide_hard(state, layer, forward, module.dms_gate, hidden, cache)


def _decide_softly(state: DMSState, layer: AttentionLayer, forward: Forward, logits: torch.Tensor):
    config, tokens, rows = state.config, forward.tokens, forward.rows
    # A document's first token has nobody before it to rule, wherever its successors lie.
    deciding = tokens.real if config.alignment == "own" else tokens.real & (tokens.position_BT > 0)
    deciding = deciding if rows is None else rows.held(deciding)
    noise = torch.zeros_like(logits)
    if forward.noise is not None:
        noise = gates.logistic_noise(
            forward.noise.sequence_B.to(logits.device),
            logits.shape[1],
            layer.num_heads if config.granularity == "head" else 1,
            seed=forward.noise.seed,
            layer=layer.index,
            first_token=0 if rows is None else rows.rank * logits.shape[1],
        )
    log_keep = gates.keep_log_prob(logits, noise, config.tau)
    evicted = gates.straight_through(log_keep) * deciding[..., None]
    forward.evicted_count[layer.index] = evicted.sum((1, 2))
    forward.decided_count[layer.index] = deciding.sum(1).to(log_keep.dtype) * layer.num_heads
    forward.head_rate[layer.index] = (evicted.detach().sum((0, 1)) / deciding.sum().clamp(min=1)).float()
    shared = {"tokens": tokens, "window": config.window, "sinks": config.sinks, "first_pass": forward.first_pass(layer.index)}
    if rows is not None:
        return functools.partial(rows.train_attention, log_keep_BSH=log_keep, alignment=config.alignment, **shared)
    aligned = masks.align(log_keep, tokens.segment_BT, config.alignment, 0.0)
    return functools.partial(attention.train_attention, log_keep_BTH=aligned, **shared)


def _decide_hard(state: DMSState, layer: AttentionLayer, forward: Forward, gate: gates.Gate, hidden: torch.Tensor, cache: Cache | None):
    config, tokens = state.config, forward.tokens.to(hidden.device)
    masked = functools.partial(attention.evict_attention, query_tokens=tokens, window=config.window, sinks=config.sinks)
    if cache is None:
        logits = forward.logits[layer.index] = _logits(gate, hidden, state.evict_bias)
        evicted = forward.evicted[layer.index] = masks.align(logits > 0, tokens.segment_BT, config.alignment, False)
        return functools.partial(masked, evicted_BSH=evicted, key_tokens=tokens)
    held = cache.layers[layer.index] if layer.index < len(cache.layers) else None
    if not isinstance(held, MaskedLayer | CompactedLayer):
        compact_layers(cache, state)
        held = cache.layers[layer.index]
    # Hooks see the gate's call, and ZeRO-3's bring its weights.
    if isinstance(held, CompactedLayer) and not hf_compat.has_forward_hooks(gate) and held.runs_gate(hidden.shape[1]):
        held.decide(PendingGate(gate, hidden, state.evict_bias), tokens)
    else:
        held.decide(_logits(gate, hidden, state.evict_bias) > 0, tokens)
    if isinstance(held, MaskedLayer):
        evicted = forward.evicted[layer.index] = held.evicted()
        return functools.partial(masked, evicted_BSH=evicted, key_tokens=held.tokens)
    return functools.partial(attention.compacted_attention, held=held, cache=cache, masked=masked)


def _logits(gate: nn.Module, hidden: torch.Tensor, bias: float) -> torch.Tensor:
    logits = gate(hidden)
    return logits + bias if bias else logits


def _after_attention(layer: AttentionLayer, module: nn.Module, args, output) -> None:
    if not attention.release_decision(module):
        raise RuntimeError(f"{layer.name} ({type(module).__name__}) did not call transformers' attention interface: its gate had no effect")

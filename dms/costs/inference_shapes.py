"""What inference of a model is made of, measured on the meta device: no formula per family.

The model is built without storage, and passes of two lengths and one decoding step are run through it. Its attention is replaced
by one that notes what it is asked for and computes nothing; all other products are counted as they are called.

Letters: B batch, N new tokens, Hq query heads, H KV heads, D head dim.
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dms.config import DMSConfig
from dms.costs.counting import Counting, Weight
from dms.hf_compat import cache_argument, output_cache
from dms.retrofitting import retrofit

_NOTING = "dms_analysis"
# Tokens of the two passes: what is chunked (linear attention) is chunked by 256 at most.
_SHORT, _LONG = 256, 512


@dataclass(frozen=True)
class Attention:
    """One attention layer. window: tokens that it sees, its own included; None: all. holds: it keeps its own keys and values,
    instead of another layer's. gated: gates can evict here."""

    layer: int
    num_query_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    causal: bool
    holds: bool
    gated: bool


@dataclass(frozen=True)
class Work:
    """Products outside of attention: FLOPs, and numbers that they read beside weights and write. For each token, and once for
    each sequence (a prompt's logits are those of its last token)."""

    flops: float
    numbers: float
    flops_once: float = 0.0
    numbers_once: float = 0.0


@dataclass(frozen=True)
class InferenceShape:
    """weights: by parameter, as `tokens` tokens used them. state: bytes of linear attention and convolutions, for each sequence.
    gate_parameters: of all gates, float32. decode: None for an encoder. why_dense: why no gates can be attached, or None.
    context: as the configuration says; None: it does not."""

    name: str
    attentions: list[Attention]
    weights: list[Weight]
    tokens: int
    prefill: Work
    decode: Work | None
    state: int
    gate_parameters: int
    context: int | None
    why_dense: str | None

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def is_encoder(self) -> bool:
        return self.decode is None


def context_of(config) -> int | None:
    """The longest context that a transformers configuration names, in tokens."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def measure(config, dms: DMSConfig) -> InferenceShape:
    """Measure a model by its transformers configuration. dms: of its gates, where it can carry them.

    Raises:
        ValueError: an encoder-decoder, a model without softmax attention or with attention outside of transformers' interface, latent
            attention, or a model that does not run without storage.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder, whose two halves hold caches of two kinds; name a decoder, or an encoder alone"
        )
    context = context_of(config)
    if context is not None and dms.window >= context:
        raise ValueError(f"window is {dms.window} and the model's context is {context} tokens; choose a window below the context")
    model = _build(config)
    short = _run(model, _SHORT)
    if not short.calls:
        raise ValueError(f"{type(model).__name__} has no softmax attention that calls transformers' interface, and no KV cache to analyse")
    is_encoder = not any(call.causal for call in short.calls)
    if is_encoder:
        # Without a head for language: what encoders are used for needs a small one or none.
        model = _build(config, headless=True)
        short = _run(model, _SHORT)
    elif model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is a decoder without a head for language, and what it decodes is not known")
    long = _run(model, _LONG)
    decoded = None if is_encoder else _run(model, 1, short.cache)
    gated, gates, why_dense = (set(), 0, "an encoder reads once and keeps nothing") if is_encoder else _gates(config, dms)
    return InferenceShape(
        name=type(model).__name__,
        attentions=[_attention(call, short.cache, gated) for call in short.calls],
        weights=list(short.counted.weights.values()),
        tokens=_SHORT,
        prefill=_per_token(short.counted, long.counted),
        decode=None if decoded is None else Work(decoded.counted.flops, decoded.counted.activations),
        state=0 if is_encoder else sum(x.nbytes for layer in short.cache.layers for x in _state(layer)),
        gate_parameters=gates,
        context=context,
        why_dense=why_dense,
    )


@dataclass(frozen=True)
class _Call:
    """What one attention layer was asked for; shapes [B, heads, tokens, D]."""

    layer: int
    query: torch.Size
    key: torch.Size
    value: torch.Size
    causal: bool
    window: int | None


@dataclass(frozen=True)
class _Run:
    counted: Counting
    calls: list[_Call]
    cache: object


def _build(config, headless: bool = False) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        # It says how the files hold weights; what is analysed computes with them whole.
        del config.quantization_config
    makers = {AutoModelForCausalLM: "MODEL_FOR_CAUSAL_LM_MAPPING", AutoModelForImageTextToText: "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"}
    fitting = [maker for maker, name in makers.items() if type(config) in getattr(modeling_auto, name)]
    maker = AutoModel if headless or not fitting else fitting[0]
    try:
        # Products of experts run without storage in bfloat16 alone.
        with torch.device("meta"):
            model = maker.from_config(config, dtype=torch.bfloat16).eval()
    except Exception as error:
        # Each modelling file has errors of its own for values that do not go together.
        raise ValueError(f"no {config.model_type} model can be built from this configuration: {type(error).__name__}: {error}") from error
    # Some models look for padding in what they read, and there is nothing to read.
    model.config.pad_token_id = None
    return model


def _run(model: nn.Module, num_tokens: int, cache=None) -> _Run:
    """Pass tokens through the model, after those in the cache."""
    from transformers import AttentionInterface, AttentionMaskInterface

    calls: list[_Call] = []

    def note(module: nn.Module, query, key, value, attention_mask, **kwargs):
        given = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if given is None else given)
        place = getattr(module, "layer_idx", None)
        window = kwargs.get("sliding_window") or None
        calls.append(_Call(len(calls) if place is None else int(place), query.shape, key.shape, value.shape, causal, window))
        B, Hq, N, _ = query.shape
        return query.new_empty(B, N, Hq, value.shape[-1]), None

    AttentionInterface.register(_NOTING, note)
    AttentionMaskInterface.register(_NOTING, lambda *args, **kwargs: None)
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if cache is not None:
        options |= cache_argument(model, cache)
    counted = Counting(model)
    try:
        model.set_attn_implementation(_NOTING)
        with torch.no_grad(), counted:
            out = model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device="meta"), use_cache=True, **options)
    except Exception as error:
        # Modelling files fail in their own ways where they ask tensors for values.
        raise ValueError(
            f"{type(model).__name__} does not run on tensors without storage ({type(error).__name__}: {error}), which is how shapes are measured"
        ) from error
    return _Run(counted, calls, output_cache(out))


def _attention(call: _Call, cache, gated: set[int]) -> Attention:
    keeper = None if cache is None or call.layer >= len(cache.layers) else cache.layers[call.layer]
    held = getattr(keeper, "keys", None)
    if held is not None and (held.shape[1], held.shape[3]) != (call.key[1], call.key[3]):
        raise ValueError(
            f"layer {call.layer} keeps {held.shape[1]} x {held.shape[3]} numbers a token and attends to keys of {call.key[1]} x {call.key[3]} (latent "
            "attention): what is unfolded at each step is not analysed, and there is nothing that DMS could evict"
        )
    return Attention(
        layer=call.layer,
        num_query_heads=call.query[1],
        num_heads=call.key[1],
        key_dim=call.key[3],
        value_dim=call.value[3],
        # Attention by chunks is told by its mask and by its cache; taken as a window of a chunk, it sees that much at most.
        window=call.window or getattr(keeper, "sliding_window", None),
        causal=call.causal,
        holds=held is not None,
        gated=call.layer in gated,
    )


def _gates(config, dms: DMSConfig) -> tuple[set[int], int, str | None]:
    """Layers that can carry gates, the gates' parameters, and why there are none."""
    try:
        with torch.device("meta"):
            model = retrofit(_build(config), dms)
    except ValueError as error:
        return set(), 0, str(error)
    return {layer.index for layer in model.dms.layers}, sum(p.numel() for name, p in model.named_parameters() if "dms_gate" in name), None


def _per_token(short: Counting, long: Counting) -> Work:
    """A line through the counts of two lengths."""
    flops, numbers = ((getattr(long, name) - getattr(short, name)) / (_LONG - _SHORT) for name in ("flops", "activations"))
    return Work(flops, numbers, short.flops - _SHORT * flops, short.activations - _SHORT * numbers)


def _state(layer) -> list[torch.Tensor]:
    """What a cache layer holds beside keys and values."""
    values = {name: value for name, value in vars(layer).items() if name not in ("keys", "values")}
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_floating_point()]

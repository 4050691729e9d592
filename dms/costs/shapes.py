"""What a model is made of, measured on the meta device: no formula per family.

The model is built without storage and tokens are passed through it (`dms.costs.meta_passes`). Plans of training and analyses of inference
use the same shape.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from dms.config import DMSConfig
from dms.costs.meta_passes import MetaPass, RecordedCall, build, run
from dms.costs.operators import ProductCounter, Weight, tensors_in
from dms.costs.packed_weights import Packing, is_attached, packed_linears, packing_of, sides
from dms.modes import DMSState, state_of
from dms.retrofitting import retrofit

# Tokens of the two passes: what is chunked (linear attention) is chunked by 256 at most.
_SHORT, _LONG = 256, 512
# The projection after attention; what else an attention layer multiplies by comes before.
_OUTPUT_PROJECTION = re.compile(r"o_proj|out_proj|dense|c_proj|\bwo\b")
# Attention by `dms.training.packed_attention`, which needs no masks; otherwise transformers' own, by its name.
PACKED_ATTENTION = "packed attention"


@dataclass(frozen=True)
class AttentionShape:
    """What one attention layer was asked for."""

    layer: int
    num_query_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """Tokens that it sees, its own included; None: all."""
    causal: bool
    holds: bool
    """It keeps its own keys and values, instead of another layer's."""
    gated: bool
    """Gates can evict here: its own, or that of the layer whose keys and values it reads."""


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Parameters are those that a token is multiplied by: of experts, those that it meets."""

    index: int
    kind: str
    """Layers of one kind cost the same."""
    attention: AttentionShape | None
    """None: it has none, such as a layer of linear attention."""
    trains: bool
    qkv: int
    """Before attention."""
    out: int
    """After attention."""
    rest: int
    """Everything else of the base."""
    last: int
    """Of the rest: a product whose result nothing saves, so that a recomputation stops before it."""
    gate: int
    adapters: int
    num_parameters: int
    has_experts: bool

    @property
    def linear(self) -> int:
        """Of the base, without gate and adapters."""
        return self.qkv + self.out + self.rest

    @property
    def gated(self) -> bool:
        return self.attention is not None and self.attention.gated

    @property
    def runs(self) -> bool:
        """Text passes through it; it passes by layers that read images by cross-attention."""
        return self.linear > 0


@dataclass(frozen=True)
class Work:
    """Products outside of attention. A prompt's logits are those of its last token: once for each sequence."""

    flops: float
    """For each token."""
    numbers: float
    """Read beside weights, and written, for each token."""
    flops_once: float = 0.0
    numbers_once: float = 0.0


@dataclass(frozen=True)
class InferenceWork:
    """What a prompt and a decoding step take beside attention."""

    prefill: Work
    decode: Work | None
    """None for an encoder."""
    state: int
    """Bytes of linear attention and convolutions, for each sequence."""


@dataclass(frozen=True)
class ModelShape:
    """A model, and what is attached to it."""

    name: str
    attentions: list[AttentionShape]
    layers: list[LayerShape]
    """Empty where layers do not stand in one list."""
    weights: list[Weight]
    """As `tokens` tokens used them; without gates and adapters."""
    tokens: int
    gates: int
    """Numbers in all gates, float32."""
    adapters: int
    hidden_size: int
    """Of the head for language; 0: there is none."""
    vocab_size: int
    softcap: float | None
    """Of the logits."""
    attention: str | None
    """What the teacher and layers without gates attend by: a name of transformers', or PACKED_ATTENTION; None where only inference was asked about."""
    context: int | None
    """As the configuration says; None: it does not."""
    is_encoder: bool
    why_dense: str | None
    """Why no gates can be attached; None: they can."""
    packing: Packing | None = None
    """How its base is quantised; None: it is whole."""
    work: InferenceWork | None = None
    """None where only training was asked about."""

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    def weight_bytes(self, itemsize: int) -> int:
        """Of the whole base. itemsize: of a number that is not packed."""
        return self.packed_bytes + itemsize * (self.parameters - self.num_packed)

    @property
    def packed_bytes(self) -> int:
        """Of codes and scales."""
        return sum(weight.packed or 0 for weight in self.weights)

    @property
    def num_packed(self) -> int:
        """Parameters that are packed."""
        return sum(weight.numel for weight in self.weights if weight.packed is not None)

    @property
    def inference(self) -> InferenceWork:
        assert self.work is not None, "this shape was measured for training alone"
        return self.work

    @property
    def largest_layer(self) -> int:
        return max(layer.num_parameters for layer in self.layers)

    @property
    def first_trained(self) -> int:
        """Position of the first layer with anything to train; before it nothing is differentiated."""
        return next((place for place, layer in enumerate(self.layers) if layer.trains), len(self.layers))

    @property
    def num_gated(self) -> int:
        """Layers that have gates. Borrowed ones have no weights, and no layer follows another there."""
        return sum(layer.gate > 0 for layer in self.layers) or sum(layer.gated for layer in self.layers)


def context_of(config: PreTrainedConfig) -> int | None:
    """The longest context that a transformers configuration names, in tokens."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def measure(config: PreTrainedConfig, dms: DMSConfig, *, packed: bool = True) -> ModelShape:
    """Measure a model for inference, by its transformers configuration. dms: of its gates, where it can carry them. packed: its weights
    are, as far as the configuration says so.

    Raises:
        ValueError: an encoder-decoder, a model without softmax attention or with attention outside of transformers' interface, latent
            attention, or a model that does not run without storage.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder, whose two halves hold caches of two kinds; name a decoder, or an encoder alone"
        )
    context = context_of(config)
    if context is not None:
        dms.check_context(context)
    packing = packing_of(config) if packed else None
    model = build(config)
    short = run(model, _SHORT)
    if not short.calls:
        raise ValueError(f"{type(model).__name__} has no softmax attention that calls transformers' interface, and no KV cache to analyse")
    if short.is_encoder:
        # Without a head for language: what encoders are used for needs a small one or none.
        model = build(config, headless=True)
        short = run(model, _SHORT)
    elif model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is a decoder without a head for language, and what it decodes is not known")
    long = run(model, _LONG)
    decoded = None if short.cache is None else run(model, 1, short.cache)
    work = InferenceWork(
        prefill=_per_token(short.counted, long.counted),
        decode=None if decoded is None else Work(decoded.counted.flops, decoded.counted.activations),
        state=0 if short.cache is None else sum(x.nbytes for layer in short.cache.layers for x in _state(layer)),
    )
    why_dense = "an encoder reads once and keeps nothing" if short.is_encoder else None
    if why_dense is None:
        try:
            with torch.device("meta"):
                retrofit(model, dms)
        except ValueError as error:
            why_dense = str(error)
    return _shape(model, model, short, None, why_dense, packing, work)


def measure_training(model: nn.Module, packing: Packing | None = None) -> ModelShape:
    """Measure a retrofitted model, on any device, for training; `requires_grad` says what trains. packing: how its base will be
    quantised; None: not at all.

    Raises:
        ValueError: a model that does not run without storage.
    """
    # Its twin has neither gates nor adapters, and is bfloat16.
    base = build(_config_of(model))
    return _shape(model, base, run(base, _SHORT), state_of(model).original_attention, None, packing, None)


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, of a retrofitted model."""
    return _list_around(model, state_of(model).layers[0].name)


def _list_around(model: nn.Module, name: str) -> nn.ModuleList:
    """The list of layers that a module is in, by its name."""
    found = model.get_submodule(re.sub(r"\.\d+\..*$", "", name))
    return found if isinstance(found, nn.ModuleList) else nn.ModuleList()


def _config_of(model: nn.Module) -> PreTrainedConfig:
    config = model.config
    assert isinstance(config, PreTrainedConfig)
    return config


def _per_token(short: ProductCounter, long: ProductCounter) -> Work:
    """A line through the counts of two lengths."""
    flops = (long.flops - short.flops) / (_LONG - _SHORT)
    numbers = (long.activations - short.activations) / (_LONG - _SHORT)
    return Work(flops, numbers, short.flops - _SHORT * flops, short.activations - _SHORT * numbers)


def _state(layer: Any) -> list[torch.Tensor]:
    """What a cache layer holds beside keys and values."""
    values = {name: value for name, value in vars(layer).items() if name not in ("keys", "values")}
    return [x for x in tensors_in(values) if x.is_floating_point()]


# What was seen, as a shape.


def _shape(
    model: Any,
    base: nn.Module,
    seen: MetaPass,
    attention: str | None,
    why_dense: str | None,
    packing: Packing | None,
    work: InferenceWork | None,
) -> ModelShape:
    """model: with gates and adapters, where there are any; base: what ran."""
    if packing is not None:
        _mark_packed(base, seen.counted, packing)
    state: DMSState | None = getattr(model, "dms", None)
    gated = {layer.index for layers in (state.layers, state.following) for layer in layers} if state is not None else set()
    attentions = [_attention(call, seen.cache, gated) for call in seen.calls]
    config = _config_of(model)
    head = model.get_output_embeddings()
    vocab_size, hidden_size = (0, 0) if head is None else head.weight.shape
    attached = {name: p.numel() for name, p in model.named_parameters() if is_attached(name)}
    return ModelShape(
        name=type(base).__name__,
        attentions=attentions,
        layers=_layers(model, base, seen, attentions),
        weights=seen.counted.weights,
        tokens=_SHORT,
        gates=sum(numel for name, numel in attached.items() if "dms_gate" in name),
        adapters=sum(numel for name, numel in attached.items() if "lora_" in name),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        softcap=getattr(config.get_text_config(), "final_logit_softcapping", None),
        attention=attention,
        context=context_of(config),
        is_encoder=seen.is_encoder,
        why_dense=why_dense,
        packing=packing,
        work=work,
    )


def _mark_packed(base: nn.Module, counted: ProductCounter, packing: Packing) -> None:
    """Say of every weight that a kind packs how many bytes it takes."""
    for linear in packed_linears(base, packing).values():
        assert isinstance(linear.weight, torch.Tensor)
        weight = counted.weight_of(linear.weight)
        if weight is not None:
            weight.packed = packing.bytes_of(*sides(linear))
    for parameter in base.parameters() if packing.packs_experts else ():
        weight = counted.weight_of(parameter)
        if weight is not None and weight.num_experts and parameter.dim() == 3:
            weight.packed = weight.num_experts * packing.bytes_of(*parameter.shape[1:])


def _attention(call: RecordedCall, cache: Cache | None, gated: set[int]) -> AttentionShape:
    keeper = None if cache is None or call.layer >= len(cache.layers) else cache.layers[call.layer]
    held = getattr(keeper, "keys", None)
    if held is not None and (held.shape[1], held.shape[3]) != (call.key[1], call.key[3]):
        raise ValueError(
            f"layer {call.layer} keeps {held.shape[1]} x {held.shape[3]} numbers a token and attends to keys of {call.key[1]} x {call.key[3]} (latent "
            "attention): what is unfolded at each step is not analysed, and there is nothing that DMS could evict"
        )
    return AttentionShape(
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


def _layers(model: nn.Module, base: nn.Module, seen: MetaPass, attentions: list[AttentionShape]) -> list[LayerShape]:
    names = {module: name for name, module in base.named_modules()}
    first = names[seen.modules[0]]
    # A layer that reads another one's keys runs after that very one alone.
    sources = {call.layer: call.source for call in seen.calls if call.source is not None and call.source != call.layer}
    of_module = dict(zip(seen.modules, attentions, strict=True))
    blocks = zip(_list_around(model, first), _list_around(base, first), strict=True)
    found = []
    for place, (block, bare) in enumerate(blocks):
        attention = next(((name, of_module[module]) for name, module in bare.named_modules() if module in of_module), None)
        index = -1 if attention is None else attention[1].layer
        source = sources.get(index, index if index in sources.values() else None)
        found.append(_layer(place, block, bare, seen.counted, attention, source))
    return found


def _layer(
    place: int,
    block: nn.Module,
    bare: nn.Module,
    counted: ProductCounter,
    attention: tuple[str, AttentionShape] | None,
    source: int | None,
) -> LayerShape:
    """block: with what is attached to it; bare: what ran, without. attention: its name within the layer, and its shape. source: the
    layer whose keys it reads, or it itself where others read its own; None: neither."""
    qkv = out = rest = 0
    products: list[tuple[Weight, int]] = []
    for name, parameter in bare.named_parameters():
        weight = counted.weight_of(parameter)
        if weight is None or not weight.flops:
            continue
        numbers = weight.flops // (2 * _SHORT)
        products.append((weight, numbers))
        if attention is None or not name.startswith(f"{attention[0]}."):
            rest += numbers
        elif _OUTPUT_PROJECTION.search(name.removeprefix(attention[0])):
            out += numbers
        else:
            qkv += numbers
    shape, gated = (None, False) if attention is None else (attention[1], attention[1].gated)
    shapes = [tuple(p.shape) for p in block.parameters()]
    return LayerShape(
        index=place,
        kind=f"{type(block).__name__}, {'gated' if gated else 'not gated'}, {hash(tuple(shapes)) & 0xFFFFFF:06x}"
        + ("" if source is None else f", keys of layer {source}"),
        attention=shape,
        trains=any(p.requires_grad for p in block.parameters()),
        qkv=qkv,
        out=out,
        rest=rest,
        last=_last(bare, products),
        gate=_matrices(block, lambda name: "dms_gate" in name),
        adapters=_matrices(block, lambda name: "lora_" in name),
        num_parameters=sum(p.numel() for p in block.parameters()),
        has_experts=any(weight.use == "experts" for weight, _ in products),
    )


def _last(block: nn.Module, products: list[tuple[Weight, int]]) -> int:
    """Parameters of the product that a layer ends in; 0 where it ends in experts or in a norm."""
    weight, numbers = products[-1] if products else (None, 0)
    ends_in_norm = any("post_feedforward" in name for name, _ in block.named_modules())
    return 0 if ends_in_norm or weight is None or weight.num_experts else numbers


def _matrices(block: nn.Module, wanted: Callable[[str], bool]) -> int:
    return sum(p.numel() for name, p in block.named_parameters() if wanted(name) and p.dim() > 1)

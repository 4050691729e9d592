"""Sizes of a model, read from the model itself on the meta device, with its gates (and adapters) attached."""

import re
from dataclasses import dataclass

from torch import nn

from dms.retrofitting import state_of

# The projection after attention; what else an attention layer multiplies by comes before.
_OUTPUT_PROJECTION = re.compile(r"o_proj|out_proj|dense|c_proj|\bwo\b")


# Attention by `dms.training.packed_attention`, which needs no masks.
ROWS = "rows"


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Parameters are those that a token is multiplied by: of experts, those that are active.

    kind: layers of one kind cost the same. sliding: the layer's own window, None: full attention. qkv, out, rest: before
    attention, after it, everything else; last, of the rest: a product whose result nothing saves, so that a recomputation stops before
    it. gate, adapters: what was attached.
    """

    index: int
    kind: str
    gated: bool
    trains: bool
    num_query_heads: int
    num_heads: int
    head_dim: int
    sliding: int | None
    qkv: int
    out: int
    rest: int
    last: int
    gate: int
    adapters: int
    num_parameters: int
    has_experts: bool

    @property
    def linear(self) -> int:
        """Of the base, without gate and adapters."""
        return self.qkv + self.out + self.rest


@dataclass(frozen=True)
class ModelShape:
    """parameters: of the base, everything that is loaded. softcap: of the logits. attention: of the teacher and of
    layers without gates, transformers' own or ROWS."""

    name: str
    layers: list[LayerShape]
    hidden_size: int
    vocab_size: int
    parameters: int
    gates: int
    adapters: int
    softcap: float | None
    attention: str
    largest_layer: int

    @property
    def first_trained(self) -> int:
        """Position of the first layer with anything to train; before it nothing is differentiated."""
        return next((place for place, layer in enumerate(self.layers) if layer.trains), len(self.layers))

    @property
    def num_gated(self) -> int:
        return sum(layer.gated for layer in self.layers)


def measure(model: nn.Module) -> ModelShape:
    """Read the sizes of a retrofitted model, on any device; `requires_grad` says what trains."""
    state = state_of(model)
    text = model.config.get_text_config()
    gated = {layer.index: layer for layer in state.layers}
    layers = [_measure_layer(place, block, text, gated) for place, block in enumerate(layer_list(model))]
    named = {id(p): (name, p) for name, p in model.named_parameters()}.values()
    head = model.get_output_embeddings().weight
    return ModelShape(
        name=type(model).__name__,
        layers=layers,
        hidden_size=head.shape[1],
        vocab_size=head.shape[0],
        parameters=sum(p.numel() for name, p in named if not _is_attached(name)),
        gates=sum(p.numel() for name, p in named if "dms_gate" in name),
        adapters=sum(p.numel() for name, p in named if "lora_" in name),
        softcap=getattr(text, "final_logit_softcapping", None),
        attention=state.original_attention,
        largest_layer=max(layer.num_parameters for layer in layers),
    )


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    first = state_of(model).layers[0].name
    path = re.sub(r"\.\d+\..*$", "", first)
    return model.get_submodule(path)


def _is_attached(name: str) -> bool:
    return "dms_gate" in name or "lora_" in name


def _measure_layer(place: int, block: nn.Module, text, gated: dict) -> LayerShape:
    attention_name, attention = next(((n, m) for n, m in block.named_modules() if type(m).__name__.endswith("Attention")), ("", None))
    sums = dict.fromkeys(("qkv", "out", "rest", "gate", "adapters"), 0)
    for name, parameter in block.named_parameters():
        if parameter.dim() < 2:
            continue
        if "dms_gate" in name:
            part = "gate"
        elif "lora_" in name:
            part = "adapters"
        elif attention_name and name.startswith(f"{attention_name}."):
            part = "out" if _OUTPUT_PROJECTION.search(name.removeprefix(attention_name)) else "qkv"
        else:
            part = "rest"
        sums[part] += round(parameter.numel() * _active_share(parameter, text))
    matrices = [p for name, p in block.named_parameters() if p.dim() >= 2 and not _is_attached(name)]
    has_norm_after = any("post_feedforward" in name for name, _ in block.named_modules())
    num_query_heads = int(text.num_attention_heads)
    layer = gated.get(place)
    num_heads = num_query_heads // int(getattr(attention, "num_key_value_groups", 1))
    sliding = None if layer is not None else getattr(attention, "sliding_window", None) or getattr(text, "sliding_window", None)
    shapes = [tuple(p.shape) for name, p in block.named_parameters()]
    return LayerShape(
        index=place,
        kind=f"{type(block).__name__}, {'gated' if layer is not None else 'not gated'}, {hash(tuple(shapes)) & 0xFFFFFF:06x}",
        gated=layer is not None,
        trains=any(p.requires_grad for p in block.parameters()),
        num_query_heads=num_query_heads,
        num_heads=num_heads,
        head_dim=int(getattr(attention, "head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // num_query_heads),
        sliding=sliding,
        last=0 if has_norm_after or matrices[-1].dim() > 2 else matrices[-1].numel(),
        num_parameters=sum(p.numel() for p in block.parameters()),
        has_experts=any(_active_share(p, text) < 1.0 for p in matrices),
        **sums,
    )


def _active_share(parameter: nn.Parameter, text) -> float:
    """Experts' weights are [experts, in, out], and a token meets few of them."""
    num_experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if parameter.dim() != 3 or not num_experts or parameter.shape[0] != num_experts:
        return 1.0
    return int(text.num_experts_per_tok) / int(num_experts)

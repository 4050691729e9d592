"""FLOPs and bytes of a prefill and of a decoding step on one GPU, and what it holds."""

from collections.abc import Iterable
from dataclasses import dataclass

from dms.costs import kv as caches
from dms.costs.counting import Weight
from dms.costs.inference_shapes import Attention, InferenceShape, Work
from dms.costs.kv import KV
from dms.costs.training_memory import CONTEXT_BYTES, NCCL_BYTES

_NUMBER = 2
_GATE_NUMBER = 4


@dataclass(frozen=True, kw_only=True)
class Machine:
    """num: GPUs that share the model by tensor parallelism: weights, heads and products divided, links between them not counted.
    weight_bits: 16, or 8: matrices are read as bytes and multiplied at 16 bits."""

    num: int = 1
    weight_bits: int = 16


@dataclass(frozen=True)
class Cost:
    """On one GPU. flops: linear layers; attention_flops: scores and sums. Bytes: weights; kv_read, kv_written; state of linear
    attention, read and written; activations: what products read beside weights and write."""

    flops: float
    attention_flops: float
    weights: float
    kv_read: float
    kv_written: float
    state: float
    activations: float

    @property
    def all_flops(self) -> float:
        return self.flops + self.attention_flops

    @property
    def bytes(self) -> float:
        return self.weights + self.kv_read + self.kv_written + self.state + self.activations

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.all_flops / self.bytes


def decode(shape: InferenceShape, kv: KV, machine: Machine, batch: int, context: int) -> Cost:
    """One step of `batch` sequences; context: tokens of each, the new one included."""
    layers = shape.attentions
    pairs = [caches.entries_seen(layer, kv, context) for layer in layers]
    read = _over_heads(layers, machine, (caches.read_bytes(layer, kv, context) for layer in layers))
    written = _over_heads(layers, machine, (caches.written_bytes(layer, kv, context) for layer in layers))
    return _cost(shape, shape.decode, kv, machine, batch, 1, pairs, read, written, states=2)


def prefill(shape: InferenceShape, kv: KV, machine: Machine, batch: int, context: int) -> Cost:
    """`batch` prompts of `context` tokens. Keys and values are read once: what is read again comes from the GPU's own caches."""
    layers = shape.attentions
    pairs = [caches.prompt_pairs(layer, kv, context) for layer in layers]
    read = _over_heads(layers, machine, (context * (layer.key_dim + layer.value_dim) * _NUMBER for layer in layers))
    written = _over_heads(layers, machine, (caches.prompt_written_bytes(layer, kv, context) for layer in layers))
    return _cost(shape, shape.prefill, kv, machine, batch, context, pairs, read, written, states=1)


def _cost(
    shape: InferenceShape, work: Work, kv: KV, machine: Machine, batch: int, tokens: int, pairs: list[float], read, written, states: int
) -> Cost:
    gates = 0 if kv.cr is None else shape.gate_parameters
    products = work.flops_once + tokens * (work.flops + 2.0 * gates)
    numbers = work.numbers_once + tokens * work.numbers
    attention = 0.0
    for layer, count in zip(shape.attentions, pairs, strict=True):
        heads = _share(layer.num_query_heads, machine)
        width = layer.key_dim + layer.value_dim
        attention += 2.0 * heads * width * count
        # Queries and what comes out; keys and values are counted as such.
        numbers += tokens * heads * width * machine.num
    return Cost(
        flops=batch * products / machine.num,
        attention_flops=batch * attention,
        weights=read_weights(shape, kv, machine, batch * tokens),
        kv_read=batch * read,
        kv_written=batch * written,
        state=batch * states * shape.state / machine.num,
        activations=batch * numbers * _NUMBER / machine.num,
    )


def _share(heads: int, machine: Machine) -> int:
    """Heads of one GPU; where there are fewer than GPUs, several have the same one."""
    return -(-heads // machine.num)


def _over_heads(layers: list[Attention], machine: Machine, of_one: Iterable[float]) -> float:
    return sum(_share(layer.num_heads, machine) * bytes_ for layer, bytes_ in zip(layers, of_one, strict=True))


def read_weights(shape: InferenceShape, kv: KV, machine: Machine, tokens: int) -> float:
    """Bytes of weights that a pass over so many tokens reads, all sequences together."""
    gates = 0 if kv.cr is None else shape.gate_parameters * _GATE_NUMBER
    return (sum(_numbers_read(w, tokens, shape.tokens) * _bytes_each(w, machine) for w in shape.weights) + gates) / machine.num


def _numbers_read(weight: Weight, tokens: int, seen: int) -> float:
    """By so many tokens; seen: those of the pass in which the weight's use was counted."""
    if weight.use == "experts":
        return weight.numel / weight.num_experts * experts_met(weight.num_experts, weight.rows / seen, tokens)
    if weight.use == "rows":
        return min(weight.numel, weight.rows / seen * tokens)
    return 0.0 if weight.use == "none" else weight.numel


def experts_met(num_experts: int, picks: float, tokens: int) -> float:
    """Distinct experts that tokens are expected to read, each picking so many: independently, and every expert as often."""
    return num_experts * (1 - (1 - picks / num_experts) ** tokens)


def _bytes_each(weight: Weight, machine: Machine) -> int:
    return 1 if machine.weight_bits == 8 and weight.use in ("product", "experts") else _NUMBER


def resident_weights(shape: InferenceShape, kv: KV, machine: Machine) -> float:
    """Bytes of all weights, those that a pass of text never touches (vision towers) included."""
    gates = 0 if kv.cr is None else shape.gate_parameters * _GATE_NUMBER
    return (sum(w.numel * _bytes_each(w, machine) for w in shape.weights) + gates) / machine.num


def held(shape: InferenceShape, kv: KV, machine: Machine, batch: int, context: int) -> float:
    """Bytes while `batch` sequences of `context` tokens are decoded: weights, caches, a step's activations, the driver's context."""
    return fixed(shape, kv, machine) + batch * sequence_bytes(shape, kv, machine, context)


def fixed(shape: InferenceShape, kv: KV, machine: Machine) -> float:
    """What is held without any sequence."""
    return resident_weights(shape, kv, machine) + CONTEXT_BYTES + (NCCL_BYTES if machine.num > 1 else 0)


def sequence_bytes(shape: InferenceShape, kv: KV, machine: Machine, context: int) -> float:
    """What one sequence holds beside."""
    layers = shape.attentions
    cache = _over_heads(layers, machine, (caches.held_bytes(layer, kv, context) for layer in layers))
    cache += sum(caches.SEQUENCE_COUNTS for layer in layers if kv.evicts(layer))
    # Of one layer at a time.
    step = (shape.decode or shape.prefill).numbers / len(layers) * (context if shape.is_encoder else 1)
    return cache + (shape.state + step * _NUMBER) / machine.num

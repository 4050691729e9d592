"""FLOPs and bytes of a prefill and of a decoding step on one GPU, what it holds, and what fits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dms.costs import kv as caches
from dms.costs.flops import attention_flops, heads_of_one
from dms.costs.kv import KV
from dms.costs.memory import CONTEXT_BYTES, NCCL_BYTES
from dms.costs.operators import Weight
from dms.costs.roofline import Roofline, Seconds
from dms.costs.shapes import AttentionShape, ModelShape, Work

_NUMBER = 2
_GATE_NUMBER = 4
# Bytes of a number in a matrix by `weight_bits`; of 4, with a 16-bit scale for each 128.
_MATRIX_NUMBER = {8: 1.0, 4: 0.5 + 2 / 128}
# No context is asked about beyond this.
FAR = 2**34


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a model is laid on GPUs."""

    num: int = 1
    """GPUs that share it by tensor parallelism: weights, heads and products divided, links between them not counted."""
    weight_bits: int | None = None
    """16; 8 or 4: matrices are read so and multiplied at 16 bits, scales of 4 bits counted; None: as the model's own configuration has
    it, 16 where it is not quantised."""


@dataclass(frozen=True)
class PassCost:
    """Of a prefill or of a decoding step, on one GPU: FLOPs, and bytes by what they are of."""

    flops: float
    """Of linear layers."""
    attention_flops: float
    """Of scores and sums."""
    weights: float
    kv_read: float
    kv_written: float
    state: float
    """Of linear attention, read and written."""
    activations: float
    """What products read beside weights, and write."""

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

    def seconds(self, roofline: Roofline) -> Seconds:
        return roofline.seconds(self.all_flops, self.bytes)

    def binds(self, roofline: Roofline) -> str:
        """ "compute", or what is most of the bytes."""
        if self.seconds(roofline).limit == "compute":
            return "compute"
        moved = {"weights": self.weights, "KV": self.kv_read + self.kv_written, "state": self.state, "activations": self.activations}
        return max(moved, key=lambda name: moved[name])


def decode(shape: ModelShape, kv: KV, machine: Machine, batch: int, context: int) -> PassCost:
    """One step of `batch` sequences; context: tokens of each, the new one included."""
    layers = shape.attentions
    pairs = [caches.entries_seen(layer, kv, context) for layer in layers]
    read = over_heads(layers, machine, (caches.read_bytes(layer, kv, context) for layer in layers))
    written = over_heads(layers, machine, (caches.written_bytes(layer, kv, context) for layer in layers))
    work = shape.inference.decode
    assert work is not None, "an encoder decodes nothing"
    return _cost(shape, work, kv, machine, batch, 1, pairs, read, written, states=2)


def prefill(shape: ModelShape, kv: KV, machine: Machine, batch: int, context: int) -> PassCost:
    """`batch` prompts of `context` tokens. Keys and values are read once: what is read again comes from the GPU's own caches."""
    layers = shape.attentions
    pairs = [caches.prompt_pairs(layer, kv, context) for layer in layers]
    read = over_heads(layers, machine, (context * (layer.key_dim + layer.value_dim) * _NUMBER for layer in layers))
    written = over_heads(layers, machine, (caches.prompt_written_bytes(layer, kv, context) for layer in layers))
    return _cost(shape, shape.inference.prefill, kv, machine, batch, context, pairs, read, written, states=1)


def _cost(
    shape: ModelShape,
    work: Work,
    kv: KV,
    machine: Machine,
    batch: int,
    tokens: int,
    pairs: list[float],
    read: float,
    written: float,
    states: int,
) -> PassCost:
    gates = 0 if kv.cr is None else shape.gates
    products = work.flops_once + tokens * (work.flops + 2.0 * gates)
    numbers = work.numbers_once + tokens * work.numbers
    attention = 0.0
    for layer, count in zip(shape.attentions, pairs, strict=True):
        attention += attention_flops(layer, count, num_gpus=machine.num)
        # Queries and what comes out; keys and values are counted as such.
        numbers += tokens * heads_of_one(layer.num_query_heads, machine.num) * (layer.key_dim + layer.value_dim) * machine.num
    return PassCost(
        flops=batch * products / machine.num,
        attention_flops=batch * attention,
        weights=read_weights(shape, kv, machine, batch * tokens),
        kv_read=batch * read,
        kv_written=batch * written,
        state=batch * states * shape.inference.state / machine.num,
        activations=batch * numbers * _NUMBER / machine.num,
    )


def over_heads(layers: list[AttentionShape], machine: Machine, of_one: Iterable[float]) -> float:
    """On one GPU; of_one: for each KV head of each layer."""
    return sum(heads_of_one(layer.num_heads, machine.num) * bytes_ for layer, bytes_ in zip(layers, of_one, strict=True))


def read_weights(shape: ModelShape, kv: KV, machine: Machine, tokens: int) -> float:
    """Bytes of weights that a pass over so many tokens reads, all sequences together."""
    gates = 0 if kv.cr is None else shape.gates * _GATE_NUMBER
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


def _bytes_each(weight: Weight, machine: Machine) -> float:
    if machine.weight_bits is None:
        return _NUMBER if weight.packed is None else weight.packed / weight.numel
    return _MATRIX_NUMBER.get(machine.weight_bits, _NUMBER) if weight.use in ("product", "experts") else _NUMBER


def weight_width(shape: ModelShape, machine: Machine) -> str:
    """How weights are read, as a person says it: "16 bits", or the model's own kind."""
    if machine.weight_bits is None and shape.packing is not None:
        return f"{shape.packing.name}, the rest 16 bits"
    return f"{machine.weight_bits or 16} bits"


def resident_weights(shape: ModelShape, kv: KV, machine: Machine) -> float:
    """Bytes of all weights, those that a pass of text never touches (vision towers) included."""
    gates = 0 if kv.cr is None else shape.gates * _GATE_NUMBER
    return (sum(w.numel * _bytes_each(w, machine) for w in shape.weights) + gates) / machine.num


def held(shape: ModelShape, kv: KV, machine: Machine, batch: int, context: int) -> float:
    """Bytes while `batch` sequences of `context` tokens are decoded: weights, caches, a step's activations, the driver's context."""
    return fixed(shape, kv, machine) + batch * sequence_bytes(shape, kv, machine, context)


def fixed(shape: ModelShape, kv: KV, machine: Machine) -> float:
    """What is held without any sequence."""
    return resident_weights(shape, kv, machine) + CONTEXT_BYTES + (NCCL_BYTES if machine.num > 1 else 0)


def sequence_bytes(shape: ModelShape, kv: KV, machine: Machine, context: int) -> float:
    """What one sequence holds beside."""
    # Of one layer at a time.
    work = shape.inference
    step = (work.decode or work.prefill).numbers / len(shape.attentions) * (context if shape.is_encoder else 1)
    return cache_bytes(shape, kv, machine, context) + step * _NUMBER / machine.num


def cache_bytes(shape: ModelShape, kv: KV, machine: Machine, context: int) -> float:
    """What one sequence holds between two steps: entries with all that is kept of them, and the state of linear attention."""
    layers = shape.attentions
    cache = over_heads(layers, machine, (caches.held_bytes(layer, kv, context) for layer in layers))
    cache += sum(caches.SEQUENCE_COUNTS for layer in layers if layer.holds and kv.evicts(layer))
    return cache + shape.inference.state / machine.num


# What fits, and where KV reads overtake weight reads.


def overtaken_at(shape: ModelShape, kv: KV, machine: Machine, batch: int) -> int | None:
    """The shortest context at which a decoding step reads as many bytes of KV as of weights; None: there is none."""
    return _first(lambda context: _kv_leads(decode(shape, kv, machine, batch, context)))


def _kv_leads(step: PassCost) -> bool:
    return step.kv_read >= step.weights


def largest_batch(shape: ModelShape, kv: KV, machine: Machine, memory: float, context: int) -> int:
    """Sequences of `context` tokens that fit a GPU of so many bytes; 0: none."""
    left = memory - fixed(shape, kv, machine)
    return max(0, int(left // sequence_bytes(shape, kv, machine, context)))


def largest_context(shape: ModelShape, kv: KV, machine: Machine, memory: float, batch: int) -> int | None:
    """Tokens of each of `batch` sequences that fit, whatever the model's own context; None: any number."""
    too_long = _first(lambda context: held(shape, kv, machine, batch, context) > memory)
    return None if too_long is None else too_long - 1


def _first(holds: Callable[[int], bool]) -> int | None:
    """The least context for which it holds; what holds for one holds for every longer one."""
    if not holds(FAR):
        return None
    low, high = 0, FAR
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high

"""FLOPs: two for each parameter that a token is multiplied by, two for each pair of a query and a key and number of a head.

Letters: T tokens, w window, D head dim, V vocabulary, M model dim.
"""

from dataclasses import dataclass

from dms.costs.job import Job
from dms.costs.lifetimes import Lifetimes
from dms.costs.shapes import PACKED_ATTENTION, AttentionShape, LayerShape, ModelShape

# QK^T and PV; backward: QK^T again, dV, dP, dQ, dK. Our kernels make the first and the third twice, and need no atomics so.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = {"kernels": 7, "chunked": 5}
# Where only the gate is differentiated (the first layer of a frozen base): QK^T and dP.
GATE_PRODUCTS = 2


def visible_pairs(tokens: int, window: int, keep: float, causal: bool = True) -> float:
    """Pairs of a query and a key that each query head computes: all keys at most `window` back, and `keep` of those farther."""
    return Lifetimes.alike([window], keep).pairs(tokens, causal)


def attention_flops(layer: AttentionShape, pairs: float, products: int = FORWARD_PRODUCTS, *, num_gpus: int = 1) -> float:
    """FLOPs of so many products of one layer's attention, half of them as wide as keys and half as values.

    pairs: of each query head. num_gpus: that share the heads, of which one has this much.
    """
    return products * heads_of_one(layer.num_query_heads, num_gpus) * (layer.key_dim + layer.value_dim) * pairs


def heads_of_one(num_heads: int, num_gpus: int) -> int:
    """Heads of one GPU; where there are fewer than GPUs, several have the same one."""
    return -(-num_heads // num_gpus)


@dataclass(frozen=True)
class TrainingFlops:
    """Of one sequence: linear layers, and the same with _attention: scores and sums."""

    teacher: float
    teacher_attention: float
    student: float
    student_attention: float
    recomputed: float
    recomputed_attention: float
    backward: float
    backward_attention: float
    loss: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def attention(self) -> float:
        return self.teacher_attention + self.student_attention + self.recomputed_attention + self.backward_attention

    def times(self, num_sequences: int) -> "TrainingFlops":
        return TrainingFlops(**{name: value * num_sequences for name, value in vars(self).items()})


def of_sequence(shape: ModelShape, job: Job, *, checkpointing: bool, route: str = "kernels", keep: float | None = None) -> TrainingFlops:
    """FLOPs of training on one sequence.

    keep: the share of tokens that stay beyond all windows; None: the run's mean of what its target asks for. Under activation checkpointing gated attention's results are kept, so that
    it is not run again.
    """
    lifetimes = job.mean_lifetimes if keep is None else Lifetimes.alike(job.windows, keep)
    sums = dict.fromkeys(TrainingFlops.__dataclass_fields__, 0.0)
    trains_base = job.trainable == "all"
    first = shape.first_trained
    for place, layer in enumerate(shape.layers):
        teacher, student = _pairs(layer, shape, job, lifetimes)
        linear = 2.0 * job.length * (layer.linear + layer.gate + layer.adapters)
        if job.has_teacher_pass:
            sums["teacher"] += 2.0 * job.length * layer.linear
            sums["teacher_attention"] += _attention(layer, teacher, FORWARD_PRODUCTS)
        sums["student"] += linear
        sums["student_attention"] += _attention(layer, student, FORWARD_PRODUCTS)
        if place < first:
            continue
        if checkpointing:
            sums["recomputed"] += linear - 2.0 * job.length * layer.last
            sums["recomputed_attention"] += 0.0 if layer.gated else _attention(layer, student, FORWARD_PRODUCTS)
        # Of a frozen base the first layer's input needs no gradient: nothing before attention does.
        is_first = place == first and not trains_base
        by_input = layer.linear - (layer.qkv if is_first else 0)
        by_weight = layer.linear if trains_base else 0
        attached = (layer.gate + layer.adapters) * (1 if is_first else 2)
        sums["backward"] += 2.0 * job.length * (by_input + by_weight + attached)
        only_gate = is_first and job.trainable == "gates"
        products = GATE_PRODUCTS if only_gate else BACKWARD_PRODUCTS[route] if layer.gated else BACKWARD_PRODUCTS["chunked"]
        sums["backward_attention"] += _attention(layer, student, products)
    # Logits of student and teacher, the gradient by the hidden states, and by the head where it trains.
    products = 2 + job.has_teacher_pass + trains_base
    sums["loss"] = 2.0 * job.length * shape.hidden_size * shape.vocab_size * products
    return TrainingFlops(**sums)


def _attention(layer: LayerShape, pairs: float, products: int) -> float:
    return 0.0 if layer.attention is None else attention_flops(layer.attention, pairs, products)


def _pairs(layer: LayerShape, shape: ModelShape, job: Job, lifetimes: Lifetimes) -> tuple[float, float]:
    """The teacher's and the student's pairs, of each query head.

    Of attention without a gate: ours computes the pairs that are seen, transformers' own those that are causal, or all where it goes by a
    mask.
    """
    if layer.attention is None:
        return 0.0, 0.0
    window = None if layer.gated else layer.attention.window
    slides = window is not None and window < job.length
    if shape.attention == PACKED_ATTENTION:
        dense = visible_pairs(job.length, window - 1 if window is not None else job.length, 0.0)
    elif job.packed or slides or shape.attention == "eager":
        dense = float(job.length**2)
    else:
        dense = visible_pairs(job.length, job.length, 0.0)
    return dense, lifetimes.pairs(job.length) if layer.gated else dense

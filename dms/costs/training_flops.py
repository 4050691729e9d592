"""FLOPs of training on one sequence: two for each parameter that a token is multiplied by, two for each pair and number of a head.

Letters: T tokens, w window, D head dim, V vocabulary, M model dim.
"""

from dataclasses import dataclass

from dms.costs.job import Job
from dms.costs.training_shapes import ROWS, LayerShape, ModelShape

# QK^T and PV; backward: QK^T again, dV, dP, dQ, dK. Our kernels make the first and the third twice, and need no atomics so.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = {"kernels": 7, "chunked": 5}
# Where only the gate is differentiated (the first layer of a frozen base): QK^T and dP.
GATE_PRODUCTS = 2


@dataclass(frozen=True)
class Flops:
    """Of one sequence. teacher, student, recomputed, backward: linear layers; the same with _attention: scores and sums."""

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


def kept_pairs(length: int, window: int, keep: float) -> float:
    """Pairs of a query and a key for each head, `keep` = 1 / CR: `keep (T-w)^2 / 2 + w T - w^2 / 2`."""
    window = min(window, length)
    return keep * (length - window) ** 2 / 2 + window * length - window**2 / 2


def of_sequence(shape: ModelShape, job: Job, *, checkpointing: bool, route: str = "kernels", keep: float | None = None) -> Flops:
    """FLOPs of training on one sequence.

    keep: 1 / CR of the far tokens; None: the run's mean. Under activation checkpointing gated attention's results are kept, so that
    it is not run again.
    """
    keep = job.mean_keep if keep is None else keep
    sums = dict.fromkeys(Flops.__dataclass_fields__, 0.0)
    trains_base = job.trainable == "all"
    first = shape.first_trained
    for place, layer in enumerate(shape.layers):
        dense = _attention_flops(layer, _dense_pairs_of(layer, shape, job))
        gated = _attention_flops(layer, kept_pairs(job.length, job.window, keep)) if layer.gated else dense
        student = 2.0 * job.length * (layer.linear + layer.gate + layer.adapters)
        if job.has_teacher_pass:
            sums["teacher"] += 2.0 * job.length * layer.linear
            sums["teacher_attention"] += FORWARD_PRODUCTS * dense
        sums["student"] += student
        sums["student_attention"] += FORWARD_PRODUCTS * gated
        if place < first:
            continue
        if checkpointing:
            sums["recomputed"] += student - 2.0 * job.length * layer.last
            sums["recomputed_attention"] += 0.0 if layer.gated else FORWARD_PRODUCTS * gated
        by_input, by_weight = layer.linear, layer.linear if trains_base else 0
        attached = layer.gate + layer.adapters
        is_first = place == first and not trains_base
        if is_first:
            # Its input needs no gradient: nothing before attention does.
            by_input -= layer.qkv
        sums["backward"] += 2.0 * job.length * (by_input + by_weight + attached * (1 if is_first else 2))
        only_gate = is_first and job.trainable == "gates"
        products = GATE_PRODUCTS if only_gate else BACKWARD_PRODUCTS[route] if layer.gated else BACKWARD_PRODUCTS["chunked"]
        sums["backward_attention"] += products * gated
    # Logits of student and teacher, the gradient by the hidden states, and by the head where it trains.
    products = 2 + job.has_teacher_pass + trains_base
    sums["loss"] = 2.0 * job.length * shape.hidden_size * shape.vocab_size * products
    return Flops(**sums)


def _attention_flops(layer: LayerShape, pairs: float) -> float:
    """Of one product."""
    return 2.0 * layer.num_query_heads * layer.head_dim * pairs


def _dense_pairs_of(layer: LayerShape, shape: ModelShape, job: Job) -> float:
    """Of attention without a gate: ours computes the pairs that are seen, transformers' own half of all, or all where it goes by a mask."""
    slides = layer.sliding is not None and layer.sliding < job.length
    if shape.attention == ROWS:
        return kept_pairs(job.length, layer.sliding - 1, 0.0) if slides else job.length**2 / 2
    masked = job.packed or slides or shape.attention == "eager"
    return float(job.length**2) if masked else job.length**2 / 2

"""Bytes of a GPU and of its host during training, by kind, for one choice of where things rest.

What a step holds: weights, gradients, optimizer, buffers all the time; then, at its worst moment, what the forward left and either
the loss's chunk, or the layer that is being differentiated, or the teacher's pass.
"""

from dataclasses import dataclass

import torch

from dms.costs.activations import Activations
from dms.costs.job import Choice, Job
from dms.costs.shapes import PACKED_ATTENTION, LayerShape, ModelShape
from dms.evaluation.engine.scoring import CHUNK_BYTES
from dms_kernels.distill_loss import chunk_rows, chunked, fused

# Assumptions, not measured: CUDA's context and libraries; NCCL's buffers where there are several GPUs; and what PyTorch's allocator
# loses between blocks, as a share of all tensors.
CONTEXT_BYTES = int(0.8 * 2**30)
NCCL_BYTES = 2**30
FRAGMENTATION = 0.05
# DeepSpeed's defaults, in numbers: weights that stage 3 holds gathered at a time, and its buckets for gradients.
_LIVE_PARAMETERS = 10**9
_BUCKET = 5 * 10**8
# Layers whose checkpoints are near at a time where they rest in host memory: leaving, coming back, in use.
_NEAR_LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one GPU, by kind; `peak` is less than their sum, since not all is there at once."""

    weights: int
    packed: int
    """Of the weights: codes and scales of a quantised base."""
    activations: int
    """What autograd keeps without activation checkpointing, or one layer's with it."""
    checkpoints: int
    """Layers' inputs, kept attention outputs and their log-sum-exps; and inputs that packed linear layers keep all the same."""
    loss: int
    """Its chunk, before the layers' backward and so beside what `activations` is before it."""
    gradients: int
    optimizer: int
    buffers: int
    reserve: int
    """For what is not tensors."""
    peak: int
    evaluation: int
    """The peak of the run's own evaluation."""
    evaluation_token: int
    """For each token of an evaluation."""
    host: int
    """Of one node's memory."""


@dataclass(frozen=True)
class ItemSize:
    """Bytes of one number."""

    weight: int
    """In weights that rest."""
    compute: int
    """In what is computed with."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.compute == 2 else torch.float32

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.weight == 2 else torch.float32

    @classmethod
    def of(cls, job: Job, saved_bfloat16: bool) -> "ItemSize":
        frozen_half = job.trainable != "all" and job.precision == "bf16" and saved_bfloat16
        return cls(2 if frozen_half else 4, 2 if job.precision == "bf16" else 4)


def num_trained(shape: ModelShape, job: Job) -> int:
    """Parameters that train."""
    return shape.gates + shape.adapters + (shape.parameters if job.trainable == "all" else 0)


def loss_rows(job: Job, shape: ModelShape, itemsize: ItemSize, kernels: bool = True, width: int = 1) -> int:
    """Rows of logits alive at once. width: GPUs that share a sequence."""
    rows = job.loss_chunk
    if rows is None:
        rows = chunk_rows(
            shape.vocab_size, shape.hidden_size, itemsize.compute_dtype, beta=job.beta, softcap=shape.softcap, is_fused=kernels
        )
    return min(rows, _tokens(job, width))


def _tokens(job: Job, width: int) -> int:
    """Of a micro-batch, on each of the GPUs that share its sequences."""
    return job.length // width * job.micro_batch_size


def loss_bytes(job: Job, shape: ModelShape, itemsize: ItemSize, kernels: bool = True, width: int = 1) -> int:
    """What the loss adds to the hidden states of student and teacher: a chunk's buffers and the gradients that it makes. Each of the
    GPUs that share a sequence has its own chunk, head's gradient and casts of heads."""
    if kernels:
        row = fused.bytes_per_row(shape.vocab_size, shape.hidden_size, itemsize.compute_dtype)
    else:
        row = chunked.bytes_per_row(shape.vocab_size, itemsize.compute_dtype, beta=job.beta, softcap=shape.softcap)
    gradient = _tokens(job, width) * shape.hidden_size * itemsize.compute
    trains_head = job.trainable == "all"
    head = shape.vocab_size * shape.hidden_size
    # A teacher of its own has a head of its own.
    casts = (1 + (trains_head and job.has_teacher_pass)) * head * itemsize.compute if itemsize.weight != itemsize.compute else 0
    return loss_rows(job, shape, itemsize, kernels, width) * row + gradient + (4 * head if trains_head else 0) + casts


def evaluation_bytes(job: Job, shape: ModelShape, itemsize: ItemSize, activations: Activations) -> int:
    """The run's own evaluation: a dense pass by the model's own attention, and the logits of some tokens at a time."""
    tokens = job.evaluation_batch_size * job.evaluation_length
    rows = min(tokens, max(1, CHUNK_BYTES // (4 * shape.vocab_size)))
    return activations.evaluation + rows * shape.vocab_size * (itemsize.weight + 4 * 4)


def of_choice(
    shape: ModelShape,
    job: Job,
    choice: Choice,
    activations: Activations,
    itemsize: ItemSize,
    *,
    num_gpus: int,
    gpus_per_node: int,
    kernels: bool = True,
    reserve: bool = True,
) -> Bytes:
    """Bytes by kind.

    activations: of one GPU, as choice.sequence_parallel divides a micro-batch. reserve: count what is not tensors.
    """
    trained = num_trained(shape, job)
    ranks = num_gpus if choice.stage > 0 else 1
    resting = _resting(shape, job, itemsize) // (num_gpus if choice.stage == 3 else 1)
    weights = 0 if choice.offload_param else resting
    gradients = 4 * trained // ranks
    # AdamW: two moments; DeepSpeed keeps a float32 copy of what it steps as well.
    states = (8 if choice.stage == 0 else 12) * trained // ranks
    optimizer = 0 if choice.offload_optimizer else states

    forward = _forward(shape, job, choice, activations, itemsize, kernels)
    gathered = _buffers(shape, choice, itemsize, trained, num_gpus)
    at_once = max(forward.checkpoints + forward.transient, _optimizer_step(trained, choice, ranks, kernels))
    tensors = weights + gradients + optimizer + gathered + forward.outside + at_once
    extra = (CONTEXT_BYTES + (NCCL_BYTES if num_gpus > 1 else 0) + int(FRAGMENTATION * tensors)) if reserve else 0
    evaluated = evaluation_bytes(job, shape, itemsize, activations)
    on_host = forward.on_host
    on_host += resting if choice.offload_param else 0
    on_host += states + gradients if choice.offload_optimizer else 0
    return Bytes(
        weights=weights,
        packed=min(weights, shape.packed_bytes),
        activations=forward.activations,
        checkpoints=forward.checkpoints,
        loss=forward.loss,
        gradients=gradients,
        optimizer=optimizer,
        buffers=gathered + forward.outside + forward.casts,
        reserve=extra,
        peak=tensors + extra,
        evaluation=_evaluated_weights(shape, job, itemsize, weights) + gathered + evaluated + extra,
        evaluation_token=evaluated // (job.evaluation_batch_size * job.evaluation_length),
        host=min(num_gpus, gpus_per_node) * on_host,
    )


def _resting(shape: ModelShape, job: Job, itemsize: ItemSize) -> int:
    """All weights, whole; where the base trains, a teacher of its own as well."""
    copies = 2 if job.trainable == "all" and job.has_teacher_pass else 1
    return copies * shape.weight_bytes(itemsize.weight) + 4 * (shape.gates + shape.adapters)


def _evaluated_weights(shape: ModelShape, job: Job, itemsize: ItemSize, weights: int) -> int:
    """Adapters are merged before the evaluation, and a packed base becomes whole for it."""
    if shape.packing is None or job.trainable != "gates+lora":
        return weights
    return shape.parameters * itemsize.weight + 4 * shape.gates


@dataclass(frozen=True)
class _Forward:
    """What a micro-batch's forward and backward hold on one GPU."""

    activations: int
    checkpoints: int
    on_host: int
    loss: int
    outside: int
    """What the step holds beside layers."""
    casts: int
    """Of weights, that autocast keeps until the loss is there."""
    transient: int
    """The most above checkpoints at a time."""


def _forward(shape: ModelShape, job: Job, choice: Choice, activations: Activations, itemsize: ItemSize, kernels: bool) -> _Forward:
    width = choice.sequence_parallel
    loss = loss_bytes(job, shape, itemsize, kernels, width)
    teacher = _teacher(shape, job, activations, itemsize, width) if job.has_teacher_pass else 0
    # Hidden states of both sides, from the teacher's end to the loss.
    outside = (1 + job.has_teacher_pass) * activations.hidden
    if not choice.activation_checkpointing:
        # The casts are saved for the backward: they are part of what layers leave.
        saved, backward = activations.saved, max(layer.backward for layer in activations.layers)
        return _Forward(saved, 0, 0, loss, outside, 0, max(saved + max(loss, backward), teacher))
    tensors = checkpoints(shape, job, choice, activations, itemsize, kernels)
    kept, layer = sum(tensors), _one_layer(shape, job, choice, activations, itemsize, kernels)
    near = min(kept, _NEAR_LAYERS * kept // len(shape.layers)) if choice.offload_activations else kept
    near += _stays(shape, job, choice, activations, itemsize)
    outside += activations.before + max(0, activations.after)
    on_host = sum(map(_pinned, tensors)) if choice.offload_activations else 0
    casts = _casts(shape, job, choice, itemsize)
    # While the casts are there, layers run as the teacher's do, saving nothing; a layer that is run again makes its own.
    forward = casts + max(loss, activations.teacher if casts else 0)
    return _Forward(layer, near, on_host, loss, outside, casts, max(forward, layer, teacher - near))


def checkpoints(
    shape: ModelShape, job: Job, choice: Choice, activations: Activations, itemsize: ItemSize, kernels: bool = True
) -> list[int]:
    """Bytes of every tensor that the layers leave of a micro-batch under activation checkpointing: inputs, and what attention keeps."""
    trained = shape.layers[shape.first_trained :]
    return [
        size for layer in trained if layer.runs for size in (activations.hidden, *_attention_kept(layer, job, choice, itemsize, kernels))
    ]


def _attention_kept(layer: LayerShape, job: Job, choice: Choice, itemsize: ItemSize, kernels: bool) -> list[int]:
    """Output and log-sum-exps; from the kernels, norms of queries and of keys too."""
    attention = layer.attention
    if attention is None or not attention.gated:
        return []
    tokens = _tokens(job, choice.sequence_parallel)
    row = 4 * tokens * attention.num_query_heads
    norms = [row, 4 * tokens * attention.num_heads] if kernels else []
    return [tokens * attention.num_query_heads * attention.value_dim * itemsize.compute, row, *norms]


def _stays(shape: ModelShape, job: Job, choice: Choice, activations: Activations, itemsize: ItemSize) -> int:
    """What packed linear layers keep of a micro-batch under activation checkpointing; attention's output is kept anyway."""
    total = 0
    for layer, bytes_ in zip(shape.layers, activations.layers, strict=True):
        output = _attention_kept(layer, job, choice, itemsize, kernels=False)[:1]
        total += max(0, bytes_.stays - sum(output))
    return total


def _pinned(size: int) -> int:
    """PyTorch hands out pinned host memory in powers of two."""
    return 1 << (size - 1).bit_length()


def _one_layer(shape: ModelShape, job: Job, choice: Choice, activations: Activations, itemsize: ItemSize, kernels: bool) -> int:
    """The most that a layer takes when it is run again, beside what was kept of it: attention's results, and its input where that
    was saved as it came, in float32."""
    there = activations.hidden if itemsize.weight == 4 else 0
    first = shape.first_trained
    again = (
        bytes_.alone - (there + sum(_attention_kept(layer, job, choice, itemsize, kernels)) if place >= first else 0)
        for place, (layer, bytes_) in enumerate(zip(shape.layers, activations.layers, strict=True))
    )
    return max(again)


def _casts(shape: ModelShape, job: Job, choice: Choice, itemsize: ItemSize) -> int:
    """Casts of layers' weights that autocast keeps to the end of the forward: of those that train, and not under stage 3, where a
    run forbids it. Embeddings are not cast, and the head's cast is the loss's."""
    kept = job.trainable == "all" and itemsize.weight != itemsize.compute and choice.stage < 3
    return itemsize.compute * sum(layer.linear for layer in shape.layers) if kept else 0


def _teacher(shape: ModelShape, job: Job, activations: Activations, itemsize: ItemSize, width: int) -> int:
    """The dense pass; where transformers attends to packed documents it builds a mask, hands it to SDPA as numbers and repeats the KV heads."""
    if not job.packed or width > 1 or shape.attention in (PACKED_ATTENTION, "eager"):
        return activations.teacher
    tokens, widest = job.length * job.micro_batch_size, max(layer.num_query_heads * layer.key_dim for layer in shape.attentions)
    mask = tokens * job.length * (1 + itemsize.compute)
    return activations.teacher + mask + 2 * tokens * widest * itemsize.compute


def _buffers(shape: ModelShape, choice: Choice, itemsize: ItemSize, trained: int, num_gpus: int) -> int:
    """Weights gathered for their use, and buckets of gradients."""
    total = 0
    if choice.stage == 3:
        head = shape.vocab_size * shape.hidden_size
        total += min(shape.parameters, max(_LIVE_PARAMETERS, shape.largest_layer + head)) * itemsize.weight
    if choice.stage > 0:
        total += 2 * 4 * min(trained, _BUCKET)
    elif num_gpus > 1:
        total += 4 * trained
    return total


def _optimizer_step(trained: int, choice: Choice, ranks: int, kernels: bool) -> int:
    """AdamW's temporaries: on a GPU it steps all tensors at once."""
    if choice.offload_optimizer or not kernels:
        return 0
    return 4 * trained // ranks

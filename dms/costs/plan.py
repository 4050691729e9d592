"""The plan: every choice with its bytes and seconds, which of them fit, and the one to take."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from dms.costs import activations, flops, memory, roofline, shapes
from dms.costs.flops import TrainingFlops
from dms.costs.hardware import Gpu, Hardware
from dms.costs.job import WIDTHS, Choice, Job, choices
from dms.costs.memory import Bytes, ItemSize
from dms.costs.packed_weights import Packing
from dms.costs.roofline import Seconds
from dms.costs.shapes import PACKED_ATTENTION, ModelShape
from dms.modes import state_of
from dms.training.packed_attention import check_sharing, local_rows


@dataclass(frozen=True)
class PlannedChoice:
    """What a choice takes."""

    choice: Choice
    bytes: Bytes
    seconds: Seconds
    fits: bool
    """The steps, on the GPU; evaluation can be made smaller."""
    gpu_hours: float
    """Of the whole run's steps."""

    def as_dict(self) -> dict[str, Any]:
        seconds = asdict(self.seconds) | {"step": self.seconds.total, "limit": self.seconds.limit}
        return {
            "choice": asdict(self.choice),
            "bytes": asdict(self.bytes),
            "seconds": seconds,
            "fits": self.fits,
            "gpu_hours": self.gpu_hours,
        }


@dataclass(frozen=True)
class Plan:
    """Every choice of a job, and the one to take."""

    job: Job
    shape: ModelShape
    gpu_key: str
    gpu: Gpu
    num_gpus: int
    loss_rows: int
    """Rows of logits that the loss has alive at once."""
    flops: TrainingFlops
    """Of one optimizer step on all GPUs, with activation checkpointing or without, as the recommended (or own) choice has it."""
    outcomes: list[PlannedChoice]
    own: PlannedChoice | None
    """The recipe's; None: it is none of the possible ones."""
    recommended: PlannedChoice | None
    """The fastest that fits, of equally fast ones the simplest; None: nothing fits."""

    @property
    def shown(self) -> PlannedChoice:
        """The recommended one, or what comes next to it."""
        return self.recommended or self.own or self.outcomes[0]

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return memory.num_trained(self.shape, self.job)

    def evaluation_length(self, used: Bytes) -> int:
        """The most tokens, a power of two, that documents of an evaluation one by one may have beside a choice. used: what it takes."""
        tokens = self.job.evaluation_batch_size * self.job.evaluation_length
        room = self.gpu.memory - (used.evaluation - tokens * used.evaluation_token)
        most = min(room / used.evaluation_token, self.job.evaluation_length)
        return 2 ** int(math.log2(most)) if most >= 64 else 64

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Bytes, seconds and FLOPs as plain numbers."""
        shape = self.shape
        return {
            "model": shape.name,
            "parameters": shape.parameters,
            "trained": self.trained,
            "gates": shape.gates,
            "layers": len(shape.layers),
            "gated_layers": shape.num_gated,
            "tokens": self.job.tokens,
            "gpu": self.gpu_key,
            "num_gpus": self.num_gpus,
            "loss_rows": self.loss_rows,
            "flops_per_step": asdict(self.flops) | {"total": self.flops.total},
            "job": asdict(self.job),
            "lifetimes": asdict(self.job.mean_lifetimes),
            "recipe": None if self.own is None else self.own.as_dict(),
            "recommended": None if self.recommended is None else self.recommended.as_dict(),
            "choices": [outcome.as_dict() for outcome in self.outcomes],
        }


def make_plan(
    model: nn.Module,
    job: Job,
    own: Choice,
    *,
    saved_bfloat16: bool,
    gpu_name: str,
    num_gpus: int,
    hardware: Hardware,
    packing: Packing | None = None,
) -> Plan:
    """Plan a job on `num_gpus` GPUs of a kind. model: on the meta device, with gates and adapters; of no use afterwards. packing: how its
    base is quantised.

    Raises:
        ValueError: an unknown GPU, or a batch that no choice can share among these GPUs.
    """
    gpu = hardware.gpu(gpu_name)
    packed_attention = local_rows(model, packs=job.packed) is not None
    shape = shapes.measure_training(model, packing)
    if packed_attention:
        shape = replace(shape, attention=PACKED_ATTENTION)
    itemsize = ItemSize.of(job, saved_bfloat16)
    # Before the model is measured, which leaves it fewer layers.
    possible = _possible(model, job, num_gpus, packing)
    widths = tuple(sorted({choice.sequence_parallel for choice in possible}))
    by_width = activations.measure(model, shape, _micro_batch(job, itemsize, packed_attention), widths)
    by_checkpointing = {used: flops.of_sequence(shape, job, checkpointing=used) for used in (False, True)}

    def take(choice: Choice) -> PlannedChoice:
        part, work = by_width[choice.sequence_parallel], by_checkpointing[choice.activation_checkpointing]
        used = memory.of_choice(shape, job, choice, part, itemsize, num_gpus=num_gpus, gpus_per_node=gpu.gpus_per_node)
        checkpoints = sum(memory.checkpoints(shape, job, choice, part, itemsize)) if choice.activation_checkpointing else 0
        seconds = roofline.of_training_step(
            shape, job, choice, work, part, itemsize, checkpoints, gpu=gpu, hardware=hardware, num_gpus=num_gpus
        )
        return PlannedChoice(choice, used, seconds, used.peak <= gpu.memory, job.steps * seconds.total * num_gpus / 3600)

    outcomes = [take(choice) for choice in possible]
    plan = Plan(
        job=job,
        shape=shape,
        gpu_key=gpu_name,
        gpu=gpu,
        num_gpus=num_gpus,
        loss_rows=memory.loss_rows(job, shape, itemsize),
        flops=by_checkpointing[False].times(job.batch_size),
        outcomes=outcomes,
        own=take(own) if own in possible else None,
        recommended=min((one for one in outcomes if one.fits), key=_preference, default=None),
    )
    if not plan.shown.choice.activation_checkpointing:
        return plan
    return replace(plan, flops=by_checkpointing[True].times(job.batch_size))


def _micro_batch(job: Job, itemsize: ItemSize, packed_attention: bool) -> activations.MicroBatch:
    return activations.MicroBatch(
        batch=job.micro_batch_size,
        length=job.length,
        weight_dtype=itemsize.weight_dtype,
        autocast=job.precision == "bf16",
        kernels=True,
        packed_attention=packed_attention,
        evaluated=(job.evaluation_batch_size, job.evaluation_length),
    )


def _possible(model: nn.Module, job: Job, num_gpus: int, packing: Packing | None) -> list[Choice]:
    """Raises ValueError where these GPUs cannot share the batch."""
    widths = _shareable(model, job)
    possible = choices(job, widths, num_gpus, packed=packing is not None)
    if not possible:
        raise ValueError(
            f"batch_size {job.batch_size} cannot be shared by {num_gpus} GPUs with micro_batch_size {job.micro_batch_size}; "
            "batch_size must be a multiple of micro_batch_size x GPUs / sequence_parallel, which for this model and data.length can be "
            f"{', '.join(map(str, widths))}: change one of them"
        )
    return possible


def _shareable(model: nn.Module, job: Job) -> list[int]:
    """How many GPUs can share a sequence: what a run would not refuse."""
    widths = []
    for width in WIDTHS:
        try:
            if width > 1:
                check_sharing(model, width, job.length, state_of(model).skipped)
        except ValueError:
            continue
        widths.append(width)
    return widths


def _preference(outcome: PlannedChoice) -> tuple[int, int]:
    """Fastest first; within two per cent the simpler one."""
    return round(math.log(outcome.seconds.total) / 0.02), outcome.choice.complexity


def recipe_lines(plan: Plan) -> list[str]:
    """The recommended choice as a recipe says it, with an evaluation that fits where the recipe's does not."""
    if plan.recommended is None:
        return []
    choice = plan.recommended.choice
    zero = [f"stage: {choice.stage}"]
    zero += ["offload_optimizer: cpu"] if choice.offload_optimizer else []
    zero += ["offload_param: cpu"] if choice.offload_param else []
    lines = [f"zero: {{{', '.join(zero)}}}"]
    lines += [f"activation_checkpointing: {str(choice.activation_checkpointing).lower()}"]
    lines += ["offload_activations: true"] if choice.offload_activations else []
    lines += [f"sequence_parallel: {choice.sequence_parallel}"] if choice.sequence_parallel > 1 else []
    if plan.recommended.bytes.evaluation > plan.gpu.memory:
        lines.append(f"evaluation: {{batch_size: 1, length: {plan.evaluation_length(plan.recommended.bytes)}}}")
    return lines

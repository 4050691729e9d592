"""The plan: every choice with its bytes and seconds, which of them fit, and the one to take."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from dms.costs import activations as layers
from dms.costs import training_flops as flops
from dms.costs import training_memory as memory
from dms.costs import training_roofline as roofline
from dms.costs import training_shapes as shapes
from dms.costs.hardware import Gpu, Hardware
from dms.costs.job import WIDTHS, Choice, Job, choices
from dms.costs.training_flops import Flops
from dms.costs.training_memory import Bytes, Held
from dms.costs.training_roofline import Seconds
from dms.costs.training_shapes import ModelShape
from dms.training.packed_attention import check_sharing, local_rows


@dataclass(frozen=True)
class Outcome:
    """What a choice takes. fits: the steps, on the GPU; evaluation can be made smaller. gpu_hours: of the whole run's steps."""

    choice: Choice
    bytes: Bytes
    seconds: Seconds
    fits: bool
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """recommended: the fastest that fits, of equally fast ones the simplest; None: nothing fits. own: the recipe's choice.

    flops: of one optimizer step on all GPUs, with activation checkpointing or without, as the recommended (or own) choice has it.
    """

    job: Job
    shape: ModelShape
    gpu_key: str
    gpu: Gpu
    num_gpus: int
    loss_rows: int
    flops: Flops
    outcomes: list[Outcome]
    own: Outcome | None
    recommended: Outcome | None

    @property
    def trained(self) -> int:
        return self.shape.gates + self.shape.adapters + (self.shape.parameters if self.job.trainable == "all" else 0)

    @property
    def evaluation_length(self) -> int:
        """The most tokens, a power of two, that documents of an evaluation one by one may have beside the recommended choice."""
        used = self.recommended.bytes
        tokens = self.job.evaluation_batch_size * self.job.evaluation_length
        room = self.gpu.memory - (used.evaluation - tokens * used.evaluation_token)
        most = min(room / used.evaluation_token, self.job.evaluation_length)
        return 2 ** int(math.log2(most)) if most >= 64 else 64

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Bytes, seconds and FLOPs as plain numbers."""

        def row(outcome: Outcome | None) -> dict[str, Any] | None:
            if outcome is None:
                return None
            seconds = asdict(outcome.seconds) | {"step": outcome.seconds.total, "limit": outcome.seconds.limit}
            return {
                "choice": asdict(outcome.choice),
                "bytes": asdict(outcome.bytes),
                "seconds": seconds,
                "fits": outcome.fits,
                "gpu_hours": outcome.gpu_hours,
            }

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
            "recipe": row(self.own),
            "recommended": row(self.recommended),
            "choices": [row(outcome) for outcome in self.outcomes],
        }


def make_plan(model: nn.Module, job: Job, own: Choice, *, saved_bfloat16: bool, gpu_name: str, num_gpus: int, hardware: Hardware) -> Plan:
    """Plan a job on `num_gpus` GPUs of a kind. model: on the meta device, with gates and adapters; of no use afterwards.

    Raises:
        ValueError: an unknown GPU, or a batch that no choice can share among these GPUs.
    """
    gpu = hardware.gpu(gpu_name)
    by_rows = local_rows(model, packs=job.packed) is not None
    shape = shapes.measure(model)
    if by_rows:
        shape = replace(shape, attention=shapes.ROWS)
    held = Held.of(job, saved_bfloat16)
    # Before the model is measured, which leaves it fewer layers.
    widths = _shareable(model, job)
    possible = choices(job, widths, num_gpus)
    if not possible:
        raise ValueError(
            f"batch_size {job.batch_size} cannot be shared by {num_gpus} GPUs with micro_batch_size {job.micro_batch_size}; "
            "batch_size must be a multiple of micro_batch_size x GPUs / sequence_parallel, which for this model and data.length can be "
            f"{', '.join(map(str, widths))}: change one of them"
        )
    made = layers.measure_shared(
        model,
        shape,
        sorted({choice.sequence_parallel for choice in possible}),
        batch=job.micro_batch_size,
        length=job.length,
        held=held.weight_dtype,
        autocast=job.precision == "bf16",
        kernels=True,
        by_rows=by_rows,
        evaluated=(job.evaluation_batch_size, job.evaluation_length),
    )
    by_checkpointing = {used: flops.of_sequence(shape, job, checkpointing=used) for used in (False, True)}

    def outcome(choice: Choice) -> Outcome:
        part, work = made[choice.sequence_parallel], by_checkpointing[choice.activation_checkpointing]
        used = memory.of_choice(shape, job, choice, part, held, num_gpus=num_gpus, gpus_per_node=gpu.gpus_per_node)
        checkpoints = sum(memory.checkpoints(shape, job, choice, part, held)) if choice.activation_checkpointing else 0
        seconds = roofline.of_step(shape, job, choice, work, part, held, checkpoints, gpu=gpu, hardware=hardware, num_gpus=num_gpus)
        return Outcome(choice, used, seconds, used.peak <= gpu.memory, job.steps * seconds.total * num_gpus / 3600)

    outcomes = [outcome(choice) for choice in possible]
    recommended = min((o for o in outcomes if o.fits), key=_preference, default=None)
    mine = outcome(own) if own in possible else None
    shown = (recommended or mine or outcomes[0]).choice
    work = Flops(**{name: value * job.batch_size for name, value in vars(by_checkpointing[shown.activation_checkpointing]).items()})
    return Plan(job, shape, gpu_name, gpu, num_gpus, memory.loss_rows(job, shape, held), work, outcomes, mine, recommended)


def _shareable(model: nn.Module, job: Job) -> list[int]:
    """How many GPUs can share a row: what a run would not refuse."""
    widths = []
    for width in WIDTHS:
        try:
            if width > 1:
                check_sharing(model, width, job.length, model.dms.skipped)
        except ValueError:
            continue
        widths.append(width)
    return widths


def _preference(outcome: Outcome) -> tuple[int, int]:
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
        lines.append(f"evaluation: {{batch_size: 1, length: {plan.evaluation_length}}}")
    return lines

"""What is to be planned, in plain numbers, and the choices that there are for it."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Job:
    """A retrofit's recipe as far as it costs anything. Fields as in recipes; length T in tokens.

    packed: sequences hold several documents. loss_chunk None: as
    many as the loss chooses. has_teacher_pass False: a cache answers for the teacher.
    """

    trainable: Literal["gates", "gates+lora", "all"]
    precision: Literal["fp32", "bf16"]
    length: int
    packed: bool
    steps: int
    ramp: float
    target_cr: float
    window: int
    batch_size: int
    micro_batch_size: int
    beta: float
    loss_chunk: int | None
    evaluation_length: int
    evaluation_batch_size: int
    has_teacher_pass: bool = True

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.length

    @property
    def mean_keep(self) -> float:
        """The mean over the run's steps of 1 / CR, the share of tokens that stay."""
        ramp = max(1.0, self.ramp * self.steps)
        return sum(1.0 / (1.0 + (self.target_cr - 1.0) * min(1.0, step / ramp)) for step in range(1, self.steps + 1)) / self.steps


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where weights, optimizer and activations rest. Fields as in recipes (`zero`, and beside it)."""

    stage: Literal[0, 2, 3] = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    activation_checkpointing: bool = False
    offload_activations: bool = False
    sequence_parallel: int = 1

    @property
    def zero(self) -> str:
        """Short, for tables."""
        offloaded = [name for name, there in (("opt", self.offload_optimizer), ("param", self.offload_param)) if there]
        return " ".join([str(self.stage), "+".join(offloaded)]).rstrip()

    @property
    def activations(self) -> str:
        """Short, for tables."""
        return "host" if self.offload_activations else "ckpt" if self.activation_checkpointing else "kept"

    @property
    def complexity(self) -> int:
        """How much machinery it takes: of two that are equally fast the simpler one is better."""
        return (
            self.stage
            + 2 * (self.offload_optimizer + self.offload_param)
            + self.activation_checkpointing
            + 2 * self.offload_activations
            + self.sequence_parallel
        )


ZERO_CHOICES = (
    {"stage": 0},
    {"stage": 2},
    {"stage": 2, "offload_optimizer": True},
    {"stage": 3},
    {"stage": 3, "offload_param": True},
    {"stage": 3, "offload_optimizer": True, "offload_param": True},
)
ACTIVATION_CHOICES = ({}, {"activation_checkpointing": True}, {"activation_checkpointing": True, "offload_activations": True})


# Numbers of GPUs that share a row.
WIDTHS = (1, 2, 4, 8)


def choices(job: Job, widths: list[int], num_gpus: int) -> list[Choice]:
    """Every choice that this job and this number of GPUs allow. widths: of WIDTHS those that can share the model's rows."""
    shared = [width for width in widths if num_gpus % width == 0 and job.batch_size % (job.micro_batch_size * (num_gpus // width)) == 0]
    return [
        Choice(**zero, **activations, sequence_parallel=width)
        for width in shared
        for zero in ZERO_CHOICES
        for activations in ACTIVATION_CHOICES
    ]

"""What a plan is made for: a recipe's numbers, and the choices of where weights, optimizer and activations rest."""

from dataclasses import dataclass
from typing import Literal

from dms.costs.lifetimes import Budget, Lifetimes


@dataclass(frozen=True, kw_only=True)
class Job:
    """A retrofit's recipe as far as it costs anything. Fields as in recipes."""

    trainable: Literal["gates", "gates+lora", "all"]
    precision: Literal["fp32", "bf16"]
    length: int
    """Tokens of a sequence."""
    packed: bool
    """Sequences hold several documents."""
    steps: int
    ramp: float
    target_cr: float
    window: int | tuple[int, ...]
    batch_size: int
    micro_batch_size: int
    beta: float
    loss_chunk: int | None
    """None: as many tokens as the loss chooses."""
    evaluation_length: int
    evaluation_batch_size: int
    has_teacher_pass: bool = True
    """False: a cache answers for the teacher."""
    warm_up_steps: int = 0
    """Those of `warm_start`, among `steps`; counted as whole steps."""
    start_cr: float = 1.0
    """The ratio from which the target rises after them."""
    budget: Budget = "decided"

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.window,) if isinstance(self.window, int) else self.window

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.length

    @property
    def mean_lifetimes(self) -> Lifetimes:
        """The mean over the run's steps, but for those of a warm start, of what the ratio of each asks for."""
        steps, rise = self.steps - self.warm_up_steps, self.target_cr - self.start_cr
        ramp = max(1.0, self.ramp * steps)
        ratios = (self.start_cr + rise * min(1.0, step / ramp) for step in range(1, steps + 1))
        return Lifetimes.mean(Lifetimes.of_target(self.windows, cr, self.budget, self.length) for cr in ratios)


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


# Numbers of GPUs that share a sequence.
WIDTHS = (1, 2, 4, 8)
# Where weights and optimizer may rest: stage, offload_optimizer, offload_param.
_ZERO: tuple[tuple[Literal[0, 2, 3], bool, bool], ...] = (
    (0, False, False),
    (2, False, False),
    (2, True, False),
    (3, False, False),
    (3, False, True),
    (3, True, True),
)
# What becomes of activations: activation_checkpointing, offload_activations.
_ACTIVATIONS = ((False, False), (True, False), (True, True))


def choices(job: Job, widths: list[int], num_gpus: int, *, packed: bool = False) -> list[Choice]:
    """Every choice that this job and this number of GPUs allow. widths: of WIDTHS those that can share the model's sequences. packed: the
    base is quantised, and DeepSpeed does not handle packed weights; nor does it run steps on labels."""
    shared = [width for width in widths if num_gpus % width == 0 and job.batch_size % (job.micro_batch_size * (num_gpus // width)) == 0]
    return [
        Choice(
            stage=stage,
            offload_optimizer=optimizer,
            offload_param=param,
            activation_checkpointing=checkpointing,
            offload_activations=offloaded,
            sequence_parallel=width,
        )
        for width in shared
        for stage, optimizer, param in (_ZERO[:1] if packed or job.warm_up_steps else _ZERO)
        for checkpointing, offloaded in _ACTIVATIONS
    ]

"""Seconds of an optimizer step: what must be computed and moved, over what the machine can do; the slowest of them binds.

Computing, the GPU's memory, its host link and the links between GPUs are taken to work at once, as overlapping engines let them.
"""

from dataclasses import dataclass

from dms.costs.activations import Activations
from dms.costs.hardware import Gpu, Hardware
from dms.costs.job import Choice, Job
from dms.costs.training_flops import Flops
from dms.costs.training_memory import Held
from dms.costs.training_shapes import ModelShape

# A step of AdamW in host memory reads and writes weight, gradient and both moments in float32.
_ADAM_BYTES = 28


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step on one GPU, each limit alone."""

    compute: float
    memory: float
    host: float
    links: float

    @property
    def total(self) -> float:
        return max(vars(self).values())

    @property
    def limit(self) -> str:
        return max(vars(self), key=lambda name: vars(self)[name])


def of_step(
    shape: ModelShape,
    job: Job,
    choice: Choice,
    flops: Flops,
    made: Activations,
    held: Held,
    checkpoint_bytes: int,
    *,
    gpu: Gpu,
    hardware: Hardware,
    num_gpus: int,
) -> Seconds:
    """flops: of one sequence. made, checkpoint_bytes: of one GPU; the latter is what activation checkpointing keeps of a micro-batch."""
    share, width = hardware.attainable, choice.sequence_parallel
    micro_steps = job.batch_size * width // (job.micro_batch_size * num_gpus)
    rate = gpu.flops.bf16 if job.precision == "bf16" else gpu.flops.fp32
    compute = flops.total * job.batch_size / num_gpus / (rate * share.compute)

    weights = shape.parameters * held.weight
    # The student's forward and backward, the recomputation, and the teacher's forward.
    passes = 2 + choice.activation_checkpointing + job.has_teacher_pass
    # What is saved is written once and read once, and about as much is not saved; a recomputation does it again.
    traffic = 4 * made.saved * (2 if choice.activation_checkpointing else 1)
    memory = micro_steps * (passes * weights + traffic) / (gpu.bandwidth * share.memory)

    trained = shape.gates + shape.adapters + (shape.parameters if job.trainable == "all" else 0)
    host = (_host_bytes(job, choice, weights, passes, micro_steps, checkpoint_bytes, trained, num_gpus)) / (gpu.pcie * share.links)
    if choice.offload_optimizer:
        host += _ADAM_BYTES * trained * min(num_gpus, gpu.gpus_per_node) / num_gpus / (hardware.host_memory * share.memory)
    links = _link_bytes(shape, job, choice, held, weights, passes, micro_steps, trained, num_gpus)
    return Seconds(compute, memory, host, links / (gpu.link(num_gpus) * share.links))


def _host_bytes(job, choice, weights, passes, micro_steps, checkpoint_bytes, trained, num_gpus) -> float:
    """Over one GPU's link to its host, in the fuller direction."""
    total = 0.0
    if choice.offload_param:
        total += micro_steps * passes * weights / num_gpus
    if choice.offload_activations:
        total += micro_steps * checkpoint_bytes
    if choice.offload_optimizer:
        total += 4 * trained / num_gpus * (micro_steps if choice.stage > 0 else 1)
    return total


def _link_bytes(shape, job, choice, held, weights, passes, micro_steps, trained, num_gpus) -> float:
    """Into one GPU from the others, in the fuller direction."""
    others = (num_gpus - 1) / num_gpus
    # Gradients to where they belong, and back as sums or as weights. DeepSpeed, which divides them, sends them after every micro-step.
    total = ((micro_steps if choice.stage > 0 else 1) + 1) * others * 4 * trained
    if choice.stage == 3:
        total += micro_steps * passes * others * weights
    width = choice.sequence_parallel
    if width > 1:
        tokens = job.length * job.micro_batch_size / width
        # Queries and outputs, keys and values: forward (again where it is recomputed), backward, and the teacher's forward.
        numbers = sum((2 * layer.num_query_heads + 2 * layer.num_heads) * layer.head_dim for layer in shape.layers)
        total += micro_steps * passes * tokens * numbers * held.compute * (width - 1) / width
    return total

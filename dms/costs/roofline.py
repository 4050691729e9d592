"""The least seconds that work takes on a GPU: what must be computed and moved, over what the machine can do; the slowest of them binds.

Computing, the GPU's memory, its host link, the links between GPUs and the drive are taken to work at once, as overlapping engines let them.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from dms.costs.activations import Activations
from dms.costs.flops import TrainingFlops
from dms.costs.hardware import Attainable, Drive, Gpu, Hardware
from dms.costs.job import Choice, Job
from dms.costs.memory import ItemSize, num_trained
from dms.costs.shapes import ModelShape

Limit = Literal["compute", "memory", "host", "links", "disk"]


@dataclass(frozen=True)
class Seconds:
    """Of one GPU, each limit alone."""

    compute: float
    memory: float
    host: float = 0.0
    links: float = 0.0
    disk: float = 0.0

    @property
    def total(self) -> float:
        return max(vars(self).values())

    @property
    def limit(self) -> Limit:
        """What binds; of equal ones the first."""
        named: dict[Limit, float] = {
            "compute": self.compute,
            "memory": self.memory,
            "host": self.host,
            "links": self.links,
            "disk": self.disk,
        }
        return max(named, key=lambda name: named[name])


@dataclass(frozen=True)
class Roofline:
    """What one GPU can do at most: FLOP/s, and bytes per second."""

    flops: float
    memory: float
    """Its own memory."""
    host: float
    """Its link to its host, in one direction."""
    links: float
    """To other GPUs, in one direction."""
    disk: float = math.inf
    """Of its drive, reading."""

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        *,
        precision: Literal["fp32", "bf16"] = "bf16",
        num_gpus: int = 1,
        reached: Attainable | None = None,
        drive: Drive | None = None,
    ) -> "Roofline":
        """reached: shares of the datasheet's figures; None: those figures themselves, bounds that nothing exceeds. drive: None: none takes part."""
        compute, memory, links = (1.0, 1.0, 1.0) if reached is None else (reached.compute, reached.memory, reached.links)
        rate = gpu.flops.bf16 if precision == "bf16" else gpu.flops.fp32
        disk = math.inf if drive is None else drive.read * links
        return cls(rate * compute, gpu.bandwidth * memory, gpu.pcie * links, gpu.link(num_gpus) * links, disk)

    @property
    def ridge(self) -> float:
        """FLOPs a byte of memory from which on computing binds."""
        return self.flops / self.memory

    def seconds(self, flops: float, memory: float, host: float = 0.0, links: float = 0.0, disk: float = 0.0) -> Seconds:
        """Of so many FLOPs, and of bytes moved over each of the four."""
        return Seconds(flops / self.flops, memory / self.memory, host / self.host, links / self.links, disk / self.disk)


# A step of AdamW in host memory reads and writes weight, gradient and both moments in float32.
_ADAM_BYTES = 28


def of_training_step(
    shape: ModelShape,
    job: Job,
    choice: Choice,
    flops: TrainingFlops,
    activations: Activations,
    itemsize: ItemSize,
    checkpoint_bytes: int,
    *,
    gpu: Gpu,
    hardware: Hardware,
    num_gpus: int,
) -> Seconds:
    """Seconds of an optimizer step.

    flops: of one sequence. activations, checkpoint_bytes: of one GPU; the latter is what activation checkpointing keeps of a micro-batch.
    """
    micro_steps = job.batch_size * choice.sequence_parallel // (job.micro_batch_size * num_gpus)
    weights = shape.weight_bytes(itemsize.weight)
    # The student's forward and backward, the recomputation, and the teacher's forward.
    passes = 2 + choice.activation_checkpointing + job.has_teacher_pass
    # What is saved is written once and read once, and about as much is not saved; a recomputation does it again.
    traffic = 4 * activations.saved * (2 if choice.activation_checkpointing else 1)
    trained = num_trained(shape, job)
    # A packed matrix is dequantised for each product: written whole, and read again. bitsandbytes' int8 does so in the backward alone.
    unpacked = 0 if shape.packing is None else 1 if shape.packing.product == "int8" else passes
    traffic += unpacked * 2 * itemsize.compute * shape.num_packed
    roofline = Roofline.of(gpu, precision=job.precision, num_gpus=num_gpus, reached=hardware.attainable)
    seconds = roofline.seconds(
        flops=flops.total * job.batch_size / num_gpus,
        memory=micro_steps * (passes * weights + traffic),
        host=_host_bytes(choice, passes * weights, micro_steps, checkpoint_bytes, trained, num_gpus),
        links=_link_bytes(shape, job, choice, itemsize, passes, micro_steps, trained, num_gpus),
    )
    if not choice.offload_optimizer:
        return seconds
    adam = _ADAM_BYTES * trained * min(num_gpus, gpu.gpus_per_node) / num_gpus
    return replace(seconds, host=seconds.host + adam / (hardware.host_memory * hardware.attainable.memory))


def _host_bytes(choice: Choice, passed: int, micro_steps: int, checkpoint_bytes: int, trained: int, num_gpus: int) -> float:
    """Over one GPU's link to its host, in the fuller direction. passed: bytes of weights that a micro-step's passes read."""
    total = 0.0
    if choice.offload_param:
        total += micro_steps * passed / num_gpus
    if choice.offload_activations:
        total += micro_steps * checkpoint_bytes
    if choice.offload_optimizer:
        total += 4 * trained / num_gpus * (micro_steps if choice.stage > 0 else 1)
    return total


def _link_bytes(
    shape: ModelShape, job: Job, choice: Choice, itemsize: ItemSize, passes: int, micro_steps: int, trained: int, num_gpus: int
) -> float:
    """Into one GPU from the others, in the fuller direction."""
    others = (num_gpus - 1) / num_gpus
    # Gradients to where they belong, and back as sums or as weights. DeepSpeed, which divides them, sends them after every micro-step.
    total = ((micro_steps if choice.stage > 0 else 1) + 1) * others * 4 * trained
    if choice.stage == 3:
        total += micro_steps * passes * others * shape.parameters * itemsize.weight
    width = choice.sequence_parallel
    if width > 1:
        tokens = job.length * job.micro_batch_size / width
        # Queries and outputs, keys and values: forward (again where it is recomputed), backward, and the teacher's forward.
        numbers = sum((layer.num_query_heads + layer.num_heads) * (layer.key_dim + layer.value_dim) for layer in shape.attentions)
        total += micro_steps * passes * tokens * numbers * itemsize.compute * (width - 1) / width
    return total

"""Where the KV cache lies: in the GPU's memory, in main memory over PCIe, or on a drive. How many sequences fit, how fast they are decoded at
most, and how long an idle one takes to come back.

While sequences are decoded from a tier outside the device, each layer's pages come in once a step, those of all sequences, while the layers
before compute: the step takes what the slowest of computing, device memory, PCIe and drive takes. The device keeps weights, rings, bounded layers,
page tables and state, and room for the pages of two layers, one that computes and one that comes. What a step writes is an entry a sequence at
most, beside all those that it reads, and goes the other way: it is not counted.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from dms.costs import inference
from dms.costs import kv as caches
from dms.costs.hardware import Gpu, Hardware
from dms.costs.inference import Machine
from dms.costs.kv import KV
from dms.costs.roofline import Limit, Roofline, Seconds
from dms.costs.shapes import AttentionShape, ModelShape

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = get_args(Tier)
_NAMES: dict[Limit, str] = {"compute": "compute", "memory": "memory", "host": "PCIe", "disk": "NVMe"}


@dataclass(frozen=True)
class TierPoint:
    """One cache in one tier; bytes are those on one GPU."""

    tier: Tier
    kv: KV
    context: int
    cache_bytes: float
    """Of one sequence, all that is kept between two steps."""
    moved_bytes: float
    """Of one sequence, what comes in from the tier at each step."""
    batch: int
    """Sequences that fit, decoded at once."""
    seconds: Seconds | None
    """Of a step of so many; None: none fits."""
    binds: str | None
    """compute, memory (the device's), PCIe, main memory (which several GPUs share) or NVMe."""
    seconds_back: float | None
    """Until an idle sequence is on the device again; None: it is there."""
    seconds_away: float | None
    """Until it has left."""

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences, at most."""
        return 0.0 if self.seconds is None else self.batch / self.seconds.total


def tier_point(shape: ModelShape, kv: KV, machine: Machine, gpu: Gpu, hardware: Hardware, tier: Tier, context: int) -> TierPoint:
    """As many sequences of `context` tokens as fit, their caches in that tier."""
    drive, on_disk = hardware.node.drive, tier == "disk"
    # GPUs that share a model read main memory at once.
    host = min(gpu.pcie, hardware.host_memory / min(machine.num, gpu.gpus_per_node))
    kept, on_device = inference.cache_bytes(shape, kv, machine, context), inference.sequence_bytes(shape, kv, machine, context)
    stored = moved = 0.0
    if tier != "device":
        pages = [_pages_of(layer, kv, machine, context) for layer in shape.attentions]
        stored = sum(bytes_ for layer, bytes_ in zip(shape.attentions, pages, strict=True) if layer.holds)
        # A layer that reads another's entries has them brought once more.
        moved, on_device = sum(pages), on_device - stored + 2 * max(pages)
    batch = max(0, int((gpu.memory - inference.fixed(shape, kv, machine)) // on_device))
    if stored > 0:
        batch = min(batch, int((drive.capacity if on_disk else hardware.node.memory) // stored))
    seconds, binds = None, None
    if batch > 0:
        step, crossing = inference.decode(shape, kv, machine, batch, context), batch * moved
        roofline = replace(Roofline.of(gpu, drive=drive), host=host)
        # What comes in is written to the device's memory before it is read there.
        seconds = roofline.seconds(step.all_flops, step.bytes + crossing, host=crossing, disk=crossing if on_disk else 0.0)
        binds = "main memory" if seconds.limit == "host" and host < gpu.pcie else _NAMES[seconds.limit]
    if tier == "device":
        return TierPoint(tier, kv, context, kept, moved, batch, seconds, binds, None, None)
    back, away = (min(host, drive.read), min(host, drive.write)) if on_disk else (host, host)
    return TierPoint(tier, kv, context, kept, moved, batch, seconds, binds, kept / back, kept / away)


def _pages_of(layer: AttentionShape, kv: KV, machine: Machine, context: int) -> float:
    """Bytes of one sequence that this layer reads and that may lie outside the device."""
    return inference.over_heads([layer], machine, [caches.paged_bytes(layer, kv, context)])

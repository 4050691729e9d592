"""Seconds at the least, what binds, what fits, and where KV reads overtake weight reads.

Figures are a GPU's own, from its datasheet, without a share that is lost: bounds that nothing exceeds, not predictions.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dms.costs import inference_cost as cost
from dms.costs.hardware import Gpu
from dms.costs.inference_cost import Cost, Machine
from dms.costs.inference_shapes import InferenceShape
from dms.costs.kv import KV

# No context is asked about beyond this.
FAR = 2**34


@dataclass(frozen=True)
class Roof:
    """FLOP/s at 16 bits, bytes per second, and bytes of memory of a GPU."""

    rate: float
    bandwidth: float
    memory: float

    @classmethod
    def of(cls, gpu: Gpu) -> "Roof":
        return cls(gpu.flops.bf16, gpu.bandwidth, gpu.memory)

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on computing binds."""
        return self.rate / self.bandwidth

    def seconds(self, spent: Cost) -> float:
        """Computing and moving at once: the slower of the two."""
        return max(spent.all_flops / self.rate, spent.bytes / self.bandwidth)

    def binds(self, spent: Cost) -> str:
        """ "compute", or what is most of the bytes."""
        if spent.intensity >= self.ridge:
            return "compute"
        moved = {
            "weights": spent.weights,
            "KV": spent.kv_read + spent.kv_written,
            "state": spent.state,
            "activations": spent.activations,
        }
        return max(moved, key=lambda name: moved[name])


def overtaken_at(shape: InferenceShape, kv: KV, machine: Machine, batch: int) -> int | None:
    """The shortest context at which a decoding step reads as many bytes of KV as of weights; None: there is none."""
    return _first(lambda context: _kv_leads(cost.decode(shape, kv, machine, batch, context)))


def _kv_leads(step: Cost) -> bool:
    return step.kv_read >= step.weights


def largest_batch(shape: InferenceShape, kv: KV, machine: Machine, roof: Roof, context: int) -> int:
    """Sequences of `context` tokens that fit; 0: none."""
    left = roof.memory - cost.fixed(shape, kv, machine)
    return max(0, int(left // cost.sequence_bytes(shape, kv, machine, context)))


def largest_context(shape: InferenceShape, kv: KV, machine: Machine, roof: Roof, batch: int) -> int | None:
    """Tokens of each of `batch` sequences that fit, whatever the model's own context; None: any number."""
    too_long = _first(lambda context: cost.held(shape, kv, machine, batch, context) > roof.memory)
    return None if too_long is None else too_long - 1


def _first(holds: Callable[[int], bool]) -> int | None:
    """The least context for which it holds; what holds for one holds for every longer one."""
    if not holds(FAR):
        return None
    low, high = 0, FAR
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high

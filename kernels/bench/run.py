"""What is done with one shape: parity, then the times of its competitors, each failure a result of its own."""

import contextlib
import gc
import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass

import torch

from bench.inputs import relative_error
from bench.measuring import Competitor, machine, measure_ceilings, milliseconds
from bench.shapes import Shape, is_ours

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

# What compilers, allocators and other people's libraries raise. An interruption is none of these.
FAILURES = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError, TritonError)
# How far a competitor that computes the same may be from ours, in half precision.
_SAME = 3e-2


def _on_events(competitor: Competitor, calls: list[Callable]) -> float:
    return milliseconds(calls, graph=competitor.graph)


@dataclass(frozen=True)
class Measurement:
    """On one device."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    measure: Callable[[Competitor, list[Callable]], float] = _on_events
    """Milliseconds of one call."""

    def machine(self) -> dict:
        return machine()

    def no_device(self) -> str | None:
        return None if self.device == "cpu" or torch.cuda.is_available() else "no GPU here, and there is nothing to measure without one"

    def is_alive(self) -> bool:
        """False after an illegal access: whatever this process asks of the GPU from then on fails."""
        if self.device != "cpu":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return True

    def ceilings(self) -> dict:
        return {} if self.device == "cpu" else asdict(measure_ceilings())

    def check(self, shape: Shape) -> dict:
        """{"error", "problem"} of ours against float64; problem None: it is as near as it should be."""
        operation = importlib.import_module(f"bench.{shape.operation}")
        try:
            found = operation.parity(shape, self.device, self.dtype)
        except FAILURES as failure:
            return {"error": None, "problem": f"parity: {type(failure).__name__}: {failure}"}
        finally:
            _free()
        problem = None if found.good else f"parity: error {found.error:.2g} above {found.bound:.2g} at {shape.name}"
        return {"error": found.error, "problem": problem}

    def time(
        self,
        shape: Shape,
        side: str,
        *,
        compare: bool = True,
        skip: Collection[str] = (),
        before: Callable[[str], None] = lambda name: None,
    ) -> Iterator[dict]:
        """Results of one side's competitors, "ours" or "others", each when it is known: competitor, bytes, flops, ms, parity_error, problem.

        compare: hold those of the others that compute the same to ours. skip: names to leave out. before: is told each name in time.
        """
        competitors = importlib.import_module(f"bench.{shape.operation}").competitors(shape, self.device, self.dtype)
        chosen = [one for one in competitors if is_ours(one.name) == (side == "ours") and one.name not in skip]
        ours_out = None
        if compare and any(one.same for one in chosen):
            # Without ours to compare with, others are still timed.
            with contextlib.suppress(*FAILURES):
                ours_out = competitors[0].prepare()[0]()
            _free()
        for one in chosen:
            before(one.name)
            yield {"competitor": one.name, "bytes": one.bytes, "flops": one.flops, "ms": None, "parity_error": None, "problem": None} | (
                {"problem": "needs a GPU"} if one.needs_gpu and self.device == "cpu" else self._time_one(one, ours_out)
            )

    def _time_one(self, one: Competitor, ours_out: torch.Tensor | None) -> dict:
        calls: list[Callable] = []
        result = error = None
        try:
            calls = one.prepare()
            result = calls[0]()
            if one.same and ours_out is not None:
                error = relative_error(result, ours_out)
                if not error <= _SAME:
                    return {"parity_error": error, "problem": f"parity: {error:.2g} from ours, not timed"}
            result = None
            return {"parity_error": error, "ms": self.measure(one, calls)}
        except FAILURES as failure:
            return {"problem": f"{type(failure).__name__}: {failure}"}
        finally:
            calls = result = None
            _free()


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        # After an illegal access everything raises.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

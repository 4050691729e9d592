"""Times, ceilings, and what the machine is."""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Larger than the L2 of any GPU of today: where the sets rotated through take this many bytes, each is read from memory.
_CACHED_BYTES = 400 * 2**20
# Of calls in a captured graph, at least, and of graphs or calls between two events, at most.
_LEAST_CAPTURED, _MOST_TOGETHER = 32, 20
# How often a `Resettable` that is timed alone runs before it is reset, at most: a batch, and the calls before the first.
MOST_CALLS_BETWEEN_RESETS = (_MOST_TOGETHER + 2) * _LEAST_CAPTURED


@dataclass(frozen=True)
class Parity:
    """An error against float64, and the most that it may be."""

    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Resettable:
    """A call that changes its inputs, so that it cannot be repeated for ever."""

    call: Callable[[], object]
    reset: Callable[[], None]
    """puts the inputs back, in place; runs between what is timed"""

    def __call__(self) -> object:
        return self.call()


@dataclass
class Competitor:
    """One way to do an operation."""

    name: str
    prepare: Callable[[], list[Callable[[], object]]]
    """makes the inputs and gives calls over different sets of them, each returning its output first"""
    flops: float = 0.0
    """that it cannot do without"""
    bytes: float = 0.0
    """that it cannot do without"""
    graph: bool = False
    """timed as replays of a CUDA graph"""
    same: bool = False
    """its output is that of ours"""
    needs_gpu: bool = False
    """cannot be built on a CPU"""


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best: copying (bytes read and written), and a bf16 matrix product."""

    copy_gbps: float
    gemm_tflops: float


def num_sets(num_bytes: float) -> int:
    """How many sets of inputs a timing rotates through, so that none is still in the L2."""
    return max(1, min(16, int(-(-_CACHED_BYTES // max(num_bytes, 1.0)))))


def milliseconds(calls: list[Callable[[], object]], *, graph: bool, seconds: float = 0.4) -> float:
    """Median time of one call on the GPU, by events, over about `seconds`.

    graph: all calls are captured, several times over, and replayed, so that launches cost what they cost in a decode loop.
    A `Resettable` is reset before each batch that is timed.
    """
    resets = [call.reset for call in calls if isinstance(call, Resettable)]

    def timed(runs: list[Callable[[], object]]) -> float:
        for reset in resets:
            reset()
        return _timed(runs)

    for call in calls:
        call()
    torch.cuda.synchronize()
    if graph:
        repeats = -(-_LEAST_CAPTURED // len(calls))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(repeats):
                for call in calls:
                    call()
        runs: list[Callable[[], object]] = [captured.replay]
        per_run = repeats * len(calls)
    else:
        runs, per_run = calls, 1
    once = timed(runs[:1])
    if once > 1e3 * seconds:
        return statistics.median([once, timed(runs[:1])]) / per_run
    # So many calls between two events that the host is ahead of the GPU: its own time shows in the first alone.
    together = max(1, min(_MOST_TOGETHER, int(10 / max(once, 1e-3))))
    batches = max(5, min(200, int(seconds * 1e3 / max(once * together, 1e-3))))
    times = []
    for batch in range(batches):
        chosen = [runs[(batch * together + i) % len(runs)] for i in range(together)]
        times.append(timed(chosen) / together)
    return statistics.median(times) / per_run


def _timed(runs: list[Callable[[], object]]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for run in runs:
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_ceilings() -> Ceilings:
    return Ceilings(copy_gbps=_copy_gbps(), gemm_tflops=_gemm_tflops())


def _copy_gbps() -> float:
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([lambda: copy.copy_(source)], graph=False) / 1e6


def _gemm_tflops() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds([lambda: a @ b], graph=False) / 1e9


def machine() -> dict[str, str | None]:
    """What rows carry about where they were measured."""
    here = Path(__file__).parent
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "-C", str(here), "describe", "--always", "--dirty"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None

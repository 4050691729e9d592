"""What a decode step takes of the host: `python -m bench.host`, on any machine, without a GPU.

The driver is stubbed: Triton compiles for an NVIDIA GPU of capability 9.0 as far as PTX, and a launch does nothing. What is left is the time in which
Python, PyTorch and Triton prepare launches, in two ways: through `append` and `paged_decode`, as any caller may, and as a cache calls its kernels.
Not in it: the launch itself, some 3 us each, and the model's own layers. Medians of calls that take turns.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from dms.cache import CompactedLayer
from dms.cache.pending import PendingGate, PendingTokens
from dms.config import DMSConfig
from dms.gates import Gate
from dms.masks import Tokens
from dms_kernels import dispatch
from dms_kernels.launching import through_operators
from emulate.launching import PretendedDriver

NUM_LAYERS = 36

_CAPABILITY = 90
_TARGET = dispatch.Target(_CAPABILITY, 132, 232_448)


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside, the kernels' host code runs as on a GPU, and launches do nothing. `TRITON_INTERPRET` must not be set."""
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it before Triton is imported")
    before = driver._active
    with (
        patch.object(dispatch, "PRETENDED", _TARGET),
        patch.dict(os.environ, DMS_KERNELS="triton"),
        patch.object(dispatch, "_device_problem", lambda device: None),
        patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()),
        triton.knobs.cache.scope(),
    ):
        triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-stubbed"
        driver.set_active(PretendedDriver(_CAPABILITY, lambda src, metadata: lambda *args: None, 2000 + _CAPABILITY))
        try:
            yield
        finally:
            driver._active = before


class Layer:
    """A layer of a cache some tokens beyond its window, and what the next token brings."""

    def __init__(self, windows: tuple[int, ...], *, batch: int = 1, heads: int = 8, group: int = 4, dim: int = 128, hidden: int = 4096):
        config = DMSConfig(window=windows[0] if len(windows) == 1 else windows)
        self.layer = CompactedLayer(config)
        self.store = self.layer.make_store(batch, heads, dim, torch.bfloat16, torch.device("cpu"))
        gate = Gate(hidden, heads, config, normalize=False)
        self.gate = PendingGate(gate, torch.randn(batch, 1, hidden, dtype=torch.bfloat16), 0.0)
        # Views of what projections gave, as transformers makes them.
        self.k, self.v = (torch.randn(batch, 1, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        self.query = torch.randn(batch, 1, heads * group, dim, dtype=torch.bfloat16).transpose(1, 2)
        self.new = PendingTokens(self.gate, self.new_tokens(), self.k, self.v)
        for _ in range(windows[0] + 2):
            self.step(self.new.tokens)

    def new_tokens(self) -> Tokens:
        """Of one forward pass."""
        batch = self.k.shape[0]
        return Tokens(torch.ones(batch, 1, dtype=torch.int32), torch.zeros(batch, 1, dtype=torch.int32))

    def step(self, tokens: Tokens) -> None:
        """All that the cache does for the layer in a decode step."""
        self.layer.decide(self.gate, tokens)
        self.layer.update(self.k, self.v)
        self.layer.attend(self.query, scale=0.1, softcap=None, sink_logits=None)

    def append(self) -> None:
        self.store.push(self.new)

    def attend(self) -> None:
        self.store.attend_newest(self.query, None, window=self.store.dms.windows[0], scale=0.1)


def medians(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Microseconds of each call, which take turns."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(found) for name, found in seconds.items()}


def _through_operators(call: Callable[[], None]) -> Callable[[], None]:
    def through() -> None:
        with through_operators():
            call()

    return through


def measure(windows: tuple[int, ...], *, batch: int, num_layers: int, repeats: int) -> dict[str, tuple[float, float]]:
    """By what is called: microseconds through operators, and as a cache launches its kernels. Within `stubbed`."""
    layers = [Layer(windows, batch=batch) for _ in range(num_layers)]

    def all_layers() -> None:
        tokens = layers[0].new_tokens()
        for layer in layers:
            layer.step(tokens)

    calls = {"append": layers[0].append, "paged_decode": layers[0].attend, f"decode step, {num_layers} layers": all_layers}
    both = {(name, kept): call if kept else _through_operators(call) for name, call in calls.items() for kept in (False, True)}
    found = medians(both, repeats)
    return {name: (found[name, False], found[name, True]) for name in calls}


def main(repeats: int = 200) -> None:
    versions = f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, Triton {triton.__version__}"
    print(f"host microseconds, driver stubbed, medians of {repeats}; {versions}")
    print(f"{'batch':>5} {'windows':<16} {'what':<26} {'by operators':>12} {'cached':>8} {'ratio':>6}")
    with stubbed(), torch.no_grad():
        for batch in (1, 16):
            for windows in ((256,), (32, 128, 512)):
                for name, (operators, kept) in measure(windows, batch=batch, num_layers=NUM_LAYERS, repeats=repeats).items():
                    print(f"{batch:>5} {windows!s:<16} {name:<26} {operators:>12.1f} {kept:>8.1f} {kept / operators:>6.2f}")


if __name__ == "__main__":
    main()

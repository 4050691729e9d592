"""What a decode step takes of the host: `python -m bench.host`, on any machine, without a GPU.

The driver is stubbed: Triton compiles for an NVIDIA GPU of capability 9.0 as far as PTX, and a launch does nothing. What is left is the time in which
Python, PyTorch and Triton prepare launches, in two ways: through `append` and `paged_decode`, as any caller may, and as a cache calls its kernels.
Not in it: the launch itself, some 3 us each, and the model's own layers. Medians of calls that take turns.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from dms.cache.fused_store import FusedStore
from dms.cache.page_pool import PagePool
from dms.cache.pending import PendingGate, PendingTokens
from dms.config import DMSConfig
from dms.gates import Gate
from dms.masks import Tokens
from dms_kernels import dispatch

_CAPABILITY = 90
_TARGET = dispatch.Target(_CAPABILITY, 132, 232_448)


class _Driver:
    """As much of a driver as choosing, compiling and launching a kernel asks for; launches do nothing."""

    def __init__(self):
        self.launcher_cls = lambda src, metadata: lambda *args: None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _TARGET.shared_bytes},
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _CAPABILITY, 32)

    def get_current_device(self) -> int:
        # A number that no other driver gives: compiled kernels are kept by it.
        return 2000 + _CAPABILITY

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def set_current_device(self, device: int) -> None:
        pass


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside, the kernels' host code runs as on a GPU, and launches do nothing. `TRITON_INTERPRET` must not be set."""
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it before Triton is imported")
    before = driver._active
    with (
        patch.object(dispatch, "PRETENDED", _TARGET),
        patch.object(dispatch, "explain", lambda device, problem=None: ("triton", "stubbed")),
        patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()),
        triton.knobs.cache.scope(),
    ):
        triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-stubbed"
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver._active = before


class Layer:
    """A layer's store, some tokens beyond its window, and what the next token brings."""

    def __init__(self, windows: tuple[int, ...], *, batch: int = 1, heads: int = 8, group: int = 4, dim: int = 128, hidden: int = 4096):
        config = DMSConfig(window=windows[0] if len(windows) == 1 else windows)
        pool = PagePool(64, dim, torch.bfloat16, torch.device("cpu"), windows=windows if len(windows) > 1 else ())
        self.store = FusedStore(config, pool, batch, heads)
        gate = PendingGate(Gate(hidden, heads, config, normalize=False), torch.randn(batch, 1, hidden, dtype=torch.bfloat16), 0.0)
        tokens = Tokens(torch.ones(batch, 1, dtype=torch.int32), torch.zeros(batch, 1, dtype=torch.int32))
        # As transformers makes them: views of what the projections gave.
        k, v = (torch.randn(batch, 1, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        self.new = PendingTokens(gate, tokens, k, v)
        self.query = torch.randn(batch, 1, heads * group, dim, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(windows[0] + 2):
            self.append()
        self.attend()

    def append(self) -> None:
        self.store.push(self.new)

    def attend(self) -> None:
        self.store.attend_newest(self.query, self.new.tokens.real[:, 0], window=self.store.dms.windows[0], scale=0.1)


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Microseconds of each call, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(found) for name, found in seconds.items()}

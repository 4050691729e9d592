"""Compiled kernels without a GPU: the project's own launch functions, with the emulator where Triton would have one.

Inside `emulating` Triton finds a driver for an NVIDIA GPU of the capability that is asked for. It compiles as for one, as far as PTX; a
launch runs that on the memory of the tensors, which are the CPU's. Nothing of a kernel or its host code changes. `TRITON_INTERPRET`
must not be set.

parse.py reads PTX; grid.py runs a kernel's programs and machine.py one of them, all threads at a time; instructions.py lists what is
emulated, in arithmetic.py, conversion.py, access.py, warps.py, matrices.py and asynchronous.py; memory.py has the checks. An
instruction that is not known is an error that names it.

What is found, as an exception (`Finding`) at the instruction and its line in the kernel's source: accesses out of bounds, misaligned, or to
what nobody has written; products of 32-bit numbers that overflow; two warps that meet in shared memory without a barrier between, one
of them writing; reading what an asynchronous copy or product has not been waited for; warps that take part of themselves where all must;
programs that never end. Programs run in random order, if asked in turns.

What is not: hazards in global memory within a program, the order in which a GPU's memory shows one program's writes to another (fences
do nothing here), proxies' fences, what ptxas makes of the PTX, time.
"""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from dms_kernels import dispatch
from emulate.findings import NotEmulatedError
from emulate.grid import run_grid
from emulate.memory import GlobalMemory, poison
from emulate.parse import parse

# Of a program, by capability.
_SHARED_BYTES = {80: 166_912, 90: 232_448}


@dataclass(frozen=True)
class Launch:
    """One launch that was emulated."""

    kernel: str
    grid: tuple[int, int, int]
    num_threads: int
    num_instructions: int
    """executed, each by all threads of a program"""
    seconds: float


@dataclass
class Emulation:
    """How launches are emulated, and which were."""

    capability: int
    seed: int
    resident: int
    edit: Callable[[str], str] | None
    launches: list[Launch] = field(default_factory=list)


_current: list[Emulation] = []
_parsed = lru_cache(maxsize=256)(parse)


@contextmanager
def emulating(
    capability: int, *, num_processors: int = 4, seed: int = 0, resident: int = 1, edit: Callable[[str], str] | None = None
) -> Iterator[Emulation]:
    """Inside, launches run on the emulator, and tensors from torch.empty are poisoned (see `memory.poison`).

    capability: 80 or 90. num_processors: how many the launch parameters are chosen for. seed: of the order of programs. resident:
    programs that take turns, instruction by instruction. edit: changes a kernel's PTX before it runs, as tests of the emulator do.

    Raises:
        Finding: at a launch that does what it must not.
        NotEmulatedError: at one with an instruction that is not known.
        ValueError: another capability, or Triton's interpreter.
    """
    if capability not in _SHARED_BYTES:
        raise ValueError(f"capability is {capability}; {' and '.join(map(str, _SHARED_BYTES))} are emulated")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it before Triton is imported")
    emulation = Emulation(capability, seed, resident, edit)
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        replace(dispatch, "PRETENDED", dispatch.Target(capability, num_processors, _SHARED_BYTES[capability]))
        replace(dispatch, "explain", lambda device, problem=None: ("triton", "emulated"))
        # PTX in place of what ptxas would make of it, kept apart from what it did make.
        replace(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode())
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-emulated"
        replace(torch, "empty", _poisoned(torch.empty))
        replace(torch, "empty_like", _poisoned(torch.empty_like))
        replace(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        before = driver._active
        driver.set_active(PretendedDriver(capability, _Launcher, 1000 + capability))
        _current.append(emulation)
        try:
            yield emulation
        finally:
            _current.pop()
            driver._active = before


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return poison(tensor) if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() else tensor

    return poisoned


class PretendedDriver:
    """As much of a driver as choosing, compiling and launching a kernel asks for, where PTX stands for what ptxas would make of it.

    launcher: of compiled kernels, as Triton's launcher_cls. number: of the device; compiled kernels are kept by it, so that no other driver may give it.
    """

    def __init__(self, capability: int, launcher: Callable[..., Any], number: int):
        self.capability, self.launcher_cls, self.number = capability, launcher, number
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _SHARED_BYTES[capability]},
            load_binary=lambda name, kernel, shared, device: (self, kernel.decode(), 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def set_current_device(self, device: int) -> None:
        pass


class _Launcher:
    """What Triton calls to launch a kernel: its arguments become the PTX's parameters."""

    def __init__(self, src: Any, metadata: Any):
        self.types = list(src.signature.values())
        self.names = list(src.signature)
        self.shared_bytes = metadata.shared
        if metadata.global_scratch_size:
            raise NotEmulatedError("kernels with scratch memory are not emulated")

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args) -> None:
        emulation, memory = _current[-1], GlobalMemory()
        program = _parsed(function if emulation.edit is None else emulation.edit(function))
        values = [value for each in zip(self.types, args, self.names, strict=True) for value in _values(*each, memory)]
        # Behind the kernel's own, pointers to scratch memory, which is not asked for.
        names = list(program.parameters)
        spare = [program.parameters[name] for name in names[len(values) :]]
        if len(values) > len(names) or any(kind != "u64" for kind in spare):
            raise NotEmulatedError(f"{program.name} takes {len(names)} parameters, and {len(values)} were given")
        parameters = dict(zip(names, values + [0] * len(spare), strict=True))
        start = time.monotonic()
        executed = run_grid(
            program, memory, (x, y, z), self.shared_bytes, parameters, seed=emulation.seed, resident=emulation.resident
        )  # fmt: skip
        seconds = time.monotonic() - start
        emulation.launches.append(Launch(program.name, (x, y, z), program.num_threads, executed, seconds))


def _values(kind: Any, given: Any, name: str, memory: GlobalMemory) -> list[int]:
    """Of one argument: as bits, none for what is compiled in, several for a tuple."""
    if kind == "constexpr":
        return []
    if isinstance(kind, tuple):
        return [value for each, one in zip(kind, given, strict=True) for value in _values(each, one, name, memory)]
    if isinstance(given, torch.Tensor):
        memory.add(given, name)
        return [given.data_ptr()]
    if kind == "fp32":
        return [struct.unpack("<I", struct.pack("<f", given))[0]]
    if kind in ("i1", "u1", "i8", "i32", "i64", "u32", "u64"):
        return [int(given)]
    raise NotEmulatedError(f"arguments of type {kind} ({name}) are not emulated")

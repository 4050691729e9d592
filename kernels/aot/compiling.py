"""Compile what an operation would launch, for a GPU that need not be there, and read registers, stack and shared memory off.

The host code runs as it is, on tensors of the CPU; in place of each launch its kernel is compiled. So what is examined is what
would run. `TRITON_INTERPRET` must not be set.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dms_kernels import dispatch

# Limit of a block, by capability.
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
NUM_PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled. stack_bytes: local memory of a thread, spills included; matrix: the tensor cores' instructions by
    name and number (HGMMA, IMMA, HMMA ...); local: loads and stores of local memory."""

    kernel: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: dict[str, int]
    local: int
    wide_loads: int


class _PretendedDriver:
    """As much of a driver as choosing and compiling a kernel asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def set_current_device(self, device: int) -> None:
        pass


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile; the list that is given fills with their kernels, each variant once."""
    found: list[Compiled] = []
    seen: set[str] = set()
    launch, pretended, use_triton = JITFunction.run, dispatch.PRETENDED, dispatch.explain

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(examine(kernel, capability))
        return kernel

    JITFunction.run = compile_only
    dispatch.PRETENDED = dispatch.Target(capability, NUM_PROCESSORS[capability], SHARED_BYTES[capability])
    dispatch.explain = lambda device, problem=None: ("triton", "compiled ahead of time")
    driver.set_active(_PretendedDriver(capability))
    try:
        yield found
    finally:
        JITFunction.run, dispatch.PRETENDED, dispatch.explain = launch, pretended, use_triton
        driver._active = None


def examine(kernel: triton.compiler.CompiledKernel, capability: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix: dict[str, int] = {}
    for name in re.findall(r"\b([HIQ]G?MMA)\b", sass):
        matrix[name] = matrix.get(name, 0) + 1
    return Compiled(
        kernel=kernel.metadata.name,
        capability=capability,
        num_warps=kernel.metadata.num_warps,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        matrix=matrix,
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", sass)),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Which implementation an operation runs on: plain PyTorch ("reference") or a Triton kernel ("triton").

Without a setting: Triton on NVIDIA GPUs of compute capability 8.0 and later, plain PyTorch elsewhere. `DMS_KERNELS=reference|triton`
overrides; forced onto arguments that it cannot take, a kernel refuses and says why. On a CPU, Triton only runs in its interpreter
(`TRITON_INTERPRET=1`), which is for tests. `explain` says which one would run, `calls` counts which ones did.
"""

import importlib.util
import os
import re
from collections import Counter
from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("reference", "triton")
# Of the custom operators; PyTorch wants it in ASCII. A copy of this package, such as exported folders have, registers its own.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0] or __name__, flags=re.ASCII)

# Found once, at import: torch.compile traces what runs at a call, and refuses the machinery of imports.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_targets: dict[int, "Target"] = {}
_calls: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Target:
    """What launch parameters depend on."""

    capability: int
    """90 for sm_90"""
    num_processors: int
    shared_bytes: int
    """shared memory that a block may have"""


# Without a GPU, for the interpreter: few processors, since it runs one program after another.
PRETENDED = Target(capability=90, num_processors=3, shared_bytes=232_448)


def target(device: torch.device) -> Target:
    if device.type != "cuda":
        return PRETENDED
    index = device.index or 0
    # A dict, not lru_cache: torch.compile warns of that and traces through it all the same.
    if index not in _targets:
        properties = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", 101_376)
        _targets[index] = Target(properties.major * 10 + properties.minor, properties.multi_processor_count, shared)
    return _targets[index]


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def explain(device: torch.device | str, problem: str | None = None) -> tuple[str, str]:
    """What an operation on this device would run on, and why. problem: what keeps its kernel from taking the arguments.

    Raises:
        ValueError: DMS_KERNELS has another value than the two.
        RuntimeError: DMS_KERNELS=triton where Triton cannot serve.
    """
    asked = os.environ.get("DMS_KERNELS") or None
    if asked not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"DMS_KERNELS is {asked!r}; set it to reference or triton, or unset it")
    if asked == "reference":
        return "reference", "DMS_KERNELS=reference"
    problem = _device_problem(torch.device(device)) or problem
    if asked == "triton":
        if problem:
            raise RuntimeError(f"DMS_KERNELS=triton, but {problem}; unset DMS_KERNELS to use plain PyTorch there")
        return "triton", "DMS_KERNELS=triton"
    if problem is None and torch.device(device).type != "cuda":
        problem = "the interpreter is for tests: it is used with DMS_KERNELS=triton alone"
    return ("reference", problem) if problem else ("triton", "the GPU and the arguments allow it")


def use_triton(operation: str, tensor: torch.Tensor, problem: str | None = None) -> bool:
    """Whether to call the kernel for arguments such as `tensor`; see `explain`. Counts the call if not: kernels count their own."""
    implementation, _ = explain(tensor.device, problem)
    if implementation == "reference":
        count(operation, "reference")
    return implementation == "triton"


def count(operation: str, implementation: str) -> None:
    # A compiled graph would be guarded by each number, and made again at each call.
    if not torch.compiler.is_compiling():
        _calls[operation, implementation] += 1


def calls() -> dict[str, dict[str, int]]:
    """How often each operation ran on each implementation, since `reset_calls`; what torch.compile has compiled is not counted."""
    found: dict[str, dict[str, int]] = {}
    for (operation, implementation), number in sorted(_calls.items()):
        found.setdefault(operation, {})[implementation] = number
    return found


def reset_calls() -> None:
    _calls.clear()


def _device_problem(device: torch.device) -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cpu":
        return None if is_interpreted() else "on a CPU Triton runs in its interpreter alone (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, and this is {'an AMD GPU' if device.type == 'cuda' else device.type}"
    if target(device).capability < 80:
        return f"the kernels need compute capability 8.0 (A100) or later, and this GPU has {target(device).capability / 10}"
    return None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def padded(D: int) -> int:
    """A dimension as Triton's blocks and matrix products take it."""
    return max(16, power_of_two(D))

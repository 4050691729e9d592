"""What makers of instructions share: which forms they know, and how results are written."""

import numpy as np

from emulate.findings import NotEmulatedError
from emulate.machine import Array, Mask
from emulate.parse import Instruction

SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
INTEGERS = (*SIGNED, *UNSIGNED)
HALVES = ("bf16", "f16", "bf16x2", "f16x2")


def know(instruction: Instruction, *parts: str) -> None:
    """Raises NotEmulatedError unless all parts of the opcode but the first are among these."""
    unknown = [part for part in instruction.parts[1:] if part not in parts]
    if unknown:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated (.{unknown[0]})")


def write(target: Array, values: Array, mask: Mask) -> None:
    np.copyto(target, values, where=mask, casting="unsafe")


def any_active(lanes: Array, mask: Mask) -> bool:
    return bool(lanes.any() if mask is True else (lanes & mask).any())

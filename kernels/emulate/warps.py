"""Exchange between the threads of a warp."""

import numpy as np

from emulate.findings import NotEmulatedError
from emulate.forms import know, write
from emulate.machine import Action, Machine, Mask
from emulate.parse import Instruction


def make_shuffle(machine: Machine, instruction: Instruction) -> Action:
    """shfl.sync: a thread whose partner lies outside of its segment keeps its own."""
    know(instruction, "sync", "bfly", "up", "down", "idx", "b32")
    mode, operands = instruction.parts[2], instruction.operands
    to, _, valid = operands[0].partition("|")
    target = machine.target(to, "b32")
    found = machine.target(valid, "pred") if valid else None
    given, by, limits = (machine.source(operand, "b32") for operand in operands[1:4])
    lane = np.arange(machine.num_threads) % 32
    first = np.arange(machine.num_threads) - lane

    def run(mask: Mask) -> None:
        machine.whole_warps(mask)
        distance, limit = (machine.lanes(x).astype(np.int64) for x in (by, limits))
        clamp, segment = limit & 31, (limit >> 8) & 31
        lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment & 31)
        if mode == "up":
            partner = lane - distance
            inside = partner >= highest
        else:
            partner = {"bfly": lane ^ distance, "down": lane + distance, "idx": lowest | (distance & ~segment & 31)}[mode]
            inside = partner <= highest
        write(target, machine.lanes(given)[first + np.where(inside, partner, lane)], mask)
        if found is not None:
            write(found, inside, mask)

    return run


def make_reduction(machine: Machine, instruction: Instruction) -> Action:
    operation, kind = instruction.parts[-2:]
    know(instruction, "sync", operation, kind)
    functions = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    if operation not in functions or kind not in ("s32", "u32", "b32"):
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    target, source = machine.target(instruction.operands[0], kind), machine.source(instruction.operands[1], kind)

    def run(mask: Mask) -> None:
        machine.whole_warps(mask)
        values = machine.lanes(source).reshape(-1, 32)
        write(target, np.repeat(functions[operation].reduce(values, axis=1, dtype=values.dtype), 32), mask)

    return run

"""Loads, stores and atomics."""

import numpy as np

from emulate.findings import NotEmulatedError
from emulate.forms import know, write
from emulate.machine import Action, Array, Machine, Mask, dtype_of
from emulate.parse import Instruction, elements

_ORDERS = ("relaxed", "acquire", "release", "acq_rel", "volatile", "gpu", "cta", "sys")
_CACHES = ("ca", "cg", "cs", "cv", "wb", "wt", "nc", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_normal")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def make_load(machine: Machine, instruction: Instruction) -> Action:
    parts, kind = instruction.parts, instruction.parts[-1]
    know(instruction, "param", "global", "shared", *_ORDERS, *_CACHES, *_VECTORS, kind)
    targets = [machine.target(each, kind) for each in elements(instruction.operands[0])]
    dtype = dtype_of(kind)
    if "param" in parts:
        return _load_parameter(machine, instruction, targets[0], dtype)
    space = _space(instruction)
    size = dtype.itemsize * len(targets)
    addresses = machine.addresses(instruction.operands[1], space)

    def run(mask: Mask) -> None:
        active = slice(None) if mask is True else mask
        at = addresses()[active]
        if space == "shared":
            values = machine.shared.load(at, size, machine.warp_bits[active])
        else:
            values = machine.memory.load(at, size)
        values = values.view(dtype)
        for i, target in enumerate(targets):
            target[active] = values[:, i]

    return run


def _load_parameter(machine: Machine, instruction: Instruction, target: Array, dtype: np.dtype) -> Action:
    name = instruction.operands[1].strip("[] ")
    if name not in machine.parameters:
        raise NotEmulatedError(f"parameter {name} is not emulated")
    value = np.array([machine.parameters[name] & (2 ** (8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)[0]
    return lambda mask: write(target, value, mask)


def _space(instruction: Instruction) -> str:
    spaces = [part for part in instruction.parts if part in ("global", "shared")]
    if len(spaces) != 1:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated (of global and shared memory it names neither)")
    return spaces[0]


def make_store(machine: Machine, instruction: Instruction) -> Action:
    kind, space = instruction.parts[-1], _space(instruction)
    know(instruction, "global", "shared", *_ORDERS, *_CACHES, *_VECTORS, kind)
    sources = [machine.source(each, kind) for each in elements(instruction.operands[1])]
    addresses = machine.addresses(instruction.operands[0], space)

    def run(mask: Mask) -> None:
        active = slice(None) if mask is True else mask
        at = addresses()[active]
        values = np.stack([machine.lanes(source)[active] for source in sources], 1)
        values = values.view(f"u{min(8, values.itemsize * len(sources))}")
        if space == "shared":
            machine.shared.store(at, values, machine.warp_bits[active])
        else:
            machine.memory.store(at, values)

    return run


_CHANGES = {
    "add": lambda old, new: old + new,
    "max": max,
    "min": min,
    "exch": lambda old, new: new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
}


def make_atomic(machine: Machine, instruction: Instruction) -> Action:
    """Of global memory, one thread after the other."""
    operation, kind = instruction.parts[-2:]
    know(instruction, "global", *_ORDERS, operation, kind)
    operands = instruction.operands
    if operation not in (*_CHANGES, "cas") or _space(instruction) != "global":
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    target = None
    if instruction.parts[0] == "atom":
        target, operands = machine.target(operands[0], kind), operands[1:]
    addresses = machine.addresses(operands[0], "global")
    sources = [machine.source(operand, kind) for operand in operands[1:]]
    dtype = dtype_of(kind)

    def run(mask: Mask) -> None:
        at, given = addresses(), [machine.lanes(source) for source in sources]
        for thread in range(machine.num_threads) if mask is True else np.flatnonzero(mask).tolist():
            one = at[thread : thread + 1]
            old = machine.memory.load(one, dtype.itemsize).view(dtype)
            if operation == "cas":
                new = given[1][thread] if old[0, 0] == given[0][thread] else old[0, 0]
            else:
                new = _CHANGES[operation](old[0, 0], given[0][thread])
            machine.memory.store(one, np.array([[new]], dtype).view(f"u{dtype.itemsize}"))
            if target is not None:
                target[thread] = old[0, 0]

    return run

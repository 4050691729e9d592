"""Moves, choices and conversions between types."""

from collections.abc import Callable

import numpy as np

from emulate import floats
from emulate.findings import NotEmulatedError
from emulate.forms import know, write
from emulate.machine import DTYPES, Action, Array, Machine, Mask, dtype_of
from emulate.parse import Instruction, elements

_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def make_move(machine: Machine, instruction: Instruction) -> Action:
    """Also a register from parts, and parts from a register, the lowest first."""
    kind = instruction.parts[-1]
    know(instruction, kind)
    to, given = instruction.operands
    if to.startswith("{"):
        parts = elements(to)
        each = f"u{8 * dtype_of(kind).itemsize // len(parts)}"
        source, targets = machine.source(given, kind), [machine.target(part, each) for part in parts]

        def unpack(mask: Mask) -> None:
            values = np.ascontiguousarray(machine.lanes(source)).view(DTYPES[each]).reshape(-1, len(targets)).copy()
            for i, target in enumerate(targets):
                write(target, values[:, i], mask)

        return unpack
    target = machine.target(to, kind)
    if given.startswith("{"):
        parts = elements(given)
        each = f"u{8 * dtype_of(kind).itemsize // len(parts)}"
        sources = [machine.source(part, each) for part in parts]

        def pack(mask: Mask) -> None:
            values = np.stack([machine.lanes(source) for source in sources], 1)
            write(target, values.view(target.dtype)[:, 0], mask)

        return pack
    source = machine.source(given, kind)
    return lambda mask: write(target, source, mask)


def make_choice(machine: Machine, instruction: Instruction) -> Action:
    kind = instruction.parts[-1]
    know(instruction, kind)
    operands = instruction.operands
    target, chooses = machine.target(operands[0], kind), machine.source(operands[3], "pred")
    a, b = machine.source(operands[1], kind), machine.source(operands[2], kind)
    return lambda mask: write(target, np.where(chooses, a, b), mask)


def make_permutation(machine: Machine, instruction: Instruction) -> Action:
    """prmt: four bytes of eight; the eighth bit of a choice repeats its sign."""
    know(instruction, "b32")
    target = machine.target(instruction.operands[0], "b32")
    a, b, choice = (machine.source(operand, "u32") for operand in instruction.operands[1:])

    def run(mask: Mask) -> None:
        both = machine.lanes(a).astype(np.uint64) | (machine.lanes(b).astype(np.uint64) << np.uint64(32))
        choices = (machine.lanes(choice)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        found = np.take_along_axis(both.view(np.uint8).reshape(-1, 8), (choices & 7).astype(np.int64), 1)
        found = np.where(choices & 8, np.where(found & 128, 255, 0), found).astype(np.uint8)
        write(target, np.ascontiguousarray(found).view(np.uint32)[:, 0], mask)

    return run


# So that what follows is the only rounding.
_EXACT_IN_F32 = ("f32", "bf16", "f16", "s8", "u8", "s16", "u16")


def make_conversion(machine: Machine, instruction: Instruction) -> Action:
    to, given = instruction.parts[-2:]
    know(instruction, "rn", "ftz", "satfinite", *_ROUNDINGS, to, given)
    operands = instruction.operands
    if to in ("bf16x2", "f16x2") and given == "f32":
        return _pair(machine, instruction, to)
    if "e4m3x2" in (to, given):
        return _eight_bits(machine, instruction, to, given)
    target = machine.target(operands[0], to)
    source = machine.source(operands[1], given)
    rounding = next((_ROUNDINGS[part] for part in instruction.parts if part in _ROUNDINGS), None)
    read = (lambda: floats.values_of(source, given)) if given in ("bf16", "f16") else (lambda: source)
    convert = _converter(to, given, rounding, instruction)
    if "ftz" in instruction.parts:
        if (to, given) != ("f32", "f32"):
            raise NotEmulatedError(f"{instruction.opcode} is not emulated")
        return lambda mask: write(target, convert(floats.flushed(read())), mask)
    return lambda mask: write(target, convert(read()), mask)


def _converter(to: str, given: str, rounding: Callable | None, instruction: Instruction) -> Callable[[Array], Array]:
    from_float, to_float = given in ("bf16", "f16", "f32", "f64"), to in ("bf16", "f16", "f32", "f64")
    if to in ("bf16", "f16") and given in _EXACT_IN_F32 and rounding is None:
        return lambda x: floats.bits_of(x.astype(np.float32), to)
    if to in ("f32", "f64") and given in DTYPES and given != "pred":
        return lambda x: (x if rounding is None else rounding(x)).astype(DTYPES[to])
    if not to_float and not from_float:
        return lambda x: x.astype(DTYPES[to])
    if not to_float and from_float and rounding is not None:
        limits = np.iinfo(DTYPES[to])
        if limits.bits > 32:
            raise NotEmulatedError(f"{instruction.opcode} is not emulated")
        # NaN becomes 0, and what is too large the largest there is.
        return lambda x: np.clip(
            np.nan_to_num(rounding(x.astype(np.float64)), posinf=limits.max, neginf=limits.min), limits.min, limits.max
        ).astype(DTYPES[to])
    raise NotEmulatedError(f"{instruction.opcode} is not emulated")


def _pair(machine: Machine, instruction: Instruction, kind: str) -> Action:
    """Two float32 rounded into one register, the first into its upper half."""
    target = machine.target(instruction.operands[0], kind)
    high, low = (machine.source(operand, "f32") for operand in instruction.operands[1:])
    if "satfinite" in instruction.parts:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    one = kind.removesuffix("x2")

    def run(mask: Mask) -> None:
        values = np.stack([machine.lanes(low), machine.lanes(high)], 1)
        write(target, floats.bits_of(values, one).view(np.uint32)[:, 0], mask)

    return run


def _eight_bits(machine: Machine, instruction: Instruction, to: str, given: str) -> Action:
    """Two numbers of 8 bits from two float32, the first into the upper half, or to two float16."""
    operands = instruction.operands
    if (to, given) == ("e4m3x2", "f32") and "satfinite" in instruction.parts:
        target = machine.target(operands[0], "b16")
        high, low = (machine.source(operand, "f32") for operand in operands[1:])

        def narrow(mask: Mask) -> None:
            values = np.stack([machine.lanes(low), machine.lanes(high)], 1)
            write(target, floats.e4m3_bits(values).view(np.uint16)[:, 0], mask)

        return narrow
    if (to, given) == ("f16x2", "e4m3x2"):
        target, source = machine.target(operands[0], "b32"), machine.source(operands[1], "b16")

        def widen(mask: Mask) -> None:
            values = floats.e4m3_values(np.ascontiguousarray(machine.lanes(source)).view(np.uint8).reshape(-1, 2))
            write(target, floats.f16_bits(values).view(np.uint32)[:, 0], mask)

        return widen
    raise NotEmulatedError(f"{instruction.opcode} is not emulated")

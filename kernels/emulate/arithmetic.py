"""Numbers: integers wrap, and products of 32-bit ones must not; float32 and the narrow types are rounded once, to nearest even.

Division, roots, exponentials and the like are computed to the last rounding, where a GPU's approximations are within two units of it.
"""

from collections.abc import Callable

import numpy as np

from emulate import floats
from emulate.findings import Finding, NotEmulatedError
from emulate.forms import HALVES, INTEGERS, any_active, know, write
from emulate.machine import DTYPES, Action, Array, Machine, Mask
from emulate.parse import Instruction

_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_PAIRS = {"s16x2": np.int16, "u16x2": np.uint16}
_SIMPLE = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs, "div": np.divide}


def make_arithmetic(machine: Machine, instruction: Instruction) -> Action:
    kind = instruction.parts[-1]
    if kind in INTEGERS:
        return _integers(machine, instruction, kind)
    if kind in ("f32", "f64"):
        return _floats(machine, instruction, kind)
    if kind in HALVES:
        return _halves(machine, instruction, kind)
    if kind in _PAIRS:
        return _integer_pairs(machine, instruction, kind)
    raise NotEmulatedError(f"{instruction.opcode} is not emulated")


def _integers(machine: Machine, instruction: Instruction, kind: str) -> Action:
    operation, operands = instruction.parts[0], instruction.operands
    if operation in ("mul", "mad"):
        return _product(machine, instruction, kind)
    know(instruction, "relu", kind)
    target = machine.target(operands[0], kind)
    sources = [machine.source(operand, kind) for operand in operands[1:]]
    if operation in ("div", "rem"):
        return _division(operation, target, *sources)
    if operation in ("min", "max"):
        choose = np.minimum if operation == "min" else np.maximum
        if "relu" in instruction.parts:
            return lambda mask: write(target, np.maximum(choose(*sources), 0), mask)
    else:
        choose = _SIMPLE.get(operation)
        if choose is None:
            raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    return lambda mask: choose(*sources, out=target, where=mask)


def _product(machine: Machine, instruction: Instruction, kind: str) -> Action:
    know(instruction, "lo", "hi", "wide", kind)
    operands, adds = instruction.operands, instruction.parts[0] == "mad"
    a, b = (machine.source(operand, kind) for operand in operands[1:3])
    wide = "wide" in instruction.parts
    if wide and kind not in _WIDE:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    to = _WIDE[kind] if wide else kind
    target = machine.target(operands[0], to)
    c = machine.source(operands[3], to) if adds else None
    if "hi" in instruction.parts:
        if kind not in _WIDE or adds:
            raise NotEmulatedError(f"{instruction.opcode} is not emulated")
        whole, width = DTYPES[_WIDE[kind]], 8 * target.itemsize
        return lambda mask: write(target, np.multiply(a, b, dtype=whole) >> whole(width), mask)

    def run(mask: Mask) -> None:
        if kind == "s32":
            # As int64, in which no product of these overflows.
            product = np.multiply(a, b, dtype=np.int64)
            if not wide:
                if any_active(product != product.astype(np.int32), mask):
                    raise Finding("a product of 32-bit numbers overflows")
                product = product.astype(np.int32)
        else:
            product = np.multiply(a, b, dtype=target.dtype)
        write(target, product if c is None else product + c, mask)

    return run


def _division(operation: str, target: Array, a: Array, b: Array) -> Action:
    def run(mask: Mask) -> None:
        zero = np.broadcast_to(b == 0, target.shape)
        if any_active(zero, mask):
            raise Finding("division of integers by 0")
        divisor = np.where(zero, target.dtype.type(1), b)
        # Towards zero, where numpy's goes down.
        quotient = np.floor_divide(a, divisor)
        quotient = quotient + ((quotient < 0) & (quotient * divisor != a)).astype(target.dtype)
        write(target, quotient if operation == "div" else a - quotient * divisor, mask)

    return run


def _floats(machine: Machine, instruction: Instruction, kind: str) -> Action:
    know(instruction, "rn", "ftz", "full", "approx", "NaN", kind)
    operation, operands = instruction.parts[0], instruction.operands
    target = machine.target(operands[0], kind)
    sources = [machine.source(operand, kind) for operand in operands[1:]]
    nan = "NaN" in instruction.parts
    functions: dict[str, Callable] = {
        **_SIMPLE,
        "max": np.maximum if nan else np.fmax,
        "min": np.minimum if nan else np.fmin,
        "fma": floats.fma,
        "mad": floats.fma,
    }
    if operation not in functions or (kind == "f64" and operation in ("fma", "mad")):
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    function = functions[operation]
    if "ftz" in instruction.parts:
        return lambda mask: write(target, floats.flushed(function(*(floats.flushed(x) for x in sources))), mask)
    if isinstance(function, np.ufunc):
        return lambda mask: function(*sources, out=target, where=mask)
    return lambda mask: write(target, function(*sources), mask)


def _halves(machine: Machine, instruction: Instruction, kind: str) -> Action:
    """bf16x2 and f16x2: two numbers a register."""
    know(instruction, "rn", "NaN", kind)
    operation, operands = instruction.parts[0], instruction.operands
    one = kind.removesuffix("x2")
    target = machine.target(operands[0], kind)
    raw = [machine.source(operand, kind) for operand in operands[1:]]
    zero, unit = np.float32(-0.0), np.float32(1)
    nan = "NaN" in instruction.parts
    functions: dict[str, Callable] = {
        "add": lambda a, b: floats.half_fma(a, unit, b, one),
        "sub": lambda a, b: floats.half_fma(b, -unit, a, one),
        "mul": lambda a, b: floats.half_fma(a, b, zero, one),
        "fma": lambda a, b, c: floats.half_fma(a, b, c, one),
        "max": lambda a, b: floats.bits_of(np.maximum(a, b) if nan else np.fmax(a, b), one),
        "min": lambda a, b: floats.bits_of(np.minimum(a, b) if nan else np.fmin(a, b), one),
        "neg": lambda a: floats.bits_of(-a, one),
        "abs": lambda a: floats.bits_of(np.abs(a), one),
    }
    if operation not in functions:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    function = functions[operation]

    def run(mask: Mask) -> None:
        values = (floats.values_of(np.ascontiguousarray(machine.lanes(x)).view(np.uint16), one) for x in raw)
        write(target, function(*values).view(target.dtype), mask)

    return run


def _integer_pairs(machine: Machine, instruction: Instruction, kind: str) -> Action:
    """s16x2 and u16x2: two numbers a register."""
    know(instruction, kind)
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if instruction.parts[0] not in functions:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    function, operands = functions[instruction.parts[0]], instruction.operands
    target = machine.target(operands[0], kind)
    raw = [machine.source(operand, kind) for operand in operands[1:]]

    def run(mask: Mask) -> None:
        values = (np.ascontiguousarray(machine.lanes(x)).view(_PAIRS[kind]) for x in raw)
        write(target, function(*values).view(target.dtype), mask)

    return run


def make_function(machine: Machine, instruction: Instruction) -> Action:
    know(instruction, "approx", "ftz", "rn", "f32")
    functions = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
        "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }  # fmt: skip
    function = functions[instruction.parts[0]]
    target, x = machine.target(instruction.operands[0], "f32"), machine.source(instruction.operands[1], "f32")
    if "ftz" not in instruction.parts:
        return lambda mask: write(target, function(x.astype(np.float64)).astype(np.float32), mask)
    return lambda mask: write(target, floats.flushed(function(floats.flushed(x).astype(np.float64)).astype(np.float32)), mask)


def make_bits(machine: Machine, instruction: Instruction) -> Action:
    operation, kind = instruction.parts[0], instruction.parts[-1]
    if operation == "shf":
        return _funnel(machine, instruction)
    know(instruction, kind)
    target = machine.target(instruction.operands[0], kind)
    first = machine.source(instruction.operands[1], kind)
    logic = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.get(operation)
    if logic is not None:
        second = machine.source(instruction.operands[2], kind)
        return lambda mask: logic(first, second, out=target, where=mask)
    if operation == "not":
        return lambda mask: np.invert(first, out=target, where=mask)
    if operation in ("shl", "shr"):
        return _shift(operation, target, first, machine.source(instruction.operands[2], "u32"))
    if operation == "bfe" and kind in ("u32", "s32", "u64"):
        position, length = (machine.source(operand, "u32") for operand in instruction.operands[2:])
        return lambda mask: write(target, _field(machine.lanes(first), position, length), mask)
    if operation == "popc" and kind == "b32":
        return lambda mask: write(target, np.unpackbits(machine.lanes(first).copy().view(np.uint8).reshape(-1, 4), axis=1).sum(1), mask)
    raise NotEmulatedError(f"{instruction.opcode} is not emulated")


def _shift(operation: str, target: Array, value: Array, by: Array) -> Action:
    width = 8 * target.itemsize
    function = np.left_shift if operation == "shl" else np.right_shift
    # Beyond its width nothing is left of a number, or its sign.
    fills = operation == "shr" and target.dtype.kind == "i"

    def run(mask: Mask) -> None:
        shifted = function(value, np.minimum(by, np.uint32(width - 1)).astype(target.dtype))
        write(target, shifted if fills else np.where(by < width, shifted, 0), mask)

    return run


def _field(value: Array, position: Array, length: Array) -> Array:
    """bfe: bits [position, position + length), with the sign of the highest, or of the number's where it ends before."""
    start, count = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    if value.dtype == np.uint64:
        one, places = np.uint64(1), np.minimum(count, 63).astype(np.uint64)
        mask = np.where(count < 64, (one << places) - one, ~np.uint64(0))
        return np.where(start < 64, value >> np.minimum(start, 63).astype(np.uint64), np.uint64(0)) & mask
    wide = value.astype(np.int64)
    wide = wide >> np.minimum(start, 63)
    count = np.minimum(count, 32)
    field = wide & ((np.int64(1) << count) - 1)
    if value.dtype.kind == "i":
        field = np.where((count > 0) & ((field >> np.maximum(count - 1, 0)) & 1 == 1), field - (np.int64(1) << count), field)
    return field


def _funnel(machine: Machine, instruction: Instruction) -> Action:
    know(instruction, "l", "r", "wrap", "b32")
    target = machine.target(instruction.operands[0], "b32")
    low, high, by = (machine.source(operand, "u32") for operand in instruction.operands[1:])
    left = "l" in instruction.parts

    def run(mask: Mask) -> None:
        both = (np.uint64(1 << 32) * high.astype(np.uint64)) | low.astype(np.uint64)
        shift = (by & 31).astype(np.uint64)
        write(target, (both << shift) >> np.uint64(32) if left else both >> shift, mask)

    return run


_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def make_comparison(machine: Machine, instruction: Instruction) -> Action:
    """setp, with the result joined to another predicate where it says how."""
    parts, operands = instruction.parts, instruction.operands
    name, kind = _OF_UNSIGNED.get(parts[1], parts[1]), parts[-1]
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    know(instruction, *joins, "ftz", parts[1], kind)
    target = machine.target(operands[0], "pred")
    a, b = machine.source(operands[1], kind), machine.source(operands[2], kind)
    if kind in ("bf16", "f16"):
        compare = _comparison(name, True, instruction)
        result = lambda: compare(floats.values_of(a, kind), floats.values_of(b, kind))  # noqa: E731
    else:
        compare = _comparison(name, kind in ("f32", "f64"), instruction)
        result = lambda: compare(a, b)  # noqa: E731
    join = next((joins[part] for part in parts[2:-1] if part in joins), None)
    if join is None:
        return lambda mask: write(target, result(), mask)
    other = machine.source(operands[3], "pred")
    return lambda mask: write(target, join(result(), other), mask)


def _comparison(name: str, is_float: bool, instruction: Instruction) -> Callable[[Array, Array], Array]:
    if not is_float and name in _COMPARISONS:
        return _COMPARISONS[name]
    if is_float and name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if is_float and name in _COMPARISONS and name != "ne":
        return _COMPARISONS[name]
    if is_float and name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if is_float and name.endswith("u") and name[:-1] in _COMPARISONS:
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    raise NotEmulatedError(f"{instruction.opcode} is not emulated")

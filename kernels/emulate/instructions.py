"""What is emulated: by the first part of an opcode, who makes its instructions."""

from collections.abc import Callable

from emulate import access, arithmetic, asynchronous, conversion, matrices, warps
from emulate.findings import NotEmulatedError
from emulate.machine import Action, Machine
from emulate.parse import Instruction

_MAKERS: dict[str, Callable[[Machine, Instruction], Action]] = {
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs"), arithmetic.make_arithmetic),
    **dict.fromkeys(("and", "or", "xor", "not", "shl", "shr", "shf", "bfe", "popc"), arithmetic.make_bits),
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"), arithmetic.make_function),
    "setp": arithmetic.make_comparison,
    "selp": conversion.make_choice,
    "mov": conversion.make_move,
    "cvt": conversion.make_conversion,
    "prmt": conversion.make_permutation,
    "ld": access.make_load,
    "st": access.make_store,
    "atom": access.make_atomic,
    "red": access.make_atomic,
    "cp": asynchronous.make_copy,
    "wgmma": asynchronous.make_product,
    "mma": matrices.make_mma,
    "ldmatrix": matrices.make_matrix_load,
    "stmatrix": matrices.make_matrix_store,
    "shfl": warps.make_shuffle,
    "redux": warps.make_reduction,
    # Orders of memory: what runs here is in order, and hazards are told by barriers alone.
    **dict.fromkeys(("fence", "membar", "bar"), lambda machine, instruction: lambda mask: None),
}


def make(machine: Machine, instruction: Instruction) -> Action:
    """Raises NotEmulatedError, by name, for what is not known."""
    maker = _MAKERS.get(instruction.parts[0])
    if maker is None:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    return maker(machine, instruction)

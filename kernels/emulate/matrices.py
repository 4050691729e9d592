"""Products of matrices by warps (mma.sync), and the loads and stores of their parts.

A thread's registers hold parts of a matrix as the PTX manual's figures for m16n8k16 have them: with g = lane / 4 and t = lane % 4, of A
rows g and g + 8, of B column g, of the result rows g and g + 8. Products are exact, their sum is float32's in numpy's order.
"""

import numpy as np

from emulate import floats
from emulate.findings import NotEmulatedError
from emulate.forms import know, write
from emulate.machine import Action, Array, Machine, Mask
from emulate.parse import Instruction, elements

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def halves(machine: Machine, sources: list[Array], kind: str) -> Array:
    """Registers of two numbers each -> [warps, 32, registers, 2] float32."""
    raw = np.stack([machine.lanes(source) for source in sources], 1)
    return floats.values_of(raw.view(np.uint16), kind).reshape(-1, 32, len(sources), 2)


def a_matrix(parts: Array) -> Array:
    """[warps, 32, 4, 2] -> [warps, 16, 16]."""
    matrix = np.empty((len(parts), 16, 16), parts.dtype)
    for register in range(4):
        for i in range(2):
            matrix[:, _G + 8 * (register % 2), 2 * _T + i + 8 * (register // 2)] = parts[:, :, register, i]
    return matrix


def make_mma(machine: Machine, instruction: Instruction) -> Action:
    kind = instruction.parts[-2]
    know(instruction, "sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "f16")
    if instruction.parts[-4:] != ["f32", kind, kind, "f32"] or instruction.parts[-6:-4] != ["row", "col"]:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    to, a, b, c = (elements(operand) for operand in instruction.operands)
    targets = [machine.target(each, "f32") for each in to]
    a_sources, b_sources = ([machine.source(each, "b32") for each in part] for part in (a, b))
    c_sources = [machine.source(each, "f32") for each in c]

    def run(mask: Mask) -> None:
        machine.whole_warps(mask)
        b_parts = halves(machine, b_sources, kind)
        b_matrix = np.empty((len(b_parts), 16, 8), np.float32)
        for register in range(2):
            for i in range(2):
                b_matrix[:, 2 * _T + i + 8 * register, _G] = b_parts[:, :, register, i]
        product = a_matrix(halves(machine, a_sources, kind)) @ b_matrix
        sums = [source + product[:, _G + 8 * (i // 2), 2 * _T + i % 2].reshape(-1) for i, source in enumerate(c_sources)]
        for target, values in zip(targets, sums, strict=True):
            write(target, values, mask)

    return run


def _matrices(instruction: Instruction) -> int:
    """How many matrices of 8 rows of 16 bytes."""
    know(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16")
    return int(next(part for part in instruction.parts if part in ("x1", "x2", "x4"))[1:])


def make_matrix_load(machine: Machine, instruction: Instruction) -> Action:
    """ldmatrix: lane i names row i % 8 of matrix i / 8; a thread gets two numbers of row lane / 4."""
    count = _matrices(instruction)
    targets = [machine.target(each, "b32") for each in elements(instruction.operands[0])]
    addresses = machine.addresses(instruction.operands[1], "shared")
    transposed = "trans" in instruction.parts

    def run(mask: Mask) -> None:
        warps = machine.whole_warps(mask)
        at = addresses().reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        bits = machine.warp_bits.reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        rows = machine.shared.load(at, 16, bits).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        values = rows.view(np.uint32).reshape(len(warps), count, 32)
        for i, target in enumerate(targets):
            target.reshape(-1, 32)[warps] = values[:, i]

    return run


def make_matrix_store(machine: Machine, instruction: Instruction) -> Action:
    count = _matrices(instruction)
    addresses = machine.addresses(instruction.operands[0], "shared")
    sources = [machine.source(each, "b32") for each in elements(instruction.operands[1])]
    transposed = "trans" in instruction.parts

    def run(mask: Mask) -> None:
        warps = machine.whole_warps(mask)
        at = addresses().reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        bits = machine.warp_bits.reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        values = np.stack([machine.lanes(source).reshape(-1, 32)[warps] for source in sources], 1)
        rows = values.view(np.uint16).reshape(-1, 8, 8)
        if transposed:
            rows = rows.swapaxes(1, 2)
        machine.shared.store(at, np.ascontiguousarray(rows).view(np.uint64).reshape(-1, 2), bits)

    return run

"""What runs on beside the threads: copies to shared memory (cp.async), and products by warp groups (wgmma).

Both are done as late as their waits allow: a copy lands when its group is waited for, and a product reads its matrices in shared memory,
and writes its registers, at that time. Until then the registers hold NaN. A matrix in shared memory must not have changed in between.
"""

import re
from dataclasses import dataclass

import numpy as np

from emulate import floats
from emulate.findings import Finding, NotEmulatedError
from emulate.forms import know
from emulate.machine import Action, Array, Machine, Mask
from emulate.matrices import a_matrix, halves
from emulate.parse import Instruction, elements


def make_copy(machine: Machine, instruction: Instruction) -> Action:
    """cp.async and the grouping of copies. Where the size of the source is 0, zeros are written."""
    know(instruction, "async", "ca", "cg", "shared", "global", "commit_group", "wait_group", "wait_all", "L2::128B", "L2::256B")
    if "commit_group" in instruction.parts:
        return _grouping(machine, instruction, lambda: _commit(machine))
    if "wait_group" in instruction.parts or "wait_all" in instruction.parts:
        keep = int(instruction.operands[0]) if instruction.operands else 0
        commits = "wait_all" in instruction.parts
        return _grouping(machine, instruction, lambda: _land(machine, keep, commits))
    operands = instruction.operands
    to, given, size = machine.addresses(operands[0], "shared"), machine.addresses(operands[1], "global"), int(operands[2], 0)
    read = machine.source(operands[3], "u32") if len(operands) > 3 else np.uint32(size)
    element = min(size, 8)

    def run(mask: Mask) -> None:
        active = slice(None) if mask is True else mask
        warps, sizes = machine.warp_bits[active], machine.lanes(read)[active]
        if not ((sizes == 0) | (sizes == size)).all():
            raise NotEmulatedError("asynchronous copies of a part of their size are not emulated")
        at = machine.shared.start_copy(to()[active], size, warps)
        values = np.zeros((len(sizes), size // element), f"u{element}")
        values[sizes > 0] = machine.memory.load(given()[active][sizes > 0], size)
        machine.copies.append((at, values, warps))

    return run


def _grouping(machine: Machine, instruction: Instruction, action) -> Action:
    def run(mask: Mask) -> None:
        if mask is not True:
            raise NotEmulatedError(f"{instruction.opcode} of a part of the threads is not emulated")
        action()

    return run


def _commit(machine: Machine) -> None:
    machine.copy_groups.append(machine.copies)
    machine.copies = []


def _land(machine: Machine, keep: int, commits: bool) -> None:
    if commits:
        _commit(machine)
    while len(machine.copy_groups) > keep:
        for at, values, warps in machine.copy_groups.pop(0):
            machine.shared.finish_copy(at, values, warps)


@dataclass
class _Matrix:
    """A matrix in shared memory: where its numbers lie [rows, k], and what they were when the product began."""

    at: Array
    before: Array


@dataclass
class _Product:
    """One wgmma of one warp group, on its way. adds [128] bool: to what the registers hold, else in place of it."""

    sums: "Sums"
    kind: str
    a: Array | _Matrix
    b: _Matrix
    adds: Array
    bits: np.uint8


@dataclass
class Sums:
    """The registers of a warp group that products on their way write to, and what they will hold [128, registers]."""

    targets: list[Array]
    threads: slice
    values: Array
    num_products: int = 0


# Bits of an address that a swizzle mixes with those of its row, and bytes of a row, by the layout of a descriptor.
_SWIZZLES = {0: (0, 16), 1: (7, 128), 2: (3, 64), 3: (1, 32)}


def make_product(machine: Machine, instruction: Instruction) -> Action:
    if "mma_async" not in instruction.parts:
        know(instruction, "fence", "commit_group", "wait_group", "sync", "aligned")
        if "fence" in instruction.parts:
            return lambda mask: None
        if "commit_group" in instruction.parts:
            return _grouping(machine, instruction, lambda: _commit_products(machine))
        keep = int(instruction.operands[0])
        return _grouping(machine, instruction, lambda: _finish_products(machine, keep))
    shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", instruction.opcode)
    if shape is None:
        raise NotEmulatedError(f"{instruction.opcode} is not emulated")
    columns, kind = int(shape[1]), shape[2]
    operands = instruction.operands
    targets = [machine.target(each, "f32") for each in elements(operands[0])]
    from_registers = operands[1].startswith("{")
    a_sources = [machine.source(each, "b32") for each in elements(operands[1])] if from_registers else []
    a_descriptor = None if from_registers else machine.source(operands[1], "u64")
    b_descriptor, adds = machine.source(operands[2], "u64"), machine.source(operands[3], "pred")
    if list(operands[4:6]) != ["1", "1"]:
        raise NotEmulatedError(f"wgmma with negated matrices ({', '.join(operands[4:6])}) is not emulated")
    transposed = [operand == "1" for operand in operands[6:]]
    if len(transposed) != 2 - from_registers:
        raise NotEmulatedError(f"wgmma with operands {', '.join(operands[3:])} is not emulated")

    def run(mask: Mask) -> None:
        warps = machine.whole_warps(mask)
        a_parts = halves(machine, a_sources, kind) if from_registers else None
        for first in range(0, machine.num_threads // 32, 4):
            if first not in warps:
                continue
            if not set(range(first, first + 4)) <= set(warps):
                raise Finding("a part of a warp group executes what a whole one must")
            threads = slice(32 * first, 32 * first + 128)
            bits = np.bitwise_or.reduce(machine.warp_bits[threads])
            b = _matrix(machine, machine.lanes(b_descriptor)[threads], columns, transposed[-1], bits)
            if a_parts is not None:
                a: Array | _Matrix = a_matrix(a_parts[first : first + 4]).reshape(64, 16)
            else:
                a = _matrix(machine, machine.lanes(a_descriptor)[threads], 64, transposed[0], bits)
            sums = _sums(machine, operands[0], targets, threads)
            sums.num_products += 1
            machine.products.append(_Product(sums, kind, a, b, machine.lanes(adds)[threads].copy(), bits))

    return run


def _matrix(machine: Machine, descriptors: Array, rows: int, along_rows: bool, bits: np.uint8) -> _Matrix:
    """Of a descriptor: start, the strides of its blocks, and a swizzle. along_rows: rows, not k, follow one another in memory."""
    if (descriptors != descriptors[0]).any():
        raise Finding("the threads of a warp group have different descriptors of a matrix")
    descriptor = int(descriptors[0])
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    mixed, span = _SWIZZLES[descriptor >> 62]
    if (descriptor >> 49) & 7:
        raise NotEmulatedError("matrix descriptors with a base offset are not emulated")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    # Blocks of 8 lines of `span` bytes; leading leads to the next one along a line, stride to the next 8 lines.
    line, along = (k, row) if along_rows else (row, k)
    per_line = span // 2
    at = start + line // 8 * stride + line % 8 * span + along % per_line * 2 + along // per_line * leading
    at = at ^ (((at >> 7) & mixed) << 4)
    if at.max() + 2 > machine.shared.size:
        raise Finding(f"a matrix reaches to byte {at.max() + 2} of {machine.shared.size} of shared memory")
    at //= 2
    _read(machine, at, bits)
    return _Matrix(at, machine.shared.data[2][at])


def _read(machine: Machine, at: Array, bits: np.uint8) -> None:
    machine.shared.note_read(at, 2, np.full(len(at), bits, np.uint8))


def _sums(machine: Machine, names: str, targets: list[Array], threads: slice) -> Sums:
    """Those that are on their way already, or from now on are."""
    key = names, threads.start
    if key not in machine.sums or machine.sums[key].num_products == 0:
        machine.sums[key] = Sums(targets, threads, np.stack([target[threads] for target in targets], 1))
        for target in targets:
            target[threads] = np.nan
    return machine.sums[key]


def _commit_products(machine: Machine) -> None:
    machine.product_groups.append(machine.products)
    machine.products = []


def _finish_products(machine: Machine, keep: int) -> None:
    while len(machine.product_groups) > keep:
        for product in machine.product_groups.pop(0):
            _finish(machine, product)


def _finish(machine: Machine, product: _Product) -> None:
    def values(matrix: Array | _Matrix) -> Array:
        if not isinstance(matrix, _Matrix):
            return matrix
        _read(machine, matrix.at, product.bits)
        now = machine.shared.data[2][matrix.at]
        if (now != matrix.before).any():
            raise Finding("a matrix changed before the product that reads it was waited for")
        return floats.values_of(now, product.kind)

    sums = product.sums
    result = values(product.a) @ values(product.b).T
    thread, register = np.arange(128)[:, None], np.arange(len(sums.targets))[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    column = register // 4 * 8 + thread % 4 * 2 + register % 2
    sums.values = np.where(product.adds[:, None], sums.values, np.float32(0)) + result[row, column]
    sums.num_products -= 1
    if sums.num_products == 0:
        for i, target in enumerate(sums.targets):
            target[sums.threads] = sums.values[:, i]

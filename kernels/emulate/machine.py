"""One program (CTA) of a kernel: its registers, its threads' places in the code, and the loop that runs it.

All threads that stand at the same instruction execute it at once, as one numpy operation. Where a branch parts them, those that are
furthest behind go first, until they meet again. What an instruction does is made from its text once a machine, when it is first met:
a function of the mask of threads that execute it (True: all).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emulate.findings import Finding, NotEmulatedError
from emulate.memory import GlobalMemory, SharedMemory, warp_bits
from emulate.parse import Instruction, Program

Array = NDArray
Mask = Array | bool
Action = Callable[[Mask], None]

DTYPES: dict[str, type] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "bf16": np.uint16, "f16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "bf16x2": np.uint32, "f16x2": np.uint32,
    "s16x2": np.uint32, "u16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


def dtype_of(kind: str) -> np.dtype:
    """Of a type's name in PTX; half precision is held as its bits."""
    if kind not in DTYPES:
        raise NotEmulatedError(f"numbers of type .{kind} are not emulated")
    return np.dtype(DTYPES[kind])


_CONTROL = ("bra", "bar", "barrier", "ret", "exit")


@dataclass
class _Group:
    """Threads that stand at one instruction. waits: at a barrier."""

    place: int
    mask: Mask
    waits: bool = False


class Machine:
    """Runs programs of one kernel, one after the other."""

    def __init__(self, program: Program, memory: GlobalMemory, shared_bytes: int, parameters: dict[str, int]):
        self.program = program
        self.memory = memory
        self.parameters = parameters
        self.num_threads = program.num_threads
        self.warp_bits = warp_bits(program.num_threads)
        self.shared = SharedMemory(max(shared_bytes, 16))
        self.num_executed = 0
        # What matrices and copies have on their way; see `asynchronous.py`.
        self.copies: list[list] = []
        self.copy_groups: list[list] = []
        self.products: list = []
        self.product_groups: list[list] = []
        self.sums: dict = {}
        self._groups: list[_Group] = []
        self._actions: list[Action | None] = [None] * len(program.instructions)
        self._control = [i.parts[0] in _CONTROL and i.opcode != "bar.warp.sync" for i in program.instructions]
        self._make_registers()
        self._special: dict[str, Array] = {"%tid.x": np.arange(self.num_threads, dtype=np.uint32)}
        self._special["%laneid"] = self._special["%tid.x"] % 32
        for name in ("%tid.y", "%tid.z", *(f"%{kind}.{axis}" for kind in ("ctaid", "nctaid") for axis in "xyz")):
            self._special[name] = np.zeros(self.num_threads, np.uint32)
        self._special["%ntid.x"] = np.full(self.num_threads, self.num_threads, np.uint32)

    def _make_registers(self) -> None:
        by_size: dict[type, list[str]] = {}
        for name, kind in self.program.registers.items():
            size = dtype_of(kind).itemsize
            by_size.setdefault(np.bool_ if kind == "pred" else getattr(np, f"uint{8 * size}"), []).append(name)
        self._registers: dict[str, Array] = {}
        for dtype, names in by_size.items():
            rows = np.zeros((len(names), self.num_threads), dtype)
            self._registers.update(zip(names, rows, strict=True))

    # What instructions are made of.

    def source(self, operand: str, kind: str) -> Array:
        """What an operand reads: an array [threads] that changes with the register, or a number."""
        dtype = dtype_of(kind)
        register = self._special.get(operand)
        if register is None:
            register = self._registers.get(operand)
        if register is None:
            return self._immediate(operand, dtype)
        if (register.dtype == np.bool_) != (dtype == np.bool_) or register.itemsize < dtype.itemsize:
            raise NotEmulatedError(f"{operand} read as .{kind} is not emulated")
        # A wider register is read in its lower part.
        return register.view(dtype)[:: register.itemsize // dtype.itemsize]

    def target(self, operand: str, kind: str) -> Array:
        """What an operand writes to. A register that is wider than the type is extended with its sign or zeros."""
        if operand == "_":
            return np.empty(self.num_threads, dtype_of(kind))
        dtype, register = dtype_of(kind), self._registers.get(operand)
        if register is None or (register.dtype == np.bool_) != (dtype == np.bool_) or register.itemsize < dtype.itemsize:
            raise NotEmulatedError(f"{operand} written as .{kind} is not emulated")
        if register.itemsize == dtype.itemsize:
            return register.view(dtype)
        if dtype.kind == "f":
            raise NotEmulatedError(f"{operand}, which is wider, written as .{kind} is not emulated")
        return register.view(f"{dtype.kind}{register.itemsize}")

    @staticmethod
    def _immediate(operand: str, dtype: np.dtype) -> Array:
        if operand == "global_smem":
            return dtype.type(0)
        try:
            bits = int(operand[2:], 16) if operand[:2] in ("0f", "0F", "0d", "0D") else int(operand.rstrip("U"), 0)
        except ValueError:
            raise NotEmulatedError(f"operand {operand} is not emulated") from None
        if dtype == np.bool_:
            return np.bool_(bits != 0)
        width = 8 * dtype.itemsize
        return np.array([bits & (2**width - 1)], f"u{dtype.itemsize}").view(dtype)[0]

    def addresses(self, operand: str, space: str) -> Callable[[], Array]:
        """Of `[base + offset]`: int64 [threads]."""
        base, _, offset = (part.strip() for part in operand.strip("[] ").partition("+"))
        shift = int(offset, 0) if offset else 0
        if base == "global_smem":
            fixed = np.full(self.num_threads, shift, np.int64)
            return lambda: fixed
        register = self.source(base, "s32" if space == "shared" else "s64")
        return lambda: register.astype(np.int64) + shift

    def lanes(self, array: Array) -> Array:
        """A number that an operand gave, as one of each thread."""
        return np.broadcast_to(array, (self.num_threads,))

    def whole_warps(self, mask: Mask) -> list[int]:
        """The warps that execute an instruction of whole warps."""
        if mask is True:
            return list(range(self.num_threads // 32))
        warps = np.asarray(mask).reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise Finding("a part of a warp executes what whole warps must")
        return np.flatnonzero(warps.all(1)).tolist()

    # Running.

    def start(self, place: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Begin the program at this place of the grid."""
        self.place = place
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self._special[f"%ctaid.{axis}"][:] = at
            self._special[f"%nctaid.{axis}"][:] = size
        self.shared.reset()
        self.copies, self.copy_groups, self.products, self.product_groups = [], [], [], []
        self.sums = {}
        self._groups = [_Group(0, True)]

    def run(self, most: int) -> bool:
        """Execute up to `most` instructions; whether the program has ended."""
        for _ in range(most):
            if not self._groups:
                return True
            group = self._groups[0] if len(self._groups) == 1 else self._next()
            self._step(group)
            self.num_executed += 1
        return not self._groups

    def _next(self) -> _Group:
        """The group that is furthest behind, joined by those that stand at the same instruction."""
        self._groups.sort(key=lambda group: (group.waits, group.place))
        first = self._groups[0]
        while len(self._groups) > 1 and self._groups[1].place == first.place and self._groups[1].waits == first.waits:
            mask = first.mask | self._groups.pop(1).mask
            first.mask = True if mask.all() else mask
        return first

    def _step(self, group: _Group) -> None:
        at = group.place
        instruction = self.program.instructions[at]
        mask = group.mask
        try:
            if instruction.guard is not None:
                mask = self.source(instruction.guard, "pred")
                mask = ~mask if instruction.negated else mask.copy()
                if group.mask is not True:
                    mask &= group.mask
                elif mask.all():
                    mask = True
            if self._control[at]:
                self._move(group, instruction, mask)
                return
            group.place += 1
            if mask is True or mask.any():
                action = self._actions[at]
                if action is None:
                    action = self._actions[at] = self._make(instruction)
                action(mask)
        except (Finding, NotEmulatedError) as error:
            # The type stays; where it happened is added once.
            raise type(error)(f"{self.program.name}, program {self.place}: {error}; at {instruction}") from error

    def _make(self, instruction: Instruction) -> Action:
        from emulate.instructions import make

        return make(self, instruction)

    def _move(self, group: _Group, instruction: Instruction, mask: Mask) -> None:
        """Branches, barriers and the end."""
        kind = instruction.parts[0]
        stays = None if mask is True else (~mask if group.mask is True else group.mask & ~mask)
        if mask is not True and not mask.any():
            group.place += 1
            return
        if kind == "bra":
            target = self.program.labels.get(instruction.operands[0])
            if target is None:
                raise NotEmulatedError(f"a branch to {instruction.operands[0]}")
            if stays is not None and stays.any():
                self._groups.append(_Group(group.place + 1, stays))
                group.mask = mask
            group.place = target
        elif kind in ("bar", "barrier"):
            if instruction.operands != ("0",) or "sync" not in instruction.parts or (stays is not None and stays.any()):
                raise NotEmulatedError("barriers of a part of the threads, and named ones, are not emulated")
            group.place += 1
            group.waits = True
            if all(each.waits for each in self._groups):
                self.shared.barrier()
                for each in self._groups:
                    each.waits = False
        else:
            self._groups.remove(group)
            if stays is not None and stays.any():
                self._groups.append(_Group(group.place + 1, stays))
            if self._groups and all(each.waits for each in self._groups):
                raise Finding("threads end while others wait for them at a barrier")

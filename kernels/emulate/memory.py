"""Global memory (the storage of tensors, in place) and one program's shared memory, with what is checked at each access.

Both are accessed by all lanes of a program at once: addresses [n], and an access's elements of at most 8 bytes each.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from emulate.findings import Finding, NotEmulatedError

Array = NDArray
# What memory from torch.empty is filled with: NaN in float32, float16 and bfloat16, and in no table of pages.
POISON = np.uint32(0xFFF1FFF1)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# A warp has one bit of a byte.
MOST_WARPS = 8


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor's whole storage, so that reading any of it is a finding until it is written."""
    data = _bytes_of(tensor)
    data[:] = np.resize(np.array([POISON]).view(np.uint8), len(data))
    return tensor


def _bytes_of(tensor: torch.Tensor) -> Array:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


@dataclass(frozen=True)
class _Buffer:
    name: str
    start: int
    end: int
    words: dict[int, Array]
    """the bytes as unsigned numbers, by size"""


class GlobalMemory:
    """The tensors that a kernel was given. An access elsewhere, a misaligned one, and reading what nobody has written are findings."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}
        self._starts: list[int] = []

    def add(self, tensor: torch.Tensor, name: str) -> None:
        """Its storage may be accessed from now on."""
        data = _bytes_of(tensor) if tensor.untyped_storage().nbytes() else np.zeros(0, np.uint8)
        start = tensor.untyped_storage().data_ptr()
        if len(data) == 0 or start in self._buffers:
            return
        if start % 16:
            raise ValueError(f"the storage of {name} begins at {start:#x}; emulated ones begin at a multiple of 16 bytes")
        words = {size: data[: len(data) // size * size].view(kind) for size, kind in _UNSIGNED.items()}
        self._buffers[start] = _Buffer(name, start, start + len(data), words)
        self._starts = sorted(self._buffers)

    def load(self, addresses: Array, size: int) -> Array:
        """[n] int64 addresses of `size` bytes each -> [n, size / e] unsigned numbers of e = min(size, 8) bytes."""
        element = min(size, 8)
        out = np.empty((len(addresses), size // element), _UNSIGNED[element])
        for buffer, lanes, at in self._places(addresses, size, "read"):
            out[lanes] = buffer.words[element][at]
            if element >= 4:
                unwritten = (out[lanes].view(np.uint32) == POISON).any()
            else:
                whole = np.minimum(at * element // 4, len(buffer.words[4]) - 1)
                unwritten = len(buffer.words[4]) > 0 and (buffer.words[4][whole] == POISON).any()
            if unwritten:
                raise Finding(f"reads of {buffer.name} what nobody has written")
        return out

    def store(self, addresses: Array, values: Array) -> None:
        """values [n, m] unsigned. Of lanes that write to one place any may win: the last does."""
        element = values.dtype.itemsize
        for buffer, lanes, at in self._places(addresses, element * values.shape[1], "write"):
            buffer.words[element][at] = values[lanes]

    def _places(self, addresses: Array, size: int, what: str) -> Iterator[tuple[_Buffer, slice | Array, Array]]:
        """Of each buffer that is met: the lanes, and their elements' indices."""
        if len(addresses) == 0:
            return
        if (addresses & (size - 1)).any():
            wrong = int(addresses[(addresses & (size - 1)) != 0][0])
            raise Finding(f"misaligned {what} of {size} bytes at {self._name(wrong)}")
        first = self._buffer(int(addresses.min()))
        if first is not None and int(addresses.max()) + size <= first.end:
            yield first, slice(None), self._indices(addresses, first, size)
            return
        place = np.searchsorted(np.array(self._starts, np.int64), addresses, "right") - 1
        for index in np.unique(place).tolist():
            lanes = np.flatnonzero(place == index)
            buffer = self._buffers[self._starts[index]] if index >= 0 else None
            outside = addresses[lanes] + size > (buffer.end if buffer else 0)
            if buffer is None or outside.any():
                raise Finding(f"{what} of {size} bytes out of bounds, at {self._name(int(addresses[lanes][outside][0]))}")
            yield buffer, lanes, self._indices(addresses[lanes], buffer, size)

    @staticmethod
    def _indices(addresses: Array, buffer: _Buffer, size: int) -> Array:
        element = min(size, 8)
        return ((addresses - buffer.start) // element)[:, None] + np.arange(size // element)

    def _buffer(self, address: int) -> _Buffer | None:
        at = bisect.bisect_right(self._starts, address) - 1
        return self._buffers[self._starts[at]] if at >= 0 else None

    def _name(self, address: int) -> str:
        """In words, by the nearest buffer."""
        if not self._buffers:
            return f"{address:#x}, where no tensor is"
        near = min(self._buffers.values(), key=lambda b: max(b.start - address, address - b.end + 1, 0))
        return f"byte {address - near.start} of {near.name}, which has {near.end - near.start}"


class SharedMemory:
    """One program's. Beside bounds and alignment it finds reads of what nobody has written, of what an asynchronous copy has not
    been waited for, and hazards: two warps that meet at a byte between two barriers, one of them writing (another value than is
    there already). What it keeps of each byte since the last barrier are the warps that read it, and those that wrote what is
    there, a bit each."""

    def __init__(self, size: int) -> None:
        self.size = size
        room = -(-size // 8) * 8
        # 0xFF beside bytes that have been written, and beside those that an asynchronous copy is on its way to.
        names = ("data", "written", "pending", "readers", "writers")
        tracks = {name: np.zeros(room, np.uint8) for name in names}
        self._tracks = tracks
        self.data, self.written, self.pending, self.readers, self.writers = (
            {width: track.view(kind) for width, kind in _UNSIGNED.items()} for track in tracks.values()
        )

    def reset(self) -> None:
        for track in self._tracks.values():
            track.fill(0)

    def barrier(self) -> None:
        self._tracks["readers"].fill(0)
        self._tracks["writers"].fill(0)

    def load(self, addresses: Array, size: int, warps: Array) -> Array:
        """As GlobalMemory.load; warps [n] uint8: a bit for the warp of each lane, or for several that read together."""
        element = min(size, 8)
        at = self._places(addresses, size, "read")
        self.note_read(at, element, warps)
        return self.data[element][at]

    def note_read(self, at: Array, element: int, warps: Array) -> None:
        """at [n, m]: indices of elements, warps [n]."""
        bits = _repeated(warps, element)[:, None]
        if (self.written[element][at] != _FULL[element]).any():
            raise Finding("reads shared memory that nobody has written")
        if self.pending[element][at].any():
            raise Finding("reads shared memory while an asynchronous copy to it has not been waited for")
        writers = self.writers[element][at]
        if ((writers != 0) & (writers != bits)).any() and _strangers(writers, np.broadcast_to(bits, at.shape)):
            raise Finding("reads shared memory that another warp has written since the last barrier")
        self._add(self.readers[element], at, bits)

    def store(self, addresses: Array, values: Array, warps: Array) -> None:
        element = values.dtype.itemsize
        at = self._places(addresses, element * values.shape[1], "write")
        bits = _repeated(warps, element)[:, None]
        self._check_unread(at, element, bits)
        data, writers = self.data[element], self.writers[element]
        before = writers[at]
        # Warps that hold the same part of a tensor write it all of them.
        same = data[at] == values
        if ((before & ~bits).astype(bool) & ~same).any():
            raise Finding("writes to shared memory that another warp has written something else to since the last barrier")
        data[at] = values
        if (data[at] != values).any():
            raise Finding("two threads write different values to the same shared memory")
        writers[at] = np.where(same, before, 0)
        self._add(writers, at, bits)
        self.written[element][at] = _FULL[element]

    def start_copy(self, addresses: Array, size: int, warps: Array) -> Array:
        """An asynchronous copy begins: gives the indices of its elements, for `finish_copy`."""
        element = min(size, 8)
        at = self._places(addresses, size, "write")
        bits = _repeated(warps, element)[:, None]
        self._check_unread(at, element, bits)
        if (self.writers[element][at] & ~bits).any():
            raise Finding("copies over shared memory that another warp has written since the last barrier")
        self.pending[element][at] = _FULL[element]
        return at

    def finish_copy(self, at: Array, values: Array, warps: Array) -> None:
        element = values.dtype.itemsize
        self.data[element][at] = values
        self.pending[element][at] = 0
        self.written[element][at] = _FULL[element]
        self.writers[element][at] = 0
        self._add(self.writers[element], at, _repeated(warps, element)[:, None])

    def _check_unread(self, at: Array, element: int, bits: Array) -> None:
        if self.pending[element][at].any():
            raise Finding("writes to shared memory while an asynchronous copy to it has not been waited for")
        if (self.readers[element][at] & ~bits).any():
            raise Finding("writes to shared memory that another warp has read since the last barrier")

    def _places(self, addresses: Array, size: int, what: str) -> Array:
        if len(addresses):
            if (addresses & (size - 1)).any():
                raise Finding(f"misaligned {what} of {size} bytes of shared memory, at {addresses[(addresses & (size - 1)) != 0][0]}")
            if addresses.min() < 0 or int(addresses.max()) + size > self.size:
                wrong = addresses[(addresses < 0) | (addresses + size > self.size)][0]
                raise Finding(f"{what} of {size} bytes out of bounds, at byte {wrong} of {self.size} of shared memory")
        element = min(size, 8)
        return (addresses // element)[:, None] + np.arange(size // element)

    @staticmethod
    def _add(track: Array, at: Array, bits: Array) -> None:
        """track |= bits at these places, of which several may be one."""
        bits = np.broadcast_to(bits, at.shape)
        while len(at):
            track[at] |= bits
            missing = (track[at] & bits) != bits
            if not missing.any():
                return
            at, bits = at[missing], bits[missing]


_FULL = {size: kind(2 ** (8 * size) - 1) for size, kind in _UNSIGNED.items()}
_ONES = {size: kind(sum(1 << (8 * i) for i in range(size))) for size, kind in _UNSIGNED.items()}


def _repeated(warps: Array, element: int) -> Array:
    """The byte in each byte of numbers of so many."""
    return warps.astype(_UNSIGNED[element]) * _ONES[element]


def _strangers(writers: Array, bits: Array) -> bool:
    """Whether a byte has writers, and not all of those who read it are among them."""
    written = np.ascontiguousarray(writers).view(np.uint8)
    readers = np.ascontiguousarray(bits).view(np.uint8)
    return bool(((written != 0) & ((readers & ~written) != 0)).any())


def warp_bits(num_threads: int) -> Array:
    """[threads] uint8."""
    warps = -(-num_threads // 32)
    if warps > MOST_WARPS:
        raise NotEmulatedError(f"{warps} warps a program; up to {MOST_WARPS} are emulated")
    return (1 << (np.arange(num_threads) // 32)).astype(np.uint8)

"""Pages that rest in host memory, and are on the device while their layer is read: of caches made with offload_layers.

The keys and values of a pool lie on the host in one piece. A cache and its forks have two buffers on each device, and a layer's pages are copied
to one of them before attention reads them, to where kernels expect them: page tables and kernels know nothing of it. While a layer is
computed, the pages of the one that was read after it the last time are copied beside it. When a layer has been read its buffer is given up, and what
was written to its pages goes back: entries are written once, so that these are a token's at most, not the layer.

Whoever asks a pool for its rows, as forks, files and changes of rows do, gets them brought in the same way.

Shapes: N pages, P entries of a page, K rows of keys and values.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dms.cache.offloading import Offloaded, placeholder
from dms.cache.page_pool import CachedLaunches, PagePool, StoredRows, as_bytes, outside_inference_mode, stored_rows

# One that is read, and one that is filled.
NUM_BUFFERS = 2
# Scales begin at a multiple of this, in bytes, behind the rows.
_ALIGNMENT = 256
# Attributes of a pool that are there only while its pages are on the device.
_ON_DEVICE = ("rows", "row_scales", "cached_launches")


# Compared by identity.
@dataclass(eq=False)
class _Buffer:
    memory: torch.Tensor
    """[capacity] uint8"""
    holder: "weakref.ref[HostPagePool] | None" = None
    """Whose pages are in it."""
    arrival: torch.cuda.Event | None = None
    """After which they are; None: they are."""

    @property
    def pool(self) -> "HostPagePool | None":
        return None if self.holder is None else self.holder()


@dataclass(frozen=True)
class _Returning:
    """Rows [K] on their way to the host."""

    row: torch.Tensor
    stored: StoredRows
    arrival: torch.cuda.Event | None


class PageBuffers:
    """Room on a device for the pages of two layers, for a cache and its forks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.capacity = 0
        """Bytes of each buffer, as many as the largest pool has."""
        self.pools: weakref.WeakSet[HostPagePool] = weakref.WeakSet()
        self.bytes_to_device = 0
        """Copied so far."""
        self.bytes_to_host = 0
        self._buffers: list[_Buffer] = []
        self._newest: _Buffer | None = None
        """The one whose pages were asked for last."""
        self._last_read: weakref.ref[HostPagePool] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: Any) -> "PageBuffers":
        # Copied pools fill it again.
        return PageBuffers(self.device)

    def tensors(self) -> list[torch.Tensor]:
        return [buffer.memory for buffer in self._buffers]

    # Copies.

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copies that go on beside what is computed, and begin when what was asked of the device before is done."""
        if self.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def _arrival(self) -> torch.cuda.Event | None:
        """When the copies asked for so far are done; within `beside`."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def fetch(self, pool: "HostPagePool") -> None:
        """Begin to copy a pool's pages to a buffer: to one that is free, else to one that was not asked for last."""
        self.allocate()
        buffer = self._free() or next(buffer for buffer in self._buffers if buffer is not self._newest)
        if (before := buffer.pool) is not None:
            before.give_up()
        pool.settle()
        with self.beside():
            pool.copy_to(buffer.memory)
            buffer.arrival = self._arrival()
        buffer.holder, pool.buffer = weakref.ref(pool), buffer
        self.bytes_to_device += pool.host_bytes

    def _free(self) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.pool is None), None)

    def wait_for(self, buffer: _Buffer) -> None:
        """What is asked of the device from here on finds the buffer filled."""
        self._newest = buffer
        if buffer.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.arrival)
            buffer.arrival = None

    def to_host(self, row: torch.Tensor, stored: StoredRows) -> _Returning:
        """Begin to copy rows to the host."""
        tensors = [row, *(x for x in stored if x is not None)]
        self.bytes_to_host += sum(x.nbytes for x in tensors)
        if self.device.type != "cuda":
            return _Returning(row, stored, None)
        with self.beside():
            for x in tensors:
                # It is freed by the stream that made it.
                x.record_stream(torch.cuda.current_stream(self.device))
            pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
            return _Returning(pinned[0], StoredRows(pinned[1], pinned[2] if len(pinned) > 2 else None), self._arrival())

    def end_reading(self, pool: "HostPagePool") -> None:
        """A layer has been read: give up its buffer, and begin to fill what is free with those that come next."""
        last = None if self._last_read is None else self._last_read()
        if last is not None:
            last.read_next = weakref.ref(pool)
        self._last_read = weakref.ref(pool)
        pool.give_up()
        coming: list[HostPagePool] = []
        for _ in self._buffers:
            following = (coming[-1] if coming else pool).read_next
            ahead = None if following is None else following()
            if ahead is None or ahead.offloaded is not None:
                break
            coming.append(ahead)
        for buffer in self._buffers:
            if (held := buffer.pool) is not None and held not in coming:
                held.give_up()
        for ahead in coming:
            if ahead.buffer is None and ahead.num_pages:
                self.fetch(ahead)

    # Size.

    def fit(self) -> None:
        """Be as large as the largest pool, after one has changed."""
        largest = max((pool.host_bytes for pool in self.pools), default=0)
        if largest > self.capacity or 4 * largest < 3 * self.capacity:
            self.free()
            self.capacity = largest
            self.allocate()

    @outside_inference_mode
    def allocate(self) -> None:
        if not self._buffers:
            self._buffers = [_Buffer(torch.empty(self.capacity, dtype=torch.uint8, device=self.device)) for _ in range(NUM_BUFFERS)]

    def free(self) -> None:
        """Hold nothing, until a layer is read."""
        for buffer in self._buffers:
            if (pool := buffer.pool) is not None:
                pool.give_up()
        if self._stream is not None:
            # What a copy goes to is not given to others before it has ended.
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._buffers, self._newest = [], None

    def free_if_idle(self) -> None:
        """Where all pools are of caches that are elsewhere, or gone."""
        if all(pool.num_offloaded == pool.num_holders for pool in self.pools):
            self.free()

    def missing_bytes(self) -> int:
        """What they take as soon as a layer is read."""
        return 0 if self._buffers else NUM_BUFFERS * self.capacity


def growth_bytes(growths: Iterable[tuple[PagePool, int]]) -> int:
    """What pools take of their devices that grow by so many pages each."""
    growths = [(pool, num_pages) for pool, num_pages in growths if num_pages]
    largest: dict[PageBuffers, int] = {}
    for pool, num_pages in growths:
        if isinstance(pool, HostPagePool):
            largest[pool.buffers] = max(largest.get(pool.buffers, 0), pool.bytes_of(pool.num_pages + num_pages))
    buffers = sum(NUM_BUFFERS * max(0, num_bytes - buffers.capacity) for buffers, num_bytes in largest.items())
    return buffers + sum(num_pages * pool.page_bytes for pool, num_pages in growths)


class HostPagePool(PagePool):
    """A pool whose rows rest in host memory, pinned where the device is a GPU. Counts, the free list and positions are on the device.

    buffers: where its pages are while they are read.
    """

    @outside_inference_mode
    def __init__(self, *args: Any, buffers: PageBuffers, **options: Any):
        super().__init__(*args, **options)
        self.buffer: _Buffer | None = None
        """Where its pages are, or are copied to; None: on the host alone."""
        self.read_next: weakref.ref[HostPagePool] | None = None
        """The pool that was read after this one."""
        self._rows_like, self._scales_like = self.rows, self.row_scales
        """One each."""
        self._written: list[torch.Tensor] = []
        """Rows [K] that were written to in the buffer."""
        self._returning: list[_Returning] = []
        self._views: weakref.WeakKeyDictionary[_Buffer, dict[str, Any]] = weakref.WeakKeyDictionary()
        """Of each buffer: the attributes that there are while the pages are in it, the same ones each time, so that kernels are launched as before."""
        self.host = self._host_memory(0)
        """[`host_bytes`] uint8: all rows, and then their scales."""
        self.buffers = buffers
        buffers.pools.add(self)
        buffers.fit()
        self._forget()

    def __getattr__(self, name: str) -> Any:
        if name not in _ON_DEVICE or "buffers" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._bring()
        return vars(self)[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostPagePool":
        self.rest()
        new = memo[id(self)] = object.__new__(type(self))
        fields = {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in ("read_next", "_views")}
        vars(new).update(fields, read_next=None, _views=weakref.WeakKeyDictionary())
        new.buffers.pools.add(new)
        new.buffers.fit()
        return new

    # Where the pages are.

    @outside_inference_mode
    def _bring(self) -> None:
        if self.buffer is None:
            self.buffers.fetch(self)
        assert self.buffer is not None, "it was fetched"
        self.buffers.wait_for(self.buffer)
        if self.buffer not in self._views:
            rows, scales = self._parts(self.buffer.memory, self.num_pages)
            self._views[self.buffer] = {"rows": rows, "row_scales": scales, "cached_launches": CachedLaunches()}
        vars(self).update(self._views[self.buffer])

    def copy_to(self, memory: torch.Tensor) -> None:
        """Copy all of it to a buffer."""
        memory[: self.host_bytes].copy_(self.host, non_blocking=True)

    @outside_inference_mode
    def give_up(self) -> None:
        """Leave the buffer. What was written to it is on its way to the host then."""
        if self.buffer is None:
            return
        if self._written:
            row, self._written = torch.cat(self._written), []
            self._returning.append(self.buffers.to_host(row, self.stored(row)))
        self.buffer.holder, self.buffer = None, None
        self._forget()

    def _forget(self) -> None:
        for name in _ON_DEVICE:
            vars(self).pop(name, None)
        if self._scales_like is None:
            self.row_scales = None

    @outside_inference_mode
    def settle(self) -> None:
        """Wait for what is on its way to the host, and put it where it belongs. It left a step ago, where layers are read in turn."""
        while self._returning:
            one = self._returning.pop(0)
            if one.arrival is not None:
                one.arrival.synchronize()
            for part, values in zip(self._parts(self.host, self.num_pages), one.stored, strict=True):
                if part is not None and values is not None:
                    as_bytes(part).index_copy_(0, one.row, as_bytes(values))

    def rest(self) -> None:
        """Be on the host alone, all that was written included."""
        self.give_up()
        self.settle()

    def end_reading(self) -> None:
        self.buffers.end_reading(self)

    # Memory.

    def bytes_of(self, num_pages: int) -> int:
        """Of the rows of so many pages and of their scales, on the host as in a buffer."""
        begin, num_rows = self._scales_begin(num_pages), num_pages * 2 * self.page_size + 1
        return begin + (0 if self._scales_like is None else num_rows * self._scales_like[0].nbytes)

    def _scales_begin(self, num_pages: int) -> int:
        return -(-(num_pages * 2 * self.page_size + 1) * self._rows_like[0].nbytes // _ALIGNMENT) * _ALIGNMENT

    def _parts(self, memory: torch.Tensor, num_pages: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and scales of num_pages pages, as views of memory."""
        num_rows, begin = num_pages * 2 * self.page_size + 1, self._scales_begin(num_pages)

        def part(begin: int, like: torch.Tensor) -> torch.Tensor:
            return memory[begin : begin + num_rows * like[0].nbytes].view(like.dtype).view(num_rows, *like.shape[1:])

        return part(0, self._rows_like), None if self._scales_like is None else part(begin, self._scales_like)

    def _host_memory(self, num_pages: int) -> torch.Tensor:
        # Zeros: attention gives free places no weight, which makes nothing of a number and not of NaN.
        return torch.zeros(self.bytes_of(num_pages), dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @property
    def host_bytes(self) -> int:
        return self.host.shape[0]

    @property
    def resting_bytes(self) -> int:
        """What is held in host memory."""
        return 0 if self.offloaded is not None else self.host_bytes

    @property
    def _row_bytes(self) -> int:
        return self._rows_like[0].nbytes + (0 if self._scales_like is None else self._scales_like[0].nbytes)

    @property
    def page_bytes(self) -> int:
        return 8 + (0 if self.entry_positions is None else self.page_size * self.entry_positions.element_size())

    def growth_bytes(self, num_pages: int) -> int:
        return growth_bytes([(self, num_pages)])

    def tensors(self) -> list[torch.Tensor]:
        self.collect()
        beside = [x for x in (self.entry_positions, self.lifetimes) if x is not None]
        return [*self.buffers.tensors(), *beside, self.references, self.free, self.num_free]

    def _resize_rows(self, num_pages: int, num_copied: int) -> None:
        self.rest()
        host, end = self._host_memory(num_pages), num_copied * 2 * self.page_size
        for before, part in zip(self._parts(self.host, self.num_pages), self._parts(host, num_pages), strict=True):
            if before is not None and part is not None:
                as_bytes(part)[:end] = as_bytes(before)[:end]
        self.host = host
        self._views.clear()
        self.buffers.fit()

    # Writing.

    def encode(self, kv: torch.Tensor) -> StoredRows:
        return StoredRows(kv, None) if self._scales_like is None else stored_rows(kv, self._rows_like.dtype)

    def put(self, row: torch.Tensor, stored: StoredRows) -> None:
        super().put(row, stored)
        self.note_rows(row)

    def note_rows(self, row: torch.Tensor) -> None:
        """The rows [K] were written to, by a kernel."""
        self._written.append(row)

    def note_pages(self, page: torch.Tensor) -> None:
        """And any rows of the pages [K]."""
        entry = torch.arange(2 * self.page_size, device=page.device)
        self.note_rows(self.row_of(page.long()[:, None], entry).flatten())

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor, of: PagePool | None = None) -> None:
        of = of or self
        if self.buffer is not None or not isinstance(of, HostPagePool):
            super().copy_pages(source, target, of)
            self.note_pages(target)
            return
        of.rest()
        self.settle()
        theirs, ours = of._parts(of.host, of.num_pages), self._parts(self.host, self.num_pages)
        for before, part in zip(theirs, ours, strict=True):
            if before is not None and part is not None:
                shape = (-1, 2 * self.page_size)
                as_bytes(part)[:-1].unflatten(0, shape)[target.cpu()] = as_bytes(before)[:-1].unflatten(0, shape)[source.cpu()]
        if self.positions is not None and of.positions is not None:
            self.positions[target] = of.positions[source]

    # Offloaded as a whole.

    def offload_entries(self, folder: Path | None) -> None:
        """As of `PagePool`; pages that go to host memory are there."""
        self.collect()
        if self.offloaded is not None or self.num_offloaded < self.num_holders:
            return
        self.rest()
        if folder is not None and self.num_pages:
            self.offloaded = Offloaded({"host": self.host}, folder)
            self.host = placeholder(self.host)
        self.buffers.free_if_idle()

    @outside_inference_mode
    def reload(self) -> None:
        self.num_offloaded -= 1
        away, self.offloaded = self.offloaded, None
        if away is not None:
            # Who asked for the rows meanwhile, as for their shape, got no numbers.
            self.give_up()
            self.host = self._host_memory(self.num_pages).copy_(away.take()["host"])
        self.buffers.allocate()

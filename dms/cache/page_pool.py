"""The pages of one layer: a pool with reference counts, shared by every cache that was forked from the first; and the bound in
bytes for all of those caches together."""

import itertools
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from dms.cache.offloading import Offloaded, placeholder
from dms.config import nearest
from dms_kernels.arguments import FOR_GOOD
from dms_kernels.quantization import KV_DTYPES, quantize, scales_of_pages, stored_width

# Growth copies the pool. A little at a time keeps its size close to what is used; the copies cost about one read of the
# pool for every P / 32 kept tokens a head.
_GROWTH = 32
# Room that pools leave when they grow ahead of need: it is for what is needed.
_SPARE = 1 / 16

# For everything that makes or changes what a cache stores: tensors made in inference mode could not be written to after it.
outside_inference_mode = torch.inference_mode(False)


def reads_are_free(device: torch.device) -> bool:
    """Whether a number can be read from the device without waiting for it."""
    return device.type == "cpu"


class HostCopy:
    """Numbers of a tensor [n] on their way to the host, which goes on meanwhile."""

    def __init__(self, numbers: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._host = numbers.clone()
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def numbers(self) -> list[int]:
        """Waits for them if it must."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def used_places(page_table: torch.Tensor, num_kept: torch.Tensor, page_size: int) -> torch.Tensor:
    """Which places of a page table [B, H, max_pages] hold a page, bool."""
    return torch.arange(page_table.shape[2], device=page_table.device) * page_size < num_kept[..., None]


class CacheFull(RuntimeError):
    """`max_cache_bytes` does not allow what was asked for; the cache is as it was before."""


class CacheBudget:
    """A bound for the bytes that caches hold on their device: for those that are made with it, `DMSCache(model, budget=...)`, and all their forks.

    Args:
        max_bytes: None: no bound.
        spill: where the caches go that were used longest ago, in place of a refusal: "cpu", or a folder. They come back when they are used.
            None: what would exceed the bound is refused.

    Raises:
        ValueError: a spill without a bound.
    """

    def __init__(self, max_bytes: int | None, spill: str | Path | None = None):
        if spill is not None and max_bytes is None:
            raise ValueError(
                f"spill is {str(spill)!r} without max_bytes, and nothing would ever go there; give the bytes that caches may hold"
            )
        self.max_bytes, self.spill = max_bytes, spill
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._in_use: weakref.WeakSet[Any] = weakref.WeakSet()
        self._uses = itertools.count()

    def use(self, *caches: Any) -> None:
        """These are used now, and stay on their device. Without a spill nothing ever leaves, and a step takes no time for it."""
        if self.spill is None:
            return
        self._in_use = weakref.WeakSet(caches)
        for cache in caches:
            cache.last_use = next(self._uses)

    def allows(self, num_bytes: int, with_spare: bool = False) -> bool:
        """Whether num_bytes more may be held; with_spare: and some room would be left, for which nothing has to go elsewhere."""
        if self.max_bytes is None or held_bytes(*self.caches) + num_bytes <= self.max_bytes * (1 - _SPARE * with_spare):
            return True
        if self.spill is None or with_spare:
            return False
        # Of those that left, pages may be here that were a fork's as well, which is gone.
        idle = [cache for cache in self.caches if cache not in self._in_use]
        for cache in sorted(idle, key=lambda cache: cache.last_use):
            cache.offload_to(self.spill)
            if held_bytes(*self.caches) + num_bytes <= self.max_bytes:
                return True
        return False

    def check(self, num_bytes: int = 0) -> None:
        """Raises CacheFull where num_bytes more would be too many."""
        if not self.allows(num_bytes):
            raise CacheFull(
                f"the cache holds {held_bytes(*self.caches):,} bytes and needs {num_bytes:,} more, and max_cache_bytes is {self.max_bytes:,}; it is as it "
                "was before: end some sequences (batch_select_indices, or drop a fork), evict more (evict_bias), or raise the bound"
            )


def held_bytes(*caches: Cache) -> int:
    """Bytes of all tensors that the caches hold, each counted once, whichever of them share it."""
    return layer_bytes(layer for cache in caches for layer in cache.layers)


def layer_bytes(layers: Iterable[Any]) -> int:
    """Bytes of all tensors that cache layers of any kind hold, each counted once."""
    storages: dict[int, int] = {}

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                add(item)

    for layer in layers:
        add(layer.held_tensors() if hasattr(layer, "held_tensors") else vars(layer))
    storages.pop(0, None)
    return sum(storages.values())


class CachedLaunches(weakref.WeakKeyDictionary):
    """By store; of no use to a copy, which has other tensors."""

    def __deepcopy__(self, memo: Any) -> "CachedLaunches":
        return CachedLaunches()


def check_kv_dtype(kv_dtype: str | None, device: torch.device | None = None) -> None:
    """Raises ValueError unless pages may be of this kind, and may on this device."""
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise ValueError(
            f"kv_dtype is {kv_dtype!r}{nearest(str(kv_dtype), KV_DTYPES)}; pages hold the model's own dtype (None), or {', '.join(KV_DTYPES)}"
        )
    if kv_dtype == "fp8" and device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"kv_dtype is 'fp8', which GPUs of compute capability 8.9 and above convert, and {torch.cuda.get_device_name(device)} does not; choose "
            "int8, of the same size"
        )


class StoredRows(NamedTuple):
    """Keys or values as a pool holds them, which moves without rounding again."""

    numbers: torch.Tensor
    """[K, D], of int4 [K, D / 2]"""
    scales: torch.Tensor | None
    """[K], of int4 [K, 3, D / g]; None: not quantised"""


def stored_rows(kv: torch.Tensor, dtype: torch.dtype) -> StoredRows:
    """Keys and values [2 K, D], all keys first, as rows of a pool whose pages are of one of `KV_DTYPES`."""
    return StoredRows(*(x.flatten(0, 1) for x in quantize(kv.unflatten(0, (2, -1)), dtype, 0)))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """float8 in another name: PyTorch does not write single rows of it on a CPU."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


class PagePool:
    """Pages [N, 2, P, D] of keys and values of P entries each, with a reference count for each page.

    Full pages are never rewritten, so that forks, beams and samples can share them; a page returns to the pool when its last
    holder lets it go.

    Args:
        dtype: what entries are read as.
        budget: asked before the pool grows; None: no bound.
        kv_dtype: how entries are quantised, one of `dms_kernels.quantization.KV_DTYPES`; None: they are not.
        windows: where there are several, entries have positions, by which those of some lists are gone for later queries; else ().
    """

    @outside_inference_mode
    def __init__(
        self,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: CacheBudget | None = None,
        kv_dtype: str | None = None,
        windows: tuple[int, ...] = (),
    ):
        self.page_size, self.head_dim, self.dtype, self.budget = page_size, head_dim, dtype, budget
        self.reads_are_free = reads_are_free(device)
        check_kv_dtype(kv_dtype, device)
        self.kv_dtype = kv_dtype
        stored = dtype if kv_dtype is None else KV_DTYPES[kv_dtype]
        scales = scales_of_pages((1,), head_dim, stored)
        self.rows = torch.zeros(1, stored_width(head_dim, stored), dtype=stored, device=device)
        """[N * 2 * P + 1, D], of int4 [N * 2 * P + 1, D / 2]: P keys, then P values of each page. The last row is scratch: where entries go that
        are not kept, so that a step needs no branch."""
        self.row_scales = None if scales is None else torch.zeros(scales[0], dtype=scales[1], device=device)
        """The scales of each row, [N * 2 * P + 1] or of int4 [N * 2 * P + 1, 3, D / g], where the pool is quantised."""
        self.windows = windows
        self.entry_positions = torch.zeros(1, dtype=torch.int32, device=device) if windows else None
        """[N * P + 1] int32: each entry's position in its document; the last is scratch."""
        self.lifetimes = torch.tensor([FOR_GOOD, *windows[1:]], dtype=torch.int32, device=device) if windows else None
        """[K] int32: how far behind a query the entries of each list of a head are visible."""
        self.references = torch.zeros(1, dtype=torch.int32, device=device)
        """[N + 1] int32: how many page tables list each page."""
        self.free = torch.zeros(0, dtype=torch.int32, device=device)
        """[N] int32: a stack of free pages, of which the first num_free count."""
        self.num_free = torch.zeros((), dtype=torch.int64, device=device)
        self.headroom = 0
        """Pages known to be free without asking the device: where it is no CPU, taking pages reads nothing back as long as this
        lasts."""
        self.floor = 0
        """Pages that are reserved: free ones are not given back below these."""
        self.epoch = 0
        """How often free pages were counted, which voids what stores had reserved before."""
        self.num_holders = 0
        """Stores that use the pool."""
        self.orphans: deque[tuple[torch.Tensor, torch.Tensor, bool]] = deque()
        """Page tables and entry counts of stores that are gone, and whether they were offloaded, whose pages are collected at the next safe moment."""
        self.num_offloaded = 0
        """Stores that use the pool and whose caches are elsewhere."""
        self.offloaded: Offloaded | None = None
        """The entries, where all its stores are offloaded."""
        self.cached_launches: CachedLaunches = CachedLaunches()
        """Of each store: how it launches its kernels, with the pool's tensors. Here, so that nothing keeps those when they are replaced."""

    @property
    def num_pages(self) -> int:
        return self.free.shape[0]

    @property
    def device(self) -> torch.device:
        return self.references.device

    @property
    def pages(self) -> torch.Tensor:
        return self.rows[:-1].view(self.num_pages, 2, self.page_size, self.rows.shape[1])

    @property
    def scales(self) -> torch.Tensor | None:
        """[N, 2, P, ...] beside quantised pages."""
        return None if self.row_scales is None else self.row_scales[:-1].unflatten(0, (self.num_pages, 2, self.page_size))

    @property
    def positions(self) -> torch.Tensor | None:
        """[N, P] int32, where entries come with positions."""
        return None if self.entry_positions is None else self.entry_positions[:-1].view(self.num_pages, self.page_size)

    @property
    def entry_bytes(self) -> int:
        """Of one key and value in a page, and their position."""
        return 2 * self._row_bytes + (0 if self.entry_positions is None else self.entry_positions.element_size())

    @property
    def _row_bytes(self) -> int:
        """Of a key or a value, and its scales."""
        return self.rows[0].nbytes + (0 if self.row_scales is None else self.row_scales[0].nbytes)

    @property
    def scratch(self) -> int:
        """The row for entries that are not kept."""
        return self.rows.shape[0] - 1

    @property
    def num_used(self) -> int:
        self.collect()
        return self.num_pages - int(self.num_free)

    @property
    def page_bytes(self) -> int:
        """On the device, of one page, with its count and its place on the free list."""
        return self.page_size * self.entry_bytes + 8

    def tensors(self) -> list[torch.Tensor]:
        self.collect()
        beside = [x for x in (self.row_scales, self.entry_positions, self.lifetimes) if x is not None]
        return [self.rows, *beside, self.references, self.free, self.num_free]

    def missing(self, num_pages: int) -> int:
        """How many of num_pages are not free; asks the device where it must."""
        self.collect()
        if self.headroom < num_pages:
            self.headroom, self.epoch = int(self.num_free), self.epoch + 1
        return max(0, num_pages - self.headroom)

    def reserve(self, num_pages: int, num_free: int = 0) -> None:
        """Make sure that `take` can give num_pages; grows the pool where it must. num_free: so many pages are known to be free."""
        self.headroom = max(self.headroom, num_free)
        missing = self.missing(num_pages)
        if missing:
            self.resize(self.num_pages + self._allowed_growth(missing))
        self.headroom -= num_pages

    def take(self, wanted: torch.Tensor) -> torch.Tensor:
        """Page numbers [K] int64 for wanted [K] bool, with one reference each, and num_pages (no page) elsewhere.

        `reserve` at least as many before.
        """
        rank = wanted.cumsum(0)
        page = self.free[(self.num_free - rank).clamp(0, self.num_pages - 1)].long() if self.num_pages else rank
        page = torch.where(wanted, page, self.num_pages)
        self.references.index_fill_(0, page, 1)
        self.num_free -= rank[-1]
        return page

    def share(self, page: torch.Tensor) -> None:
        """One more reference for each of the pages [K]; a page may occur several times."""
        self.references.index_add_(0, page.long(), torch.ones_like(page, dtype=torch.int32))

    def release(self, page: torch.Tensor) -> None:
        """One reference less for each of the pages [K]; those that nobody holds become free."""
        self.references.index_add_(0, page.long(), -torch.ones_like(page, dtype=torch.int32))
        self._list_free()

    def release_without_reading(self, page: torch.Tensor) -> None:
        """As `release`, of pages [K] of which num_pages stands for none. How many became free is not known here then."""
        self.references.index_add_(0, page.long(), -torch.ones_like(page, dtype=torch.int32))
        self.references[-1] = 0
        is_free = self.references[:-1] == 0
        number = torch.arange(self.num_pages, dtype=torch.int32, device=self.device)
        # The lowest last, as `_list_free` has them.
        # In place: a captured step takes its pages from there.
        self.free.copy_(torch.where(is_free, number, -1).sort(descending=True).values.clamp_(min=0))
        self.num_free.copy_(is_free.sum())

    @outside_inference_mode
    def collect(self) -> None:
        """Take back the pages of stores that are gone."""
        while self.orphans:
            page_table, num_kept, was_offloaded = self.orphans.popleft()
            self.num_holders -= 1
            self.num_offloaded -= was_offloaded
            self.release(page_table[used_places(page_table, num_kept, self.page_size)])
            if not self.orphans:
                self.trim()

    def row_of(self, page: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """Row of an entry's key in `rows`; its value is page_size rows later."""
        return page * (2 * self.page_size) + entry

    def write(self, row: torch.Tensor, kv: torch.Tensor) -> None:
        """Write keys and values [2 K, D], all keys first, to their rows [2 K]; only the scratch row may occur twice."""
        self.put(row, self.encode(kv))

    def encode(self, kv: torch.Tensor) -> StoredRows:
        """Keys and values [2 K, D], all keys first, as the pool holds them."""
        return StoredRows(kv, None) if self.row_scales is None else stored_rows(kv, self.rows.dtype)

    def stored(self, row: torch.Tensor) -> StoredRows:
        """What the rows [K] hold."""
        return StoredRows(self.rows[row], None if self.row_scales is None else self.row_scales[row])

    def put(self, row: torch.Tensor, stored: StoredRows) -> None:
        """Write what `encode` or `stored` gave to the rows [K]; only the scratch row may occur twice."""
        as_bytes(self.rows).index_copy_(0, row, as_bytes(stored.numbers))
        if self.row_scales is not None:
            assert stored.scales is not None, "it is of a pool of this kind"
            self.row_scales.index_copy_(0, row, stored.scales)

    def write_positions(self, page: torch.Tensor, entry: torch.Tensor, position: torch.Tensor | int) -> None:
        """Write the positions [K] of entries [K] of pages [K], or one that all have; num_pages, with entry 0, is the scratch place."""
        assert self.entry_positions is not None, "the pool has positions"
        at = (page * self.page_size + entry).long()
        if isinstance(position, int):
            self.entry_positions.index_fill_(0, at, position)
        else:
            self.entry_positions.index_copy_(0, at, position.int())

    @outside_inference_mode
    def trim(self, all_of_it: bool = False, part: int = 4) -> None:
        """Give back the free pages at the pool's end, where they are more than a part-th of it."""
        if self.offloaded is not None:
            return
        used = (self.references[:-1] > 0).nonzero()[:, 0]
        size = max(self.floor, int(used[-1]) + 1 if len(used) else 0)
        if self.num_pages - size > (0 if all_of_it else max(self.num_pages // part, self.growth())) or size == 0:
            self.resize(size)

    def offload(self, folder: Path | None) -> None:
        """One more store that uses the pool is offloaded."""
        self.num_offloaded += 1
        self.offload_entries(folder)

    def offload_entries(self, folder: Path | None) -> None:
        """Where all stores that use the pool are offloaded, the entries are too, shared ones once."""
        self.collect()
        if self.offloaded is None and self.num_offloaded == self.num_holders and self.num_pages:
            self.cached_launches.clear()
            moved = {"rows": self.rows} | ({} if self.row_scales is None else {"row_scales": self.row_scales})
            self.offloaded = Offloaded(moved, folder)
            for name, tensor in moved.items():
                setattr(self, name, placeholder(tensor))

    @outside_inference_mode
    def reload(self) -> None:
        """One of the offloaded stores is on the device again."""
        self.num_offloaded -= 1
        away, self.offloaded = self.offloaded, None
        for name, tensor in ({} if away is None else away.take()).items():
            setattr(self, name, tensor)

    def keep_at_least(self, num_pages: int) -> None:
        """Have num_pages pages from now on, used ones included.

        Raises:
            CacheFull: the budget does not allow them.
        """
        missing = num_pages - self.num_pages
        if missing > 0:
            if self.budget is not None:
                self.budget.check(missing * self.page_bytes)
            self.resize(num_pages)
        self.floor = max(self.floor, num_pages)

    def _allowed_growth(self, missing: int) -> int:
        """Some more than is missing, where the budget allows it."""
        ahead = max(missing, self.growth())
        if self.budget is None or self.budget.allows(self.growth_bytes(ahead), with_spare=True):
            return ahead
        self.budget.check(self.growth_bytes(missing))
        return missing

    def growth_bytes(self, num_pages: int) -> int:
        """What num_pages pages more take of the device."""
        return num_pages * self.page_bytes

    def growth(self) -> int:
        """How many pages to grow by at least."""
        # A device is asked for its free pages once in a while, so that it has more of them.
        return self.num_pages // _GROWTH if self.reads_are_free else max(256, self.num_pages // 8)

    @outside_inference_mode
    def resize(self, num_pages: int) -> None:
        """Give the pool num_pages pages; those beyond must be free."""
        num_copied = min(num_pages, self.num_pages)
        self._resize_rows(num_pages, num_copied)
        if self.entry_positions is not None:
            positions = self.entry_positions.new_zeros(num_pages * self.page_size + 1)
            positions[: num_copied * self.page_size] = self.entry_positions[: num_copied * self.page_size]
            self.entry_positions = positions
        references = self.references.new_zeros(num_pages + 1)
        references[:num_copied] = self.references[:num_copied]
        self.references = references
        self._list_free()

    def _resize_rows(self, num_pages: int, num_copied: int) -> None:
        """Have rows for num_pages pages, of which the first num_copied hold what they held."""
        self.cached_launches.clear()
        rows = self.rows.new_zeros(num_pages * 2 * self.page_size + 1, self.rows.shape[1])
        rows[: num_copied * 2 * self.page_size] = self.rows[: num_copied * 2 * self.page_size]
        if self.row_scales is not None:
            scales = self.row_scales.new_zeros(len(rows), *self.row_scales.shape[1:])
            scales[: num_copied * 2 * self.page_size] = self.row_scales[: num_copied * 2 * self.page_size]
            self.row_scales = scales
        self.rows = rows

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor, of: "PagePool | None" = None) -> None:
        """Copy whole pages [K], of another pool of the same kind (None: of this one), onto others of this one."""
        of = of or self
        for theirs, ours in ((of.pages, self.pages), (of.scales, self.scales), (of.positions, self.positions)):
            if ours is not None and theirs is not None:
                as_bytes(ours)[target] = as_bytes(theirs)[source]

    def kind(self) -> dict[str, Any]:
        """What two pools must share so that pages can be copied from one to the other."""
        of_pages = {"page_size": self.page_size, "kv_dtype": self.kv_dtype, "windows": self.windows}
        return of_pages | {"head_dim": self.head_dim, "dtype": self.dtype, "device": self.device}

    @outside_inference_mode
    def _list_free(self) -> None:
        # The lowest are taken first: pages stay together, and the end of the pool can be given back.
        self.references[-1] = 0
        free = (self.references[:-1] == 0).nonzero()[:, 0].flip(0)
        if self.num_pages != self.references.shape[0] - 1:
            # Otherwise in place: kernels are launched with it.
            self.free = torch.zeros(self.references.shape[0] - 1, dtype=torch.int32, device=self.device)
        self.free[: len(free)] = free.int()
        self.num_free.fill_(len(free))
        self.headroom, self.epoch = len(free), self.epoch + 1

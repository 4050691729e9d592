"""The pages of one layer: a pool with reference counts, shared by every cache that was forked from the first."""

import torch

# Growth copies the pool. A little at a time keeps what is held close to what is used; the copies cost about one read of the
# pool for every P / 32 kept tokens a head.
_GROWTH = 32

# For all that makes or changes what is stored: tensors made in inference mode could not be written to after it.
lasting = torch.inference_mode(False)


class CacheFull(RuntimeError):
    """`max_cache_bytes` does not allow what was asked for; the cache is as it was before."""


class PagePool:
    """pages [N, 2, P, D]: keys and values of P entries each. Full pages are never rewritten, so that forks, beams and samples
    can share them; a page returns to the pool when its last holder lets it go.

    num_holders counts the stores that use the pool. num_free lives on the device. `headroom` is a number of pages known to be free without asking it: where the device is no
    CPU, taking pages reads nothing back as long as it lasts. limit: called with the bytes that are wanted before growing, raises CacheFull.
    """

    @lasting
    def __init__(self, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device, limit=None):
        self.page_size, self.head_dim, self.limit = page_size, head_dim, limit
        # The last row is scratch: where entries go that are not kept, so that a step needs no branch.
        self.rows = torch.zeros(1, head_dim, dtype=dtype, device=device)
        self.references = torch.zeros(1, dtype=torch.int32, device=device)
        self.free = torch.zeros(0, dtype=torch.int32, device=device)
        self.num_free = torch.zeros((), dtype=torch.int64, device=device)
        self.headroom = 0
        self.num_holders = 0

    @property
    def num_pages(self) -> int:
        return self.free.shape[0]

    @property
    def pages(self) -> torch.Tensor:
        return self.rows[:-1].view(self.num_pages, 2, self.page_size, self.head_dim)

    @property
    def scratch(self) -> int:
        """The row for entries that are not kept."""
        return self.rows.shape[0] - 1

    @property
    def num_used(self) -> int:
        return self.num_pages - int(self.num_free)

    @property
    def page_bytes(self) -> int:
        """Of one page, with its count and its place on the free list."""
        return 2 * self.page_size * self.head_dim * self.rows.element_size() + 8

    def tensors(self) -> list[torch.Tensor]:
        return [self.rows, self.references, self.free, self.num_free]

    def reserve(self, num_pages: int) -> None:
        """Make sure that `take` can give so many; grows the pool where it must."""
        if self.headroom < num_pages:
            self.headroom = int(self.num_free)
            missing = num_pages - self.headroom
            if missing > 0:
                self._resize(self.num_pages + self._allowed_growth(missing))
        self.headroom -= num_pages

    def check(self, num_pages: int) -> None:
        """Ask the limit whether so many pages could be had, before anything changes."""
        missing = num_pages - int(self.num_free) if self.limit is not None else 0
        if missing > 0:
            self.limit(missing * self.page_bytes)

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
        """One more reference for each of the pages [K]; a page may stand there several times."""
        self.references.index_add_(0, page.long(), torch.ones_like(page, dtype=torch.int32))

    def release(self, page: torch.Tensor) -> None:
        """One reference less for each of the pages [K]; those that nobody holds become free."""
        self.references.index_add_(0, page.long(), -torch.ones_like(page, dtype=torch.int32))
        self._list_free()

    def row_of(self, page: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """Row of an entry's key in `rows`; its value lies page_size farther."""
        return page * (2 * self.page_size) + entry

    @lasting
    def trim(self) -> None:
        """Give back what lies free at the pool's end, where it is much."""
        used = (self.references[:-1] > 0).nonzero()[:, 0]
        size = int(used[-1]) + 1 if len(used) else 0
        if self.num_pages - size > max(self.num_pages // 4, self._growth()) or size == 0:
            self._resize(size)

    def _allowed_growth(self, missing: int) -> int:
        """Some more than is missing, where the limit allows it."""
        if self.limit is None:
            return max(missing, self._growth())
        try:
            self.limit(max(missing, self._growth()) * self.page_bytes)
        except CacheFull:
            self.limit(missing * self.page_bytes)
            return missing
        return max(missing, self._growth())

    def _growth(self) -> int:
        # A device is asked for its free pages once in a while, so that it has more of them.
        return self.num_pages // _GROWTH if self.rows.device.type == "cpu" else max(256, self.num_pages // 8)

    def _resize(self, num_pages: int) -> None:
        kept = min(num_pages, self.num_pages)
        rows = torch.zeros(num_pages * 2 * self.page_size + 1, self.head_dim, dtype=self.rows.dtype, device=self.rows.device)
        rows[: kept * 2 * self.page_size] = self.rows[: kept * 2 * self.page_size]
        references = self.references.new_zeros(num_pages + 1)
        references[:kept] = self.references[:kept]
        self.rows, self.references = rows, references
        self._list_free()

    def _list_free(self) -> None:
        # The lowest are taken first: pages stay together, and the end of the pool can be given back.
        self.references[-1] = 0
        free = (self.references[:-1] == 0).nonzero()[:, 0].flip(0)
        self.free = torch.zeros(self.references.shape[0] - 1, dtype=torch.int32, device=self.rows.device)
        self.free[: len(free)] = free.int()
        self.num_free.fill_(len(free))
        self.headroom = len(free)

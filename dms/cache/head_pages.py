"""The entries that a layer's heads keep beyond the ring: for each head of each sequence, a list of pages.

With several windows a head has a list for each class of entries: of those that stay for good, and of those that are gone as soon as they
lie farther than a window behind the newest token. What is said of heads here is then said of lists, list c of head h being number
h * (number of windows) + c.

Shapes: B batch, H KV heads, L lists, N entries, K entries or pages of any heads, W places of a table, P page size, D head dim.
"""

import sys
from typing import TypeVar

import torch
import torch.nn.functional as F

from dms.cache.page_pool import HostCopy, PagePool, StoredRows, outside_inference_mode, used_places
from dms_kernels.arguments import FOR_GOOD, PagedKV, ReadOrder
from dms_kernels.cached_attention import make_read_order

# Page tables grow by this many places at a time.
_TABLE_STEP = 8

AnyPages = TypeVar("AnyPages", bound="HeadPages")


class HeadPages:
    """Page tables of a layer over its pool."""

    # Tensors that are copied, selected and restored together; subclasses name theirs as well.
    _own: tuple[str, ...] = ("page_table", "num_kept")
    # Those that are 0 of a row without tokens.
    _counts: tuple[str, ...] = ("num_kept",)

    @outside_inference_mode
    def __init__(self, pool: PagePool, batch: int, num_heads: int):
        self.pool = pool
        self.device = pool.device
        self.reads_are_free = pool.reads_are_free
        self.lists_per_head = max(1, len(pool.windows))
        num_lists = num_heads * self.lists_per_head
        self.page_table = torch.zeros(batch, num_lists, 0, dtype=torch.int32, device=self.device)
        """[B, H, max_pages] int32, with several windows [B, L, max_pages]: numbers of pages in the pool, oldest first."""
        self.num_kept = torch.zeros(batch, num_lists, dtype=torch.int32, device=self.device)
        """[B, H] int32, with several windows [B, L]: entries in each head's, or list's, pages."""
        self.most_kept = 0
        """A bound known without asking the device: no head has more entries in pages."""
        self.reserved = (0, pool.epoch)
        """On other devices than a CPU: for how many more steps pages were reserved, and the pool's epoch then."""
        self._host_copy: HostCopy | None = None
        """How many pages are free, on its way."""
        self.is_offloaded = False
        """Its entries are elsewhere, those that no other store shares."""
        pool.num_holders += 1
        # Last: `__del__` takes it for a sign that the pool counts this store.
        self.read_order: ReadOrder | None = None
        """The order in which attention reads the pages; None: the table has changed since it was made."""

    def __del__(self):
        # This may run in the middle of anything, in any thread: the pool takes the pages back when it is asked next.
        if not sys.is_finalizing() and getattr(self, "read_order", self) is not self:
            self.pool.orphans.append((self.page_table, self.num_kept, self.is_offloaded))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What this store holds alone; pages belong to the pool."""
        return {name: getattr(self, name) for name in self._own}

    def own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def pages(self, newest_only: bool = False, newest: int | None = None) -> PagedKV | None:
        """What attention reads; None where no head has an entry in pages. newest_only, newest: as of `PagedKV`."""
        pool = self.pool
        if self.most_kept == 0:
            return None
        if self.read_order is None and self.reads_are_free:
            self.read_order = outside_inference_mode(make_read_order)(self.page_table, self.num_kept, pool.page_size, pool.windows)
        how = (self.read_order, pool.positions, pool.windows, newest_only, newest)
        return PagedKV(pool.pages, self.page_table, self.num_kept, pool.scales, *how)

    def page_numbers(self) -> torch.Tensor:
        """Of all pages that the tables list; a page that several heads list comes once for each."""
        return self.page_table[self._used_places()]

    def _used_places(self) -> torch.Tensor:
        """[B, H, max_pages] bool."""
        return used_places(self.page_table, self.num_kept, self.pool.page_size)

    # One entry a head, as a step of decoding appends.

    def append_to_some(
        self,
        keep_BH: torch.Tensor,
        kv_BH2D: torch.Tensor,
        list_BH: torch.Tensor | None = None,
        position: torch.Tensor | int | None = None,
    ) -> None:
        """Append an entry to each head that keeps it, and look at no other head. Reads from the device.

        list, position: with several windows, to which of the head's lists, and the entries' position: [B], or one for all rows.
        """
        head = keep_BH.flatten().nonzero()[:, 0]
        if len(head) == 0:
            return
        kv_K2D = kv_BH2D.flatten(0, 1).index_select(0, head)
        number = head if list_BH is None else list_BH.flatten().index_select(0, head) + head * self.lists_per_head
        P, counts = self.pool.page_size, self.num_kept.view(-1)
        num_kept = counts.index_select(0, number)
        place, entry = num_kept // P, num_kept % P
        num_new = entry.tolist().count(0)
        if num_new:
            begins_page = entry == 0
            self.pool.reserve(num_new)
            self._widen(int(num_kept.max()) + 1)
            page = self.pool.take(torch.ones(num_new, dtype=torch.bool, device=self.device))
            self.page_table.view(len(counts), -1)[number[begins_page], place[begins_page]] = page.int()
            self.read_order = None
        page = self.page_table.view(-1).index_select(0, number * self.page_table.shape[2] + place).long()
        row = self.pool.row_of(page, entry)
        self.pool.write(torch.cat([row, row + P]), kv_K2D.transpose(0, 1).flatten(0, 1))
        if isinstance(position, torch.Tensor):
            position = position.index_select(0, head // keep_BH.shape[1])
        if position is not None:
            self.pool.write_positions(page, entry, position)
        counts.index_copy_(0, number, num_kept + 1)
        self.most_kept += 1

    def append_without_reading(
        self, keep_BH: torch.Tensor, kv_BH2D: torch.Tensor, list_BH: torch.Tensor | None = None, position_B: torch.Tensor | None = None
    ) -> None:
        """As `append_to_some`, without asking the device which heads keep their entry: the others write to the scratch row."""
        P, num_lists = self.pool.page_size, self.lists_per_head
        if list_BH is not None:
            # Every list is asked, and the one of the entry's class takes it.
            keep_BH = (keep_BH[..., None] & (torch.arange(num_lists, device=self.device) == list_BH[..., None])).flatten(1)
            kv_BH2D = kv_BH2D.repeat_interleave(num_lists, 1)
        self._make_room_for_one()
        place, entry = (self.num_kept // P).long()[..., None], self.num_kept % P
        begins_page = keep_BH & (entry == 0)
        page = self.pool.take(begins_page.flatten()).view_as(begins_page).int()
        place = place.clamp(max=self.page_table.shape[2] - 1)
        page = torch.where(begins_page, page, self.page_table.gather(2, place)[..., 0])
        self.page_table.scatter_(2, place, page[..., None])
        row = self.pool.row_of(page.long(), entry)
        row = torch.where(keep_BH, torch.stack([row, row + P]), self.pool.scratch)
        self.pool.write(row.flatten(), kv_BH2D.movedim(2, 0).flatten(0, 2))
        if position_B is not None:
            to = torch.where(keep_BH, page, self.pool.num_pages)
            self.pool.write_positions(to.flatten(), (entry * keep_BH).flatten(), position_B[:, None].expand_as(to).flatten())
        self.num_kept += keep_BH

    def _make_room_for_one(self) -> None:
        """Make sure that every head can append an entry; the device is asked once in a while."""
        self._reserve_ahead(self.num_kept.numel())
        if self.most_kept + 1 > self.page_table.shape[2] * self.pool.page_size:
            self.most_kept = int(self.num_kept.max())
            # A list that goes from the front stays as long as it is, and the device would be asked at every step.
            self._widen(self.most_kept + (1 if self.lists_per_head == 1 else self.pool.page_size))
        self.most_kept += 1

    def _reserve_ahead(self, num_heads: int) -> None:
        """In P steps a head begins one page at most: reserve one for each, and look again after P steps. How many are free by then is asked
        half-way, so that the answer is there."""
        (steps, epoch), pool, copied = self.reserved, self.pool, self._host_copy
        if steps > 0 and epoch == pool.epoch:
            if steps == pool.page_size // 2 and pool.num_holders == 1:
                self._host_copy = HostCopy(self._asked_numbers())
        else:
            # Since it was asked each head has begun one page at most, unless something else has come between.
            num_free = 0
            if copied is not None and epoch == pool.epoch and pool.num_holders == 1:
                num_free = self._free_of(copied.numbers()) - num_heads
            pool.reserve(num_heads, num_free)
            steps, self._host_copy = pool.page_size, None
        self.reserved = (steps - 1, pool.epoch)

    def _asked_numbers(self) -> torch.Tensor:
        """What the host is told now and then."""
        return self.pool.num_free[None]

    def _free_of(self, numbers: list[int]) -> int:
        """How many pages are free, of what the host was told."""
        return numbers[0]

    # Many entries.

    @outside_inference_mode
    def append(self, b: torch.Tensor, h: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor | None = None) -> None:
        """Append entries [K, D] to pages; they come in order of row b [K], then head h [K], then age. position [K]: with several windows."""
        self.append_stored(b, h, self.pool.encode(torch.cat([k, v])), position)

    @outside_inference_mode
    def append_stored(self, b: torch.Tensor, h: torch.Tensor, stored: StoredRows, position: torch.Tensor | None = None) -> None:
        """As `append`, of rows [2 K] as the pool holds them: all keys, then all values."""
        B, H = self.num_kept.shape
        P, head = self.pool.page_size, b * H + h
        count = torch.bincount(head, minlength=B * H)
        # Each entry's number among those of its head.
        nth = torch.arange(len(head), device=self.device) - (count.cumsum(0) - count)[head]
        place = self.num_kept.flatten()[head] + nth
        self._add_pages(self.num_kept + count.view(B, H).int())
        page, entry = self.page_table[b, h, place // P].long(), place % P
        row = self.pool.row_of(page, entry)
        self.pool.put(torch.cat([row, row + P]), stored)
        if position is not None:
            self.pool.write_positions(page, entry, position)

    @outside_inference_mode
    def drop(self, dropped: torch.Tensor) -> None:
        """Remove entries from pages: dropped [B, H, N] bool, of each head's first N entries in pages, in order of age; the others
        keep their order. Pages before a head's first dropped entry stay where they are, and shared."""
        P = self.pool.page_size
        entry = torch.arange(dropped.shape[2], device=self.device)
        dropped = dropped & (entry < self.num_kept[..., None])
        loses = dropped.any(2)
        # From here on each head's pages are rewritten.
        start = torch.where(loses, dropped.int().argmax(2) // P * P, self.num_kept).int()
        place = torch.arange(self.page_table.shape[2] * P, device=self.device)
        moves = (place >= start[..., None]) & (place < self.num_kept[..., None])
        moves[..., : dropped.shape[2]] &= ~dropped[..., : moves.shape[2]]
        b, h, n = moves.nonzero(as_tuple=True)
        page, positions = self.page_table[b, h, n // P].long(), self.pool.positions
        row = self.pool.row_of(page, n % P)
        stored = self.pool.stored(torch.cat([row, row + P]))
        position = None if positions is None else positions[page, n % P]
        self.pool.release(self.page_table[self._used_places() & (place[::P] >= start[..., None])])
        self.num_kept, self.read_order, self.reserved = start, None, (0, 0)
        self.append_stored(b, h, stored, position)
        self.most_kept = int(self.num_kept.max()) if self.num_kept.numel() else 0
        self.pool.trim()

    # What is gone in time: lists of several windows.

    @outside_inference_mode
    def release_pages(self, newest_B: torch.Tensor) -> int:
        """Give back the pages at lists' fronts in which every entry is gone for the newest tokens, at positions newest [B].

        Returns for how many more positions no other page goes, of those that there are; on other devices than a CPU, of which nothing is
        read, 0.
        """
        pool, P, K = self.pool, self.pool.page_size, self.lists_per_head
        # Of the lists that do not stay, which are short: [B, H, K - 1] of them.
        table, num_kept = (x.unflatten(1, (-1, K))[:, :, 1:] for x in (self.page_table, self.num_kept))
        if self.reads_are_free:
            table = table[..., : -(-int(num_kept.max()) // P)]
        width = table.shape[3]
        if width == 0 or pool.num_pages == 0:
            return FOR_GOOD
        assert pool.positions is not None and pool.lifetimes is not None, "there are several windows"
        place = torch.arange(width, device=self.device)
        youngest = (num_kept[..., None] - place * P).clamp(max=P) - 1
        there, page = youngest >= 0, table.masked_fill(youngest < 0, 0).long()
        left = pool.positions[page, youngest.clamp(min=0)] + pool.lifetimes[1:, None] - newest_B[:, None, None, None]
        gone = there & (left < 0)
        num_gone = gone.sum(3)
        if not self.reads_are_free:
            pool.release_without_reading(torch.where(gone, page, pool.num_pages).flatten())
        elif int(num_gone.max()) > 0:
            pool.release(page[gone])
        else:
            return int(left.masked_fill_(~there, FOR_GOOD).min())
        table.copy_(table.gather(3, (place + num_gone[..., None]).clamp(max=width - 1)))
        num_kept.sub_(num_gone * P).clamp_(min=0)
        self.read_order = None
        if not self.reads_are_free:
            return 0
        self.most_kept = int(self.num_kept.max())
        return int(left.masked_fill_(~there | gone, FOR_GOOD).min())

    def seen_by(self, newest_B: torch.Tensor) -> torch.Tensor:
        """Which entries tokens at positions newest [B] see, [B, L, W * P] bool: those in pages, without what is gone."""
        pool, P = self.pool, self.pool.page_size
        entry = torch.arange(self.page_table.shape[2] * P, device=self.device)
        there = entry < self.num_kept[..., None]
        if pool.positions is None or pool.lifetimes is None or pool.num_pages == 0:
            return there
        page = self.page_table.masked_fill(~self._used_places(), 0).long().repeat_interleave(P, 2)
        lifetime_L = pool.lifetimes.repeat(self.num_kept.shape[1] // self.lists_per_head)
        return there & (pool.positions[page, entry % P] + lifetime_L[:, None] >= newest_B[:, None, None])

    def _add_pages(self, num_kept: torch.Tensor) -> None:
        """Give heads the pages for num_kept [B, H] entries."""
        P = self.pool.page_size
        have, want = -(-self.num_kept // P), -(-num_kept // P)
        num_new = int((want - have).sum())
        self.pool.reserve(num_new)
        most_kept = int(num_kept.max())
        self._widen(most_kept)
        if num_new:
            place = torch.arange(self.page_table.shape[2], device=self.device)
            page = self.pool.take(torch.ones(num_new, dtype=torch.bool, device=self.device))
            self.page_table[(place >= have[..., None]) & (place < want[..., None])] = page.int()
        self.num_kept, self.most_kept, self.read_order, self.reserved = num_kept, most_kept, None, (0, 0)

    def _widen(self, most_kept: int) -> None:
        """Make room in the table for a head with most_kept entries."""
        width, step = -(-most_kept // self.pool.page_size), self._table_step()
        if width > self.page_table.shape[2]:
            self.page_table = F.pad(self.page_table, (0, -(-width // step) * step - self.page_table.shape[2]))

    def _table_step(self) -> int:
        return _TABLE_STEP * (1 if self.reads_are_free else 8)

    # Going back to an earlier state.

    @outside_inference_mode
    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    @outside_inference_mode
    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Back to a snapshot since which tokens were only appended."""
        before = self.page_numbers()
        vars(self).update(snapshot)
        self.recount()
        self.pool.share(self.page_numbers())
        self.pool.release(before)
        # What the failed attempt took must not be in the way of a smaller one.
        self.pool.trim(all_of_it=True)

    # Whole rows.

    def num_last_pages(self) -> int:
        """Pages that are not full: those that a copy needs."""
        return int((self.num_kept % self.pool.page_size > 0).sum())

    def pages_to_select(self, rows: torch.Tensor) -> int:
        """How many more pages `select` takes than it gives back; below 0: it gives back more."""
        rows = rows.to(self.device)
        times = torch.bincount(rows, minlength=len(self.num_kept))
        copies = int(((self.num_kept % self.pool.page_size > 0).sum(1) * (times - 1).clamp(min=0)).sum())
        gone = self._used_places() & (times == 0)[:, None, None]
        left = self.pool.references.index_add(0, self.page_table[gone].long(), -torch.ones_like(self.page_table[gone]))
        return copies - int(((left == 0) & (self.pool.references > 0)).sum())

    @outside_inference_mode
    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows [B'] int64, in that order; a row may occur several times, and shares its pages then."""
        before = self.page_numbers()
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, rows))
        self.pool.share(self.page_numbers())
        self.pool.release(before)
        self._separate_last_pages()

    @outside_inference_mode
    def append_rows(self, other: "HeadPages", rows: torch.Tensor) -> None:
        """Put rows [K] int64 of another store behind this one's; a row may occur several times. Full pages are shared with the other store,
        whose pages are in this one's pool from then on.

        Raises:
            ValueError: pages of another kind, or another number of heads.
        """
        if other.num_kept.shape[1] != self.num_kept.shape[1]:
            raise ValueError(f"sequences of {other.num_kept.shape[1]} lists of entries cannot join sequences of {self.num_kept.shape[1]}")
        other._move_to(self.pool)
        width, num_before = max(self.page_table.shape[2], other.page_table.shape[2]), len(self.num_kept)
        for store in (self, other):
            store.page_table = F.pad(store.page_table, (0, width - store.page_table.shape[2]))
        for name, tensor in self.tensors().items():
            setattr(self, name, torch.cat([tensor, getattr(other, name).index_select(0, rows)]))
        self.pool.share(self.page_table[num_before:][self._used_places()[num_before:]])
        self._separate_last_pages()

    # Rows as slots: they stay where they are, and what is in them comes and goes.

    @outside_inference_mode
    def add_rows(self, num_rows: int) -> None:
        """That many empty rows more, behind the others."""
        for name, tensor in self.tensors().items():
            setattr(self, name, torch.cat([tensor, tensor.new_zeros(num_rows, *tensor.shape[1:])]))

    @outside_inference_mode
    def take_rows(self: AnyPages, rows: torch.Tensor) -> AnyPages:
        """Move what is in the rows [K] int64, each named once, to a store of its own; they are empty then. No page is copied."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        self.pool.num_holders += 1
        for name, tensor in self.tensors().items():
            setattr(new, name, tensor.index_select(0, rows))
        for name in self._counts:
            getattr(self, name).index_fill_(0, rows, 0)
        self.read_order = None
        new.recount()
        return new

    @outside_inference_mode
    def put_rows(self: AnyPages, rows: torch.Tensor, other: AnyPages) -> None:
        """Move all rows of another store over the same pool to the empty rows [K] int64. The other has none left."""
        width = max(self.page_table.shape[2], other.page_table.shape[2])
        for store in (self, other):
            store.page_table = F.pad(store.page_table, (0, width - store.page_table.shape[2]))
        self.most_kept = max(self.most_kept, other.most_kept)
        for name, tensor in self.tensors().items():
            theirs = getattr(other, name)
            tensor.index_copy_(0, rows, theirs)
            setattr(other, name, theirs[:0])
        self.read_order = None
        other.recount()

    def _move_to(self, pool: PagePool) -> None:
        """Hold the entries in pages of another pool. What forks hold in the old one stays theirs."""
        if pool is self.pool:
            return
        if pool.kind() != self.pool.kind():
            raise ValueError(
                f"pages of {self.pool.kind()} cannot be copied to pages of {pool.kind()}; make both caches with the same options"
            )
        before, used = self.page_numbers().long(), self._used_places()
        numbers = before.unique()
        table = self.page_table.clone()
        if len(numbers):
            pool.reserve(len(numbers))
            fresh = pool.take(torch.ones(len(numbers), dtype=torch.bool, device=self.device))
            pool.copy_pages(numbers, fresh, self.pool)
            table[used] = fresh[torch.searchsorted(numbers, before)].int()
            # As often as the table lists them, in place of once.
            pool.share(table[used])
            pool.release(fresh)
        self.pool.release(before)
        self.pool.num_holders -= 1
        pool.num_holders += 1
        self.pool, self.page_table = pool, table
        self.recount()

    @outside_inference_mode
    def copy(self: AnyPages) -> AnyPages:
        """A second store with the same entries: full pages are shared, own tensors and last pages copied."""
        new = object.__new__(type(self))
        vars(new).update(vars(self) | {name: tensor.clone() for name, tensor in self.tensors().items()})
        self.pool.num_holders += 1
        self.pool.share(new.page_numbers())
        new._separate_last_pages()
        return new

    def _separate_last_pages(self) -> None:
        """Give each head a last page of its own where it is not full and others hold it: only full pages can be shared."""
        P = self.pool.page_size
        part = (self.num_kept % P > 0).nonzero()
        b, h = part[:, 0], part[:, 1]
        place = (self.num_kept[b, h] // P).long()
        page = self.page_table[b, h, place].long()
        # Of several holders here the first keeps the page if nobody else has it.
        order = page.argsort(stable=True)
        first = torch.ones_like(page, dtype=torch.bool)
        first[order[1:]] = page[order[1:]] != page[order[:-1]]
        holders = torch.bincount(page, minlength=self.pool.num_pages + 1)
        copies = ~(first & (holders[page] == self.pool.references[page]))
        num_copies = int(copies.sum())
        if num_copies:
            self.pool.reserve(num_copies)
            fresh = self.pool.take(torch.ones(num_copies, dtype=torch.bool, device=self.device))
            self.pool.copy_pages(page[copies], fresh)
            self.page_table[b[copies], h[copies], place[copies]] = fresh.int()
            self.pool.release(page[copies])
        self.recount()

    def recount(self) -> None:
        """After rows have changed: what is known from here on without asking the device."""
        self.most_kept = int(self.num_kept.max()) if self.num_kept.numel() else 0
        self.read_order, self.reserved = None, (0, 0)

"""What one layer of the compacted cache holds: a private ring of the last w + 1 tokens, and pages of what was kept before them.

A token enters the ring; when it leaves, it is appended to its head's pages if it was kept, and is gone if not. That equals the
masked reference at every step: what is in the ring is within every later query's window, what is in the pages was kept.

Shapes: B batch, H KV heads, N new tokens, R ring slots (w + 1), D head dim, P page size.
"""

import sys

import torch
import torch.nn.functional as F

from dms import masks
from dms.cache.page_pool import PagePool, lasting, listed, reads_are_free
from dms.cache.pending_tokens import Decisions, Incoming
from dms.config import DMSConfig
from dms_kernels.cached_attention import Keys, Pages, Plan, make_plan

KEEP, EVICT, UNDECIDED = 0, 1, 2
# The ring starts small and grows to its w + 1 slots; it, and page tables, grow by so many.
_RING_STEP = 64
_TABLE_STEP = 8


def _ring_slots(num_tokens: int, ring_size: int) -> int:
    """Slots of a ring that has seen so many tokens."""
    return min(ring_size, -(-num_tokens // _RING_STEP) * _RING_STEP)


class Store:
    """ring_kv [B, H, 2, R, D], ring_state [B, H, R] uint8 (KEEP, EVICT, UNDECIDED), a token at slot position % R;
    page_table [B, H, max_pages] int32 into the pool, num_kept [B, H] and seq_len [B] int32: tokens of each row's document.

    evicted [B, H] and decided [B] int64 count what the gates said.
    """

    @lasting
    def __init__(self, config: DMSConfig, pool: PagePool, batch: int, num_heads: int):
        device, dtype, D = pool.rows.device, pool.dtype, pool.head_dim
        self.dms, self.pool, self.device = config, pool, device
        self.reads_are_free = reads_are_free(device)
        self.ring_size = config.window + 1
        self.ring_kv = torch.zeros(batch, num_heads, 2, min(self.ring_size, _RING_STEP), D, dtype=dtype, device=device)
        self.ring_state = torch.zeros(batch, num_heads, self.ring_kv.shape[3], dtype=torch.uint8, device=device)
        self.page_table = torch.zeros(batch, num_heads, 0, dtype=torch.int32, device=device)
        self.num_kept = torch.zeros(batch, num_heads, dtype=torch.int32, device=device)
        self.seq_len = torch.zeros(batch, dtype=torch.int32, device=device)
        self.evicted = torch.zeros(batch, num_heads, dtype=torch.int64, device=device)
        self.decided = torch.zeros(batch, dtype=torch.int64, device=device)
        # Bounds that are known without asking the device: no row has more tokens, no head has kept more.
        self.longest, self.most_kept = 0, 0
        # Whether all rows have just so many; known on a CPU alone.
        self.even = self.reads_are_free
        # On other devices than a CPU: for how many more steps pages were reserved, and the pool's epoch then.
        self.reserved = (0, pool.epoch)
        pool.num_holders += 1
        self.plan: Plan | None = None

    def __del__(self):
        # This may run in the middle of anything, in any thread: the pool takes the pages back when it is asked next.
        if not sys.is_finalizing() and getattr(self, "plan", self) is not self:
            self.pool.orphans.append((self.page_table, self.num_kept))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What this cache holds alone; pages belong to the pool."""
        names = ("ring_kv", "ring_state", "page_table", "num_kept", "seq_len", "evicted", "decided")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raises RuntimeError where what is held is known to be wrong."""

    # Reading.

    def in_step(self, new: Incoming) -> bool:
        """Whether every row has as many tokens, a full ring, and a new token: then all write to the same slot."""
        return self.reads_are_free and self.even and self.longest >= self.ring_size and new.tokens.unpadded

    def positions(self, new: Incoming) -> torch.Tensor:
        """[B, N] int32 within the document, -1 for padding."""
        real = new.tokens.segment_BT > 0
        if real.shape[1] == 1:
            return torch.where(real, self.seq_len[:, None], -1)
        return torch.where(real, self.seq_len[:, None] + real.cumsum(1, dtype=torch.int32) - 1, -1)

    def decisions(self, new: Incoming) -> Decisions:
        segment, sinks = new.tokens.segment_BT, self.dms.sinks
        real = segment > 0
        if real.shape[1] == 1 and self.dms.alignment == "own":
            # As below, for one token whose gate has the last word.
            evicted = new.decision[:, 0] & real
            state = evicted & (self.seq_len >= sinks)[:, None] if sinks else evicted
            return Decisions(state[..., None].to(torch.uint8), evicted, real[:, 0])
        sink = (self.positions(new) < sinks)[:, None]
        ruled = masks.align(new.decision, segment, self.dms.alignment, False).transpose(1, 2)
        known = masks.decided_tokens(segment, self.dms.alignment)
        state = torch.where(known[:, None], (ruled & ~sink).to(torch.uint8), UNDECIDED)
        evicted, decided = (ruled & known[:, None]).sum(2), known.sum(1)
        if self.dms.alignment == "own":
            return Decisions(state, evicted, decided)
        # The first new token's gate rules the ring's last token.
        at = real.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, new.decision.shape[2])
        first = new.decision.gather(1, at)[:, 0]
        rules = real.any(1) & (self.seq_len > 0)
        last = torch.where(rules[:, None], (first & (self.seq_len > sinks)[:, None]).to(torch.uint8), UNDECIDED)
        return Decisions(state, evicted + (first & rules[:, None]), decided + rules, last)

    def ring(self, last: torch.Tensor | None = None, newest_only: bool = False) -> Keys:
        """last: the last token's state as new tokens rule it, where that is not stored yet. newest_only: the queries are those of
        the ring's newest tokens, for which the whole ring lies in the window."""
        k, v = self.ring_kv[:, :, 0], self.ring_kv[:, :, 1]
        if (
            newest_only
            and self.reads_are_free
            and self.longest >= self.ring_size
            and (self.even or bool((self.seq_len >= self.ring_size).all()))
        ):
            return Keys(k, v, all_visible=True)
        slot = torch.arange(self.ring_kv.shape[3], dtype=torch.int32, device=self.device)
        end = self.seq_len[:, None] - 1
        # Negative where there is nothing yet.
        position = (end - (end - slot) % self.ring_size).clamp(min=-1)
        state = self.ring_state
        if last is not None:
            here = (position == end) & (end >= 0)
            state = torch.where(here[:, None] & (last != UNDECIDED)[..., None], last[..., None], state)
        return Keys(k, v, position, state == EVICT)

    def pages(self) -> Pages | None:
        if self.most_kept == 0:
            return None
        if self.plan is None and self.reads_are_free:
            self.plan = lasting(make_plan)(self.page_table, self.num_kept, self.pool.page_size)
        return Pages(self.pool.pages, self.page_table, self.num_kept, self.plan, self.pool.scales)

    def entries_alive(self) -> torch.Tensor:
        """[B, H] int64: in the ring and in pages."""
        return (self.num_kept + self.seq_len.clamp(max=self.ring_size)[:, None]).long()

    # Storing.

    @lasting
    def push(self, new: Incoming) -> None:
        """Move new tokens into the ring, and what leaves it into the pages."""
        num_new = new.k.shape[2]
        if num_new == 1 and self.dms.alignment == "own" and self.in_step(new):
            self._push_in_step(new)
            return
        self.even = self.even and new.tokens.unpadded
        decisions = self.decisions(new)
        self._grow_ring(num_new)
        if decisions.last is not None:
            end = ((self.seq_len - 1).clamp(min=0) % self.ring_size).long()
            rows = torch.arange(len(end), device=self.device)
            before = self.ring_state[rows, :, end]
            self.ring_state[rows, :, end] = torch.where(decisions.last == UNDECIDED, before, decisions.last)
        self.evicted += decisions.evicted
        self.decided += decisions.decided
        real = new.tokens.segment_BT > 0
        if num_new == 1:
            self._push_one(new, decisions.state[:, :, 0], real[:, 0])
        else:
            self._push_many(new, decisions.state, real)
        self.longest += num_new

    def _grow_ring(self, num_new: int) -> None:
        have, size = self.ring_kv.shape[3], _ring_slots(self.longest + num_new, self.ring_size)
        if size > have:
            # Until the ring is full, a token's slot is its position.
            self.ring_kv = F.pad(self.ring_kv, (0, 0, 0, size - have))
            self.ring_state = F.pad(self.ring_state, (0, size - have))

    def _push_in_step(self, new: Incoming) -> None:
        """One token a row, as most steps of decoding are; what `decisions` and `_push_one` do for any."""
        evicted, slot = new.decision[:, 0], self.longest % self.ring_size
        self.evicted += evicted
        self.decided += 1
        self._store_few(self.ring_state[:, :, slot] != EVICT, self.ring_kv[:, :, :, slot])
        self.ring_kv[:, :, 0, slot] = new.k[:, :, 0]
        self.ring_kv[:, :, 1, slot] = new.v[:, :, 0]
        # EVICT is 1 and KEEP 0.
        self.ring_state[:, :, slot] = evicted if self.longest >= self.dms.sinks else KEEP
        self.seq_len += 1
        self.longest += 1

    def _push_one(self, new: Incoming, state_BH: torch.Tensor, real_B: torch.Tensor) -> None:
        """One token a row. Where the device is no CPU, nothing is read back from it."""
        store = self._store_few if self.reads_are_free else self._store_blindly
        rows = torch.arange(len(real_B), device=self.device)
        slot = (self.seq_len % self.ring_size).long()
        before_kv, before_state = self.ring_kv[rows, :, :, slot], self.ring_state[rows, :, slot]
        if self.longest >= self.ring_size:
            leaving = (self.seq_len >= self.ring_size) & real_B
            store(leaving[:, None] & (before_state != EVICT), before_kv)
        kv = torch.stack([new.k[:, :, 0], new.v[:, :, 0]], 2)
        self.ring_kv[rows, :, :, slot] = torch.where(real_B[:, None, None, None], kv, before_kv)
        self.ring_state[rows, :, slot] = torch.where(real_B[:, None], state_BH, before_state)
        self.seq_len += real_B

    def _store_few(self, keep_BH: torch.Tensor, kv_BH2D: torch.Tensor) -> None:
        """Append one entry to each head that keeps it, and look at no other head."""
        b, h = keep_BH.nonzero(as_tuple=True)
        if len(b) == 0:
            return
        P, num_kept = self.pool.page_size, self.num_kept[b, h].long()
        place, entry = num_kept // P, num_kept % P
        wanted = entry == 0
        num_wanted = int(wanted.sum())
        if num_wanted:
            self.pool.reserve(num_wanted)
            self._widen(int(num_kept.max()) + 1)
            page = self.pool.take(torch.ones(num_wanted, dtype=torch.bool, device=self.device))
            self.page_table[b[wanted], h[wanted], place[wanted]] = page.int()
            self.plan = None
        row = self.pool.row_of(self.page_table[b, h, place].long(), entry)
        self.pool.write(torch.cat([row, row + P]), kv_BH2D[b, h].transpose(0, 1).flatten(0, 1))
        self.num_kept += keep_BH
        self.most_kept += 1

    def _store_blindly(self, keep_BH: torch.Tensor, kv_BH2D: torch.Tensor) -> None:
        """As `_store_few`, without asking the device which heads keep theirs: the others write to the pool's scratch row."""
        P = self.pool.page_size
        self._make_room_for_one()
        place, entry = (self.num_kept // P).long()[..., None], self.num_kept % P
        wanted = keep_BH & (entry == 0)
        page = self.pool.take(wanted.flatten()).view_as(wanted).int()
        place = place.clamp(max=self.page_table.shape[2] - 1)
        page = torch.where(wanted, page, self.page_table.gather(2, place)[..., 0])
        self.page_table.scatter_(2, place, page[..., None])
        row = self.pool.row_of(page.long(), entry)
        row = torch.where(keep_BH[..., None], torch.stack([row, row + P], -1), self.pool.scratch)
        self.pool.write(row.flatten(), kv_BH2D.flatten(0, 2))
        self.num_kept += keep_BH

    def _make_room_for_one(self) -> None:
        """See to it that every head can append an entry; the device is asked once in a while."""
        self._reserve_ahead(self.num_kept.numel())
        if self.most_kept + 1 > self.page_table.shape[2] * self.pool.page_size:
            self.most_kept = int(self.num_kept.max())
            self._widen(self.most_kept + 1)
        self.most_kept += 1

    def _reserve_ahead(self, num_heads: int) -> None:
        """In P steps a head begins one page at most: reserve one for each, and look again after P steps."""
        steps, epoch = self.reserved
        if steps == 0 or epoch != self.pool.epoch:
            self.pool.reserve(num_heads)
            steps = self.pool.page_size
        self.reserved = (steps - 1, self.pool.epoch)

    def _push_many(self, new: Incoming, state_BHN: torch.Tensor, real_BN: torch.Tensor) -> None:
        position = self.positions(new)
        count = real_BN.sum(1, dtype=torch.int32)
        stays = (self.seq_len + count - self.ring_size)[:, None]
        # What leaves the ring, in order, then what of the new tokens the ring does not hold.
        order = self.seq_len[:, None] - self.ring_size + torch.arange(self.ring_size, dtype=torch.int32, device=self.device)
        slot = (order % self.ring_size).long().clamp(max=self.ring_kv.shape[3] - 1)
        state = self.ring_state.gather(2, slot[:, None].expand(-1, self.ring_state.shape[1], -1))
        leaves = ((order >= 0) & (order < stays))[:, None] & (state != EVICT)
        passes = (real_BN & (position < stays))[:, None] & (state_BHN != EVICT)
        self._store_many(new, slot, leaves, passes)
        b, n = (real_BN & (position >= stays)).nonzero(as_tuple=True)
        slot = (position[b, n] % self.ring_size).long()
        self.ring_kv[b, :, 0, slot] = new.k[b, :, n]
        self.ring_kv[b, :, 1, slot] = new.v[b, :, n]
        self.ring_state[b, :, slot] = state_BHN[b, :, n]
        self.seq_len += count

    def _store_many(self, new: Incoming, slot_BR: torch.Tensor, leaves_BHR: torch.Tensor, passes_BHN: torch.Tensor) -> None:
        """Append what leaves the ring, whose slots stand in order of age, and then what of the new tokens never enters it."""
        b, h, n = leaves_BHR.nonzero(as_tuple=True)
        if len(b):
            leaving = self.ring_kv[b, h, :, slot_BR[b, n]]
            self.append(b, h, leaving[:, 0], leaving[:, 1])
        b, h, n = passes_BHN.nonzero(as_tuple=True)
        if len(b):
            self.append(b, h, new.k[b, h, n], new.v[b, h, n])

    @lasting
    def append(self, b: torch.Tensor, h: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append entries [K, D] to pages; they stand in order of row b [K], then head h [K], then age."""
        B, H = self.num_kept.shape
        P, head = self.pool.page_size, b * H + h
        count = torch.bincount(head, minlength=B * H)
        # Each entry's number among those of its head.
        nth = torch.arange(len(head), device=self.device) - (count.cumsum(0) - count)[head]
        place = self.num_kept.flatten()[head] + nth
        self._add_pages(self.num_kept + count.view(B, H).int())
        row = self.pool.row_of(self.page_table[b, h, place // P].long(), place % P)
        self.pool.write(torch.cat([row, row + P]), torch.cat([k, v]))

    @lasting
    def drop(self, dropped: torch.Tensor) -> None:
        """Remove entries from pages: dropped [B, H, S] bool, of each head's first S kept entries, in order of age; the others
        keep their order. Pages before a head's first dropped entry stay where they are, and shared."""
        P = self.pool.page_size
        entry = torch.arange(dropped.shape[2], device=self.device)
        dropped = dropped & (entry < self.num_kept[..., None])
        loses = dropped.any(2)
        # Where each head's pages are written anew from.
        start = torch.where(loses, dropped.int().argmax(2) // P * P, self.num_kept).int()
        place = torch.arange(self.page_table.shape[2] * P, device=self.device)
        moves = (place >= start[..., None]) & (place < self.num_kept[..., None])
        moves[..., : dropped.shape[2]] &= ~dropped[..., : moves.shape[2]]
        b, h, n = moves.nonzero(as_tuple=True)
        row = self.pool.row_of(self.page_table[b, h, n // P].long(), n % P)
        k, v = self.pool.read(row), self.pool.read(row + P)
        self.pool.release(self.page_table[self._used() & (place[::P] >= start[..., None])])
        self.num_kept, self.plan, self.reserved = start, None, (0, 0)
        self.append(b, h, k, v)
        self.most_kept = int(self.num_kept.max()) if self.num_kept.numel() else 0
        self.pool.trim()

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
        self.num_kept, self.most_kept, self.plan, self.reserved = num_kept, most_kept, None, (0, 0)

    def _widen(self, most_kept: int) -> None:
        """Make room in the table for a head with so many entries."""
        width, step = -(-most_kept // self.pool.page_size), self._table_step()
        if width > self.page_table.shape[2]:
            self.page_table = F.pad(self.page_table, (0, -(-width // step) * step - self.page_table.shape[2]))

    def _table_step(self) -> int:
        return _TABLE_STEP * (1 if self.reads_are_free else 8)

    def next_pages(self) -> int:
        """How many pages one more token a row may take; exact on a CPU, except where its own gate decides at once."""
        if not self.reads_are_free:
            steps, epoch = self.reserved
            return 0 if steps > 0 and epoch == self.pool.epoch else self.num_kept.numel()
        slot = (self.seq_len % self.ring_size).long().clamp(max=self.ring_kv.shape[3] - 1)
        state = self.ring_state[torch.arange(len(slot)), :, slot]
        leaving = (self.seq_len >= self.ring_size)[:, None] & (state != EVICT)
        return int((leaving & (self.num_kept % self.pool.page_size == 0)).sum())

    def step_bytes(self) -> int:
        """How much the ring and the table grow, at most, by one more token a row."""
        slots = _ring_slots(self.longest + 1, self.ring_size) - self.ring_kv.shape[3]
        full = self.most_kept + 1 > self.page_table.shape[2] * self.pool.page_size
        per_slot = self.ring_kv.nbytes // self.ring_kv.shape[3] + self.ring_state.shape[:2].numel()
        return max(0, slots) * per_slot + full * self._table_step() * self.num_kept.nbytes

    @lasting
    def snapshot(self) -> dict:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    @lasting
    def restore(self, snapshot: dict) -> None:
        """Back to a snapshot since which tokens were only appended."""
        before = self.page_numbers()
        vars(self).update(snapshot)
        self.recount()
        self.pool.share(self.page_numbers())
        self.pool.release(before)
        # What the failed attempt took must not stand in the way of a smaller one.
        self.pool.trim(all_of_it=True)

    # Whole rows.

    def _used(self) -> torch.Tensor:
        """Which places of the table hold a page, [B, H, max_pages] bool."""
        return listed(self.page_table, self.num_kept, self.pool.page_size)

    def page_numbers(self) -> torch.Tensor:
        """Of all pages that the tables list, a shared one once for each holder."""
        return self.page_table[self._used()]

    def own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def num_last_pages(self) -> int:
        """Pages that are not full: those that a copy needs."""
        return int((self.num_kept % self.pool.page_size > 0).sum())

    def pages_to_select(self, rows: torch.Tensor) -> int:
        """How many more pages `select` takes than it gives back; below 0: it gives back more."""
        rows = rows.to(self.device)
        times = torch.bincount(rows, minlength=len(self.num_kept))
        copies = int(((self.num_kept % self.pool.page_size > 0).sum(1) * (times - 1).clamp(min=0)).sum())
        gone = self._used() & (times == 0)[:, None, None]
        left = self.pool.references.index_add(0, self.page_table[gone].long(), -torch.ones_like(self.page_table[gone]))
        return copies - int(((left == 0) & (self.pool.references > 0)).sum())

    @lasting
    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows [B'] int64, in that order; a row may stand there several times, and shares its pages then."""
        before = self.page_numbers()
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, rows))
        self.pool.share(self.page_numbers())
        self.pool.release(before)
        self._settle()

    @lasting
    def copy(self) -> "Store":
        """A second store with the same entries: full pages are shared, ring and last pages copied."""
        new = object.__new__(type(self))
        vars(new).update(vars(self) | {name: tensor.clone() for name, tensor in self.tensors().items()})
        self.pool.num_holders += 1
        self.pool.share(new.page_numbers())
        new._settle()
        return new

    def _settle(self) -> None:
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
        here = torch.bincount(page, minlength=self.pool.num_pages + 1)
        copies = ~(first & (here[page] == self.pool.references[page]))
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
        self.longest = int(self.seq_len.max()) if len(self.seq_len) else 0
        self.even = self.reads_are_free and bool((self.seq_len == self.longest).all())
        self.most_kept = int(self.num_kept.max()) if self.num_kept.numel() else 0
        self.plan, self.reserved = None, (0, 0)

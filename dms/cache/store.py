"""What one layer of the compacted cache holds: a private ring of the last w + 1 tokens, and pages of what was kept before them.

A token enters the ring. When it leaves, it is appended to its head's pages if the decision was to keep it, and is gone if not.
That equals the masked reference at every step: the ring is the newest token's window, in which every token is visible, and beyond
the window only kept tokens are, which are those in pages.

With several windows the ring is the first one's. A token that leaves it is gone if the first decision evicts it; else it is appended to its
head's list of the first decision that does, whose pages are given back from the front as what is in them falls out of that window, or to
the list of what stays for good.

Shapes: B batch, H KV heads, L = H * (number of windows) lists, N new tokens, R ring slots (w + 1), D head dim.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from dms import masks
from dms.cache.head_pages import HeadPages
from dms.cache.offloading import Offloaded, placeholder
from dms.cache.page_pool import PagePool, outside_inference_mode
from dms.cache.pending import EVICT, KEEP, UNDECIDED, Decisions, PendingTokens, fates, list_of
from dms.config import DMSConfig
from dms_kernels.arguments import Keys, state_lifetimes

# The ring starts small and grows to its w + 1 slots, by this many at a time.
_RING_STEP = 64
# A pool of which more than this part is free at its end is made smaller, where pages are given back as entries go.
_MUCH = 16


def _ring_slots(num_tokens: int, ring_size: int) -> int:
    """Slots of a ring after num_tokens tokens."""
    return min(ring_size, -(-num_tokens // _RING_STEP) * _RING_STEP)


class Store(HeadPages):
    """The entries of one layer: the ring of each sequence before the pages of each head."""

    _own = ("ring_kv", "ring_state", "page_table", "num_kept", "seq_len", "evicted", "decided")
    _counts = ("num_kept", "seq_len", "evicted", "decided")

    @outside_inference_mode
    def __init__(self, config: DMSConfig, pool: PagePool, batch: int, num_heads: int):
        super().__init__(pool, batch, num_heads)
        device = self.device
        self.dms = config
        self.ring_size = config.windows[0] + 1
        self.offloaded_ring: Offloaded | None = None
        """The ring's keys and values while the store is away."""
        self.ring_kv = torch.zeros(batch, num_heads, 2, min(self.ring_size, _RING_STEP), pool.head_dim, dtype=pool.dtype, device=device)
        """[B, H, 2, R, D]: keys and values, a token at slot position % ring_size."""
        self.ring_state = torch.zeros(batch, num_heads, self.ring_kv.shape[3], dtype=torch.uint8, device=device)
        """[B, H, R] uint8: KEEP, EVICT or UNDECIDED, or one of several windows' states."""
        self.seq_len = torch.zeros(batch, dtype=torch.int32, device=device)
        """[B] int32: tokens of each row's document."""
        self.evicted = torch.zeros(batch, num_heads, dtype=torch.int64, device=device)
        """[B, H] int64: decisions to evict so far."""
        self.decided = torch.zeros(batch, dtype=torch.int64, device=device)
        """[B] int64: decisions so far, a head."""
        self.longest = 0
        """A bound known without asking the device: no row has more tokens."""
        self.equal_lengths = self.reads_are_free
        """Whether all rows are known to have `longest` tokens; known on a CPU alone."""
        self.next_release = 0
        """With several windows: what `longest` must reach before a page can be gone."""

    @property
    def num_heads(self) -> int:
        return self.evicted.shape[1]

    def check(self) -> None:
        """Raises RuntimeError where the contents are known to be wrong."""

    # Offloaded. Tables and counts stay, so that an idle cache can be counted, copied in size, and end.

    def offload(self, folder: Path | None) -> None:
        """The ring, and the pages that no other store needs on the device, go to host memory (None) or into a file."""
        self.offloaded_ring = Offloaded({"ring_kv": self.ring_kv}, folder)
        self.ring_kv, self.read_order = placeholder(self.ring_kv), None
        self.is_offloaded = True
        self.pool.offload(folder)

    @outside_inference_mode
    def reload(self) -> None:
        assert self.offloaded_ring is not None, "it left"
        self.pool.reload()
        self.ring_kv, self.offloaded_ring, self.is_offloaded = self.offloaded_ring.take()["ring_kv"], None, False

    # Reserved.

    @outside_inference_mode
    def reserve_tokens(self, num_tokens: int, share: float) -> None:
        """Get the ring, page tables and pages that rows of num_tokens tokens need of which a share is kept, before they come."""
        in_pages, P = max(0, num_tokens - self.ring_size), self.pool.page_size
        self._widen_ring(_ring_slots(num_tokens, self.ring_size))
        self._widen(in_pages)
        # Each list's last page is half empty, and with several windows its first one too.
        for_good = -(-round(in_pages * share) // P) + 1
        passing = sum(-(-min(in_pages, b - a) // P) + 1 for a, b in pairwise(self.dms.windows))
        self.pool.keep_at_least(self.pool.num_used + len(self.num_kept) * self.num_heads * (for_good + passing))

    # Reading.

    def writes_one_slot(self, new: PendingTokens) -> bool:
        """Whether every row has as many tokens, a full ring, and a new token: then all write to the same slot."""
        return self.reads_are_free and self.equal_lengths and self.longest >= self.ring_size and new.tokens.unpadded

    def positions(self, new: PendingTokens) -> torch.Tensor:
        """[B, N] int32 within the document, -1 for padding."""
        real = new.tokens.segment_BT > 0
        if real.shape[1] == 1:
            return torch.where(real, self.seq_len[:, None], -1)
        return torch.where(real, self.seq_len[:, None] + real.cumsum(1, dtype=torch.int32) - 1, -1)

    def decisions(self, new: PendingTokens) -> Decisions:
        segment, sinks, decision = new.tokens.segment_BT, self.dms.sinks, new.decision
        real = segment > 0
        if self.lists_per_head > 1:
            return self._class_decisions(new, fates(decision), real)
        if real.shape[1] == 1 and self.dms.alignment == "own":
            # As below, for one token whose own gate decides.
            evicted = decision[:, 0] & real
            state = evicted & (self.seq_len >= sinks)[:, None] if sinks else evicted
            return Decisions(state[..., None].to(torch.uint8), evicted, real[:, 0])
        sink = (self.positions(new) < sinks)[:, None]
        aligned = masks.align(decision, segment, self.dms.alignment, False).transpose(1, 2)
        known = masks.decided_tokens(segment, self.dms.alignment)
        state = torch.where(known[:, None], (aligned & ~sink).to(torch.uint8), UNDECIDED)
        evicted, decided = (aligned & known[:, None]).sum(2), known.sum(1)
        if self.dms.alignment == "own":
            return Decisions(state, evicted, decided)
        # The first new token's gate decides for the ring's last token.
        at = real.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, decision.shape[2])
        first = decision.gather(1, at)[:, 0]
        decides = real.any(1) & (self.seq_len > 0)
        last = torch.where(decides[:, None], (first & (self.seq_len > sinks)[:, None]).to(torch.uint8), UNDECIDED)
        return Decisions(state, evicted + (first & decides[:, None]), decided + decides, last)

    def _class_decisions(self, new: PendingTokens, fate_BNH: torch.Tensor, real_BN: torch.Tensor) -> Decisions:
        """As `decisions`, of several windows."""
        segment, sinks, alignment = new.tokens.segment_BT, self.dms.sinks, self.dms.alignment
        aligned = masks.align(fate_BNH, segment, alignment, KEEP).transpose(1, 2)
        known = masks.decided_tokens(segment, alignment)[:, None]
        state = aligned.masked_fill((self.positions(new) < sinks)[:, None], KEEP) if sinks else aligned
        state = torch.where(known, state, UNDECIDED).to(torch.uint8)
        evicted, decided = ((aligned > 0) & known).sum(2), known.sum((1, 2))
        if alignment == "own":
            return Decisions(state, evicted, decided)
        # The first new token's gate decides for the ring's last token.
        at = real_BN.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, fate_BNH.shape[2])
        first = fate_BNH.gather(1, at)[:, 0]
        decides = real_BN.any(1) & (self.seq_len > 0)
        last = first.masked_fill((self.seq_len <= sinks)[:, None], KEEP)
        last = torch.where(decides[:, None], last, UNDECIDED).to(torch.uint8)
        return Decisions(state, evicted + ((first > 0) & decides[:, None]), decided + decides, last)

    def keys(self, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, state: torch.Tensor) -> Keys:
        """Entries in states [B, H, S], as attention takes them."""
        return Keys(k, v, position, state == EVICT) if self.lists_per_head == 1 else Keys(k, v, position, state=state)

    def ring(self, last: torch.Tensor | None = None, newest_only: bool = False) -> Keys:
        """The ring's entries for attention.

        last: the last token's state as new tokens decide it, where that is not stored yet. newest_only: the queries are those of
        the ring's newest tokens, for which the whole ring is in the window.
        """
        k, v = self.ring_kv[:, :, 0], self.ring_kv[:, :, 1]
        if (
            newest_only
            and self.reads_are_free
            and self.longest >= self.ring_size
            and (self.equal_lengths or bool((self.seq_len >= self.ring_size).all()))
        ):
            return Keys(k, v, all_visible=True)
        slot = torch.arange(self.ring_kv.shape[3], dtype=torch.int32, device=self.device)
        end = self.seq_len[:, None] - 1
        # Negative where there is nothing yet.
        position = (end - (end - slot) % self.ring_size).clamp(min=-1)
        state = self.ring_state
        if last is not None:
            is_last = (position == end) & (end >= 0)
            state = torch.where(is_last[:, None] & (last != UNDECIDED)[..., None], last[..., None], state)
        return self.keys(k, v, position, state)

    def entries_alive(self) -> torch.Tensor:
        """[B, H] int64: in the ring and in pages, without those that the newest token does not see."""
        in_pages = self.num_kept
        if self.lists_per_head > 1:
            in_pages = self.seen_by(self.seq_len - 1).sum(2).unflatten(1, (self.num_heads, -1)).sum(2)
        return (in_pages + self.seq_len.clamp(max=self.ring_size)[:, None]).long()

    def kept_for_good(self) -> torch.Tensor:
        """[B, H] int32: entries in pages that no window takes away."""
        return self.num_kept[:, :: self.lists_per_head]

    # Storing.

    @outside_inference_mode
    def push(self, new: PendingTokens) -> None:
        """Move new tokens into the ring, and what leaves it into the pages."""
        num_new = new.num_tokens
        if self.lists_per_head > 1 and self.pool.budget is None:
            # First, so that what comes can take the pages. Where a forward may be undone they are needed until the next one.
            self.release_gone(new)
        if num_new == 1 and self.dms.alignment == "own" and self.writes_one_slot(new):
            self._push_one_slot(new)
            return
        self.equal_lengths = self.equal_lengths and new.tokens.unpadded
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

    def release_gone(self, new: PendingTokens | None = None) -> None:
        """With several windows: give back pages whose entries are all gone for the rows' newest tokens, the new ones included."""
        num_new = 0 if new is None else new.num_tokens
        longest = self.longest + num_new
        if self.lists_per_head == 1 or longest < self.next_release:
            return
        pool, windows = self.pool, self.dms.windows
        if (self.reads_are_free or num_new > 1) and pool.headroom > pool.num_pages // _MUCH:
            pool.trim(part=_MUCH)
        newest = self.seq_len - 1 if new is None else self.seq_len - 1 + new.tokens.real.sum(1, dtype=torch.int32)
        left = self.release_pages(newest)
        # What leaves the ring from here on, a token a step, is visible for some more steps.
        self.next_release = longest + min(left + 1, windows[1] - windows[0])

    def _grow_ring(self, num_new: int) -> None:
        self._widen_ring(_ring_slots(self.longest + num_new, self.ring_size))

    def _widen_ring(self, num_slots: int) -> None:
        missing = num_slots - self.ring_kv.shape[3]
        if missing > 0:
            # Until the ring is full, a token's slot is its position.
            self.ring_kv = F.pad(self.ring_kv, (0, 0, 0, missing))
            self.ring_state = F.pad(self.ring_state, (0, missing))

    def _push_one_slot(self, new: PendingTokens) -> None:
        """One token a row, as most steps of decoding are; what `decisions` and `_push_one` do for any."""
        evicted, slot = fates(new.decision)[:, 0], self.longest % self.ring_size
        self.evicted += evicted if self.lists_per_head == 1 else evicted > 0
        self.decided += 1
        leaving = self.ring_state[:, :, slot]
        place = () if self.lists_per_head == 1 else (list_of(leaving), self.longest - self.ring_size)
        self.append_to_some(leaving != EVICT, self.ring_kv[:, :, :, slot], *place)
        self.ring_kv[:, :, 0, slot] = new.k[:, :, 0]
        self.ring_kv[:, :, 1, slot] = new.v[:, :, 0]
        # EVICT is 1 and KEEP 0; of several windows these are states.
        self.ring_state[:, :, slot] = evicted if self.longest >= self.dms.sinks else KEEP
        self.seq_len += 1
        self.longest += 1

    def _push_one(self, new: PendingTokens, state_BH: torch.Tensor, real_B: torch.Tensor) -> None:
        """One token a row. Where the device is no CPU, nothing is read back from it."""
        append: Callable = self.append_to_some if self.reads_are_free else self.append_without_reading
        rows = torch.arange(len(real_B), device=self.device)
        slot = (self.seq_len % self.ring_size).long()
        before_kv, before_state = self.ring_kv[rows, :, :, slot], self.ring_state[rows, :, slot]
        if self.longest >= self.ring_size:
            leaving = (self.seq_len >= self.ring_size) & real_B
            append(leaving[:, None] & (before_state != EVICT), before_kv, *self._place_of(before_state))
        kv = torch.stack([new.k[:, :, 0], new.v[:, :, 0]], 2)
        self.ring_kv[rows, :, :, slot] = torch.where(real_B[:, None, None, None], kv, before_kv)
        self.ring_state[rows, :, slot] = torch.where(real_B[:, None], state_BH, before_state)
        self.seq_len += real_B

    def _place_of(self, state_BH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """With several windows: the list [B, H] and the position [B] of the tokens that leave the ring."""
        return () if self.lists_per_head == 1 else (list_of(state_BH), self.seq_len - self.ring_size)

    def _push_many(self, new: PendingTokens, state_BHN: torch.Tensor, real_BN: torch.Tensor) -> None:
        position = self.positions(new)
        count = real_BN.sum(1, dtype=torch.int32)
        stays = (self.seq_len + count - self.ring_size)[:, None]
        # What leaves the ring, in order, then what of the new tokens the ring does not hold.
        order = self.seq_len[:, None] - self.ring_size + torch.arange(self.ring_size, dtype=torch.int32, device=self.device)
        slot = (order % self.ring_size).long().clamp(max=self.ring_kv.shape[3] - 1)
        state = self.ring_state.gather(2, slot[:, None].expand(-1, self.ring_state.shape[1], -1))
        leaves = ((order >= 0) & (order < stays))[:, None] & (state != EVICT)
        passes = (real_BN & (position < stays))[:, None] & (state_BHN != EVICT)
        if self.lists_per_head == 1:
            self._append_leaving(new, slot, leaves, passes)
        else:
            lifetimes = state_lifetimes(self.dms.windows, self.device)
            newest = self.seq_len + count - 1
            leaves &= (newest[:, None] - order)[:, None] <= lifetimes[state.long()]
            passes &= (newest[:, None] - position)[:, None] <= lifetimes[state_BHN.long()]
            # The list that each goes to, from 1; 0: it goes to none.
            self._append_to_lists(new, slot, order, (list_of(state) + 1) * leaves, (list_of(state_BHN) + 1) * passes)
            # Of these some may be gone after one more token.
            self.next_release = 0
        b, n = (real_BN & (position >= stays)).nonzero(as_tuple=True)
        slot = (position[b, n] % self.ring_size).long()
        self.ring_kv[b, :, 0, slot] = new.k[b, :, n]
        self.ring_kv[b, :, 1, slot] = new.v[b, :, n]
        self.ring_state[b, :, slot] = state_BHN[b, :, n]
        self.seq_len += count

    def _append_leaving(self, new: PendingTokens, slot_BR: torch.Tensor, leaves_BHR: torch.Tensor, passes_BHN: torch.Tensor) -> None:
        """Append to pages what leaves the ring, whose slots come in order of age, and then the new tokens that never enter it."""
        b, h, n = leaves_BHR.nonzero(as_tuple=True)
        if len(b):
            leaving = self.ring_kv[b, h, :, slot_BR[b, n]]
            self.append(b, h, leaving[:, 0], leaving[:, 1])
        b, h, n = passes_BHN.nonzero(as_tuple=True)
        if len(b):
            self.append(b, h, new.k[b, h, n], new.v[b, h, n])

    def _append_to_lists(
        self, new: PendingTokens, slot_BR: torch.Tensor, order_BR: torch.Tensor, leaves_BHR: torch.Tensor, passes_BHN: torch.Tensor
    ) -> None:
        """As `_append_leaving`, of several windows: leaves and passes say to which list of its head each token goes, from 1, 0 for none; order:
        the ring's tokens by position."""
        self._append_by_list(leaves_BHR, order_BR, lambda b, h, n: self.ring_kv[b, h, :, slot_BR[b, n]].unbind(1))
        self._append_by_list(passes_BHN, self.positions(new), lambda b, h, n: (new.k[b, h, n], new.v[b, h, n]))

    def _append_by_list(self, to_BHN: torch.Tensor, position_BN: torch.Tensor, read: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        """Append tokens, which come in order of age; read gives keys and values [K, D] of the tokens n [K] of heads b, h."""
        b, h, n = to_BHN.nonzero(as_tuple=True)
        if len(b) == 0:
            return
        number = h * self.lists_per_head + to_BHN[b, h, n] - 1
        by_list = (b * self.num_kept.shape[1] + number).argsort(stable=True)
        b, h, n, number = (x[by_list] for x in (b, h, n, number))
        k, v = read(b, h, n)
        self.append(b, number, k, v, position_BN[b, n])

    def drop(self, dropped: torch.Tensor) -> None:
        super().drop(dropped)
        self.next_release = 0
        self.release_gone()

    @outside_inference_mode
    def append_rows(self, other: HeadPages, rows: torch.Tensor) -> None:
        if not isinstance(other, Store) or other.dms != self.dms:
            raise ValueError("sequences can join a cache of the same windows, sinks and alignment alone; both caches must be of one model")
        num_slots = max(self.ring_kv.shape[3], other.ring_kv.shape[3])
        for store in (self, other):
            store._widen_ring(num_slots)
        super().append_rows(other, rows)

    @outside_inference_mode
    def take_rows(self, rows: torch.Tensor) -> "Store":
        # A ring that is not full yet has a slot for each token.
        self._widen_ring(self.ring_size)
        return super().take_rows(rows)

    def snapshot(self) -> dict[str, torch.Tensor]:
        self.release_gone()
        return super().snapshot()

    def recount(self) -> None:
        super().recount()
        self.next_release = 0
        self.longest = int(self.seq_len.max()) if len(self.seq_len) else 0
        self.equal_lengths = self.reads_are_free and bool((self.seq_len == self.longest).all())

    # What one more token a row may take.

    def next_pages(self) -> int:
        """Pages; exact on a CPU, except where its own gate decides at once."""
        if not self.reads_are_free:
            steps, epoch = self.reserved
            return 0 if steps > 0 and epoch == self.pool.epoch else self.num_kept.numel()
        slot = (self.seq_len % self.ring_size).long().clamp(max=self.ring_kv.shape[3] - 1)
        state = self.ring_state[torch.arange(len(slot)), :, slot]
        leaving = (self.seq_len >= self.ring_size)[:, None] & (state != EVICT)
        begins_page = self.num_kept % self.pool.page_size == 0
        if self.lists_per_head > 1:
            of_lists = begins_page.unflatten(1, (self.num_heads, -1))
            # Where the next token's gate decides for the one that leaves, it may go to any of the lists.
            begins_page = torch.where(state == UNDECIDED, of_lists.any(2), of_lists.gather(2, list_of(state)[..., None])[..., 0])
        return int((leaving & begins_page).sum())

    def step_bytes(self) -> int:
        """Bytes by which the ring and the page table grow, at most."""
        slots = _ring_slots(self.longest + 1, self.ring_size) - self.ring_kv.shape[3]
        full = self.most_kept + 1 > self.page_table.shape[2] * self.pool.page_size
        per_slot = self.ring_kv.nbytes // self.ring_kv.shape[3] + self.ring_state.shape[:2].numel()
        return max(0, slots) * per_slot + full * self._table_step() * self.num_kept.nbytes

"""The store where kernels run: a decode step is one launch that appends and one that attends, and nothing is read back.

Shapes: B batch, H KV heads, N new tokens, R ring slots, D head dim, P page size.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dms.cache.host_pages import HostPagePool
from dms.cache.page_pool import PagePool, outside_inference_mode
from dms.cache.pending import Decisions, PendingGate, PendingTokens
from dms.cache.store import Store
from dms.config import DMSConfig
from dms_kernels.append import append
from dms_kernels.arguments import Counters, FreePages, Keys, NewToken, PagedKV, PendingKV, Ring
from dms_kernels.dispatch import explain
from dms_kernels.launching import is_traced
from dms_kernels.paged_decode import paged_decode
from dms_kernels.sparse_prefill import attend, store_survivors

if TYPE_CHECKING:
    # They need Triton, which machines without a GPU may lack.
    from dms_kernels.append.fused import CachedAppend
    from dms_kernels.paged_decode.fused import CachedDecode

_NO_PAGE = "a decode step found no free page and dropped an entry; please report this"
# More queries are read as a prompt is.
_MAX_QUERIES = 8


def make_store(config: DMSConfig, pool: PagePool, batch: int, num_heads: int) -> Store:
    """A store for the pool's device: with kernels where they run."""
    problem = f"the kernels take no {pool.dtype} entries of {pool.head_dim}" if pool.dtype == torch.float64 or pool.head_dim > 256 else None
    kind = FusedStore if explain(pool.device, problem)[0] == "triton" else Store
    return kind(config, pool, batch, num_heads)


@dataclass
class _CachedLaunches:
    """How a store's kernels were launched at the step before."""

    state: tuple[torch.Tensor, ...]
    """The tensors that they are launched with."""
    append: "CachedAppend | None" = None
    decode: "dict[bool, CachedDecode]" = field(default_factory=dict)
    """Without pages and with them."""

    def fits(self, state: tuple[torch.Tensor, ...]) -> bool:
        return all(a is b for a, b in zip(self.state, state, strict=True))


class FusedStore(Store):
    """A store whose appends and decode steps are kernels. Tickets are workspace: kernels find them 0 and leave them 0."""

    @outside_inference_mode
    def __init__(self, config: DMSConfig, pool: PagePool, batch: int, num_heads: int):
        super().__init__(config, pool, batch, num_heads)
        # In the interpreter as on a GPU.
        self.reads_are_free, self.equal_lengths = False, False
        self.overflow = torch.zeros(1, dtype=torch.int32, device=self.device)
        """[1] int32, 1 where a step found no free page."""
        self.append_tickets = self.overflow[:0]
        """[B] int32, of several windows [B + 1]."""
        self.decode_tickets = self.overflow[:0]
        """[B * Hq] int32."""
        self.is_prepared = False
        """`prepare_step` was called, and the step has not come yet."""

    @outside_inference_mode
    def push(self, new: PendingTokens) -> None:
        if new.num_tokens > 1:
            super().push(new)
            return
        self.prepare_step()
        # `outside_inference_mode` would let gradients be recorded again.
        with torch.no_grad():
            self._append(new)
        self.count_step()
        if isinstance(self.pool, HostPagePool) and self.most_kept > 0:
            self.pool.note_rows(self._newest_rows())

    def _newest_rows(self) -> torch.Tensor:
        """[B * L * 2] int64: of each list's newest entry, which is where a step has written if it has; nothing is read back."""
        last, P = (self.num_kept.long() - 1).clamp(min=0), self.pool.page_size
        row = self.pool.row_of(self.page_table.gather(2, (last // P)[..., None])[..., 0].long(), last % P)
        return torch.where((self.num_kept > 0)[..., None], torch.stack([row, row + P], -1), self.pool.scratch).flatten()

    def _note_pages(self, before: torch.Tensor) -> None:
        """Entries were stored by kernels, in lists that held `before` [B, L]."""
        if isinstance(self.pool, HostPagePool):
            place = torch.arange(self.page_table.shape[2], device=self.device)
            self.pool.note_pages(self.page_table[(place >= (before // self.pool.page_size)[..., None]) & self._used_places()])

    @outside_inference_mode
    def prepare_step(self) -> None:
        """Make room for one token a row: all that the host does before a step, so that the step itself is the same launches as the one before. A
        second call before the step does nothing."""
        if self.is_prepared:
            return
        self._grow_ring(1)
        if self.longest >= self.ring_size:
            self._make_room_for_one()
        self._size_append_tickets()
        self.is_prepared = True

    def _size_append_tickets(self) -> None:
        num_tickets = len(self.seq_len) + (self.lists_per_head > 1)
        if len(self.append_tickets) != num_tickets:
            self.append_tickets = self.seq_len.new_zeros(num_tickets)

    def step_in_rows(
        self, row: torch.Tensor, k: torch.Tensor, v: torch.Tensor, evicts: torch.Tensor, q: torch.Tensor, **options
    ) -> torch.Tensor:
        """Store a token of each of the sequences in rows [B] int32, k and v [B, H, D] and evicts [B, H] or [B, H, K], and attend with its queries q
        [B, Hq, D] -> [B, Hq, D]. Rings are full in size, as `take_rows` leaves them. Asks the device once in a while."""
        with torch.inference_mode(False), torch.no_grad():
            self._make_room_for_one()
            self._size_append_tickets()
            if self.decode_tickets.numel() < len(self.seq_len) * q.shape[1]:
                self.decode_tickets = self.seq_len.new_zeros(len(self.seq_len) * q.shape[1])
            kept = self._cached_launches()
            if kept.append is None:
                kept.append = self._make_appends()
            kept.append(k, v, evicts, None, row)
            return self._decode_of(kept, True)(q[:, :, None].to(self.ring_kv.dtype), None, row, **options)[:, 0]

    def count_step(self) -> None:
        """What the host counts after a step."""
        self.longest += 1
        self.is_prepared = False

    def step_launches(self) -> object | None:
        """What the step's launches depend on, the same object from step to step as long as they are the same; None: the last step launched others."""
        kept = self.pool.cached_launches.get(self)
        if kept is None or kept.append is None or (self.most_kept > 0) not in kept.decode or not kept.fits(self._launched_with()):
            return None
        return kept

    def _append(self, new: PendingTokens) -> None:
        evict = new.decided.kernel_gate() if isinstance(new.decided, PendingGate) else new.decided[:, 0]
        k, v, real = new.k[:, :, 0], new.v[:, :, 0], new.tokens.real[:, 0]
        if is_traced():
            append(NewToken(k, v, evict, real=real), *self._appended_to(), **self._how())
            return
        kept = self._cached_launches()
        if kept.append is None:
            kept.append = self._make_appends()
        kept.append(k, v, evict, real)

    def _how(self) -> dict[str, Any]:
        # Pages are given back as in `push` of many tokens.
        return {"sinks": self.dms.sinks, "alignment": self.dms.alignment, "release_gone": self.pool.budget is None}

    def _make_appends(self) -> "CachedAppend":
        from dms_kernels.append.fused import CachedAppend

        return CachedAppend(*self._appended_to(), **self._how())

    def _appended_to(self) -> tuple[Ring, PagedKV, FreePages, Counters]:
        pool = self.pool
        free = FreePages(pool.free, pool.num_free, pool.references)
        return self._ring(), self._paged(self.num_kept), free, Counters(self.evicted, self.decided, self.overflow, self.append_tickets)

    def _cached_launches(self) -> "_CachedLaunches":
        """Of this store as it is; new ones where a tensor has been replaced since."""
        state = self._launched_with()
        kept = self.pool.cached_launches.get(self)
        if kept is None or not kept.fits(state):
            kept = self.pool.cached_launches[self] = _CachedLaunches(state)
        return kept

    def _launched_with(self) -> tuple[torch.Tensor, ...]:
        pool = self.pool
        return (
            *(self.ring_kv, self.ring_state, self.seq_len, self.page_table, self.num_kept, self.evicted, self.decided),
            *(self.append_tickets, self.decode_tickets, pool.rows, pool.references, pool.free, pool.num_free),
        )

    def _ring(self) -> Ring:
        return Ring(self.ring_kv, self.ring_state, self.seq_len, self.dms.windows[0], self.dms.windows[1:])

    def _paged(self, num_kept: torch.Tensor) -> PagedKV:
        """The pages, of which each list holds num_kept [B, L]."""
        pool = self.pool
        return PagedKV(pool.pages, self.page_table, num_kept, pool.scales, positions=pool.positions, windows=pool.windows)

    # Under autocast, rotation leaves queries in float32 and values are narrower, as what is stored is; what comes out is cast anyway.

    def attend_newest(self, query: torch.Tensor, real_B: torch.Tensor, *, window: int, **options) -> torch.Tensor:
        """Queries [B, Hq, 1, D] of the rows' newest tokens, which are stored; 0 where a row has no new one. window: the ring's."""
        query = query.to(self.ring_kv.dtype)
        tickets = self._tickets(query)
        if is_traced():
            return paged_decode(query, self._ring(), self.pages(), real=real_B, tickets=tickets, **options)
        return self._decode_of(self._cached_launches(), self.most_kept > 0)(query, real_B, **options)

    def _decode_of(self, kept: "_CachedLaunches", has_pages: bool) -> "CachedDecode":
        if has_pages not in kept.decode:
            from dms_kernels.paged_decode.fused import CachedDecode

            paged = self._paged(self.num_kept) if has_pages else None
            kept.decode[has_pages] = CachedDecode(self._ring(), paged, self.decode_tickets)
        return kept.decode[has_pages]

    def attend(
        self,
        query: torch.Tensor,
        position: torch.Tensor,
        recent: list[Keys],
        decisions: Decisions,
        new: PendingTokens,
        *,
        window: int,
        **options,
    ) -> torch.Tensor:
        """Queries [B, Hq, T, D] of the last T of `new`, which is not stored yet; position [B, N] of all of them."""
        position, query = position[:, -query.shape[2] :], query.to(self.ring_kv.dtype)
        if query.shape[2] > _MAX_QUERIES:
            # Beside a ring everything is put in order anyway.
            holes = new.tokens.has_holes if len(recent) == 1 else None
            return attend(query, position, self.pages(), recent, holes=holes, window=window, **options)
        new_position = recent[-1].position
        assert new_position is not None, "new tokens have positions"
        return paged_decode(
            query,
            self._ring(),
            self.pages(),
            q_position=position.contiguous(),
            pending=PendingKV(new.k, new.v, new_position.contiguous(), decisions.state.contiguous()),
            last_state=None if decisions.last is None else decisions.last.contiguous(),
            tickets=self._tickets(query),
            **options,
        )

    @outside_inference_mode
    def _tickets(self, query: torch.Tensor) -> torch.Tensor:
        num_heads = query.shape[0] * query.shape[1]
        if self.decode_tickets.numel() != num_heads:
            self.decode_tickets = torch.zeros(num_heads, dtype=torch.int32, device=self.device)
        return self.decode_tickets

    def _make_room_for_one(self) -> None:
        before = self.pool.epoch
        super()._make_room_for_one()
        if self.pool.epoch != before:
            # The device was asked anyway.
            self.check()

    def _asked_numbers(self) -> torch.Tensor:
        return torch.cat([self.pool.num_free[None], self.overflow.long()])

    def _free_of(self, numbers: list[int]) -> int:
        num_free, overflow = numbers
        if overflow:
            raise RuntimeError(_NO_PAGE)
        return num_free

    def recount(self) -> None:
        super().recount()
        self.is_prepared = False

    def _append_leaving(self, new: PendingTokens, slot_BR: torch.Tensor, leaves_BHR: torch.Tensor, passes_BHN: torch.Tensor) -> None:
        before, leaving = self.num_kept, leaves_BHR.sum(2, dtype=torch.int32)
        self._add_pages(before + leaving + passes_BHN.sum(2, dtype=torch.int32))
        if self.most_kept == 0:
            return
        if self.longest > 0:
            index = slot_BR[:, None, None, :, None].expand(*self.ring_kv.shape[:3], -1, self.ring_kv.shape[4])
            ring = self.ring_kv.gather(3, index)
            store_survivors(ring[:, :, 0], ring[:, :, 1], leaves_BHR, self._paged(before))
        store_survivors(new.k, new.v, passes_BHN, self._paged(before + leaving))
        self._note_pages(before)

    def _append_to_lists(
        self, new: PendingTokens, slot_BR: torch.Tensor, order_BR: torch.Tensor, leaves_BHR: torch.Tensor, passes_BHN: torch.Tensor
    ) -> None:
        each = torch.arange(1, self.lists_per_head + 1, device=self.device)[:, None]
        leaving, passing = ((to[:, :, None] == each).sum(3, dtype=torch.int32).flatten(1) for to in (leaves_BHR, passes_BHN))
        before = self.num_kept
        self._add_pages(before + leaving + passing)
        if self.most_kept == 0:
            return
        if self.longest > 0:
            index = slot_BR[:, None, None, :, None].expand(*self.ring_kv.shape[:3], -1, self.ring_kv.shape[4])
            ring = self.ring_kv.gather(3, index)
            store_survivors(ring[:, :, 0], ring[:, :, 1], leaves_BHR.to(torch.uint8), self._paged(before), order_BR)
        store_survivors(new.k, new.v, passes_BHN.to(torch.uint8), self._paged(before + leaving), self.positions(new))
        self._note_pages(before)

    def check(self) -> None:
        """Raises RuntimeError where a step found no page. Enough were reserved, so that this would be an error of ours."""
        if int(self.overflow):
            raise RuntimeError(_NO_PAGE)

"""The store where kernels run: a decode step is one launch that appends and one that attends, and nothing is read back.

Shapes: B batch, H KV heads, N new tokens, R ring slots, D head dim, P page size.
"""

import torch

from dms.cache.page_pool import PagePool, outside_inference_mode
from dms.cache.store import Decisions, PendingGate, PendingTokens, Store
from dms.config import DMSConfig
from dms_kernels.append import append
from dms_kernels.arguments import Counters, FreePages, Keys, NewToken, PagedKV, PendingKV, Ring
from dms_kernels.dispatch import explain
from dms_kernels.paged_decode import paged_decode
from dms_kernels.sparse_prefill import attend, store_survivors

# More queries are read as a prompt is.
_MAX_QUERIES = 8


def make_store(config: DMSConfig, pool: PagePool, batch: int, num_heads: int) -> Store:
    """A store for the pool's device: with kernels where they run."""
    problem = f"the kernels take no {pool.dtype} entries of {pool.head_dim}" if pool.dtype == torch.float64 or pool.head_dim > 256 else None
    kind = FusedStore if explain(pool.rows.device, problem)[0] == "triton" else Store
    return kind(config, pool, batch, num_heads)


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
        """[B] int32."""
        self.decode_tickets = self.overflow[:0]
        """[B * Hq] int32."""

    @outside_inference_mode
    def push(self, new: PendingTokens) -> None:
        if new.num_tokens > 1:
            super().push(new)
            return
        self._grow_ring(1)
        if self.longest >= self.ring_size:
            self._make_room_for_one()
        if len(self.append_tickets) != len(self.seq_len):
            self.append_tickets = torch.zeros_like(self.seq_len)
        # `outside_inference_mode` would let gradients be recorded again.
        with torch.no_grad():
            self._append(new)
        self.longest += 1

    def _append(self, new: PendingTokens) -> None:
        evict = new.decided.kernel_gate() if isinstance(new.decided, PendingGate) else new.decided[:, 0]
        append(
            NewToken(new.k[:, :, 0], new.v[:, :, 0], evict, real=new.tokens.real[:, 0]),
            self._ring(),
            PagedKV(self.pool.pages, self.page_table, self.num_kept, self.pool.scales),
            FreePages(self.pool.free, self.pool.num_free, self.pool.references),
            Counters(self.evicted, self.decided, self.overflow, self.append_tickets),
            sinks=self.dms.sinks,
            alignment=self.dms.alignment,
        )

    def _ring(self) -> Ring:
        return Ring(self.ring_kv, self.ring_state, self.seq_len, self.dms.windows[0])

    # Under autocast, rotation leaves queries in float32 and values are narrower, as what is stored is; what comes out is cast anyway.

    def attend_newest(self, query: torch.Tensor, real_B: torch.Tensor, *, window: int, **options) -> torch.Tensor:
        """Queries [B, Hq, 1, D] of the rows' newest tokens, which are stored; 0 where a row has no new one. window: the ring's."""
        query = query.to(self.ring_kv.dtype)
        return paged_decode(query, self._ring(), self.pages(), real=real_B, tickets=self._tickets(query), **options)

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

    def _append_leaving(self, new: PendingTokens, slot_BR: torch.Tensor, leaves_BHR: torch.Tensor, passes_BHN: torch.Tensor) -> None:
        before, leaving = self.num_kept, leaves_BHR.sum(2, dtype=torch.int32)
        self._add_pages(before + leaving + passes_BHN.sum(2, dtype=torch.int32))
        if self.most_kept == 0:
            return
        if self.longest > 0:
            index = slot_BR[:, None, None, :, None].expand(*self.ring_kv.shape[:3], -1, self.ring_kv.shape[4])
            ring = self.ring_kv.gather(3, index)
            store_survivors(ring[:, :, 0], ring[:, :, 1], leaves_BHR, PagedKV(self.pool.pages, self.page_table, before, self.pool.scales))
        paged = PagedKV(self.pool.pages, self.page_table, before + leaving, self.pool.scales)
        store_survivors(new.k, new.v, passes_BHN, paged)

    def check(self) -> None:
        """Raises RuntimeError where a step found no page. Enough were reserved, so that this would be an error of ours."""
        if int(self.overflow):
            raise RuntimeError("a decode step found no free page and dropped an entry; please report this")

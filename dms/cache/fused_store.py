"""The store where kernels run: a decode step is one launch that appends and one that attends, and nothing is read back.

Shapes: B batch, H KV heads, N new tokens, R ring slots, D head dim, P page size.
"""

from typing import Any

import torch

from dms.cache.page_pool import PagePool, outside_inference_mode
from dms.cache.store import Decisions, PendingGate, PendingTokens, Store
from dms.config import DMSConfig
from dms_kernels.append import append
from dms_kernels.cached_attention import Keys
from dms_kernels.paged_decode import paged_decode
from dms_kernels.picking import explain
from dms_kernels.sparse_prefill import attend, store_survivors

# More queries are read as a prompt is.
_MAX_QUERIES = 8


def make_store(config: DMSConfig, pool: PagePool, batch: int, num_heads: int) -> Store:
    """A store for the pool's device: with kernels where they run."""
    problem = f"the kernels take no {pool.dtype} entries of {pool.head_dim}" if pool.dtype == torch.float64 or pool.head_dim > 256 else None
    kind = FusedStore if explain(pool.rows.device, problem)[0] == "triton" else Store
    return kind(config, pool, batch, num_heads)


class FusedStore(Store):
    """A store whose appends and decode steps are kernels. Tickets are the kernels' own: they find them 0 and leave them 0."""

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
        decided = new.decided
        # `outside_inference_mode` would let gradients be recorded again.
        with torch.no_grad():
            self._append(new, {"evict": None, **decided.arguments()} if isinstance(decided, PendingGate) else {"evict": decided[:, 0]})
        self.longest += 1

    def _append(self, new: PendingTokens, decided_by: dict[str, Any]) -> None:
        append(
            new.k[:, :, 0],
            new.v[:, :, 0],
            ring_kv=self.ring_kv,
            ring_state=self.ring_state,
            seq_len=self.seq_len,
            num_kept=self.num_kept,
            page_table=self.page_table,
            pages=self.pool.pages,
            references=self.pool.references,
            free=self.pool.free,
            num_free=self.pool.num_free,
            evicted=self.evicted,
            decided=self.decided,
            overflow=self.overflow,
            ticket=self.append_tickets,
            page_scales=self.pool.scales,
            window=self.dms.window,
            sinks=self.dms.sinks,
            alignment=self.dms.alignment,
            real=new.tokens.real[:, 0],
            **decided_by,
        )

    # Under autocast, rotation leaves queries in float32 and values are narrower, as what is stored is; what comes out is cast anyway.

    def attend_newest(self, query: torch.Tensor, real_B: torch.Tensor, **options) -> torch.Tensor:
        """Queries [B, Hq, 1, D] of the rows' newest tokens, which are stored; 0 where a row has no new one."""
        query = query.to(self.ring_kv.dtype)
        return paged_decode(query, real=real_B, **self._entries(query), **options)

    def attend(
        self, query: torch.Tensor, position: torch.Tensor, recent: list[Keys], decisions: Decisions, new: PendingTokens, **options
    ) -> torch.Tensor:
        """Queries [B, Hq, T, D] of the newest of `new`, whose positions [B, N] are given and which is not stored yet."""
        position, query = position[:, -query.shape[2] :], query.to(self.ring_kv.dtype)
        if query.shape[2] > _MAX_QUERIES:
            # Beside a ring everything is put in order anyway.
            holes = new.tokens.has_holes if len(recent) == 1 else None
            return attend(query, position, self.pages(), recent, holes=holes, **options)
        new_position = recent[-1].position
        assert new_position is not None, "new tokens have positions"
        return paged_decode(
            query,
            q_position=position.contiguous(),
            new_k=new.k,
            new_v=new.v,
            new_position=new_position.contiguous(),
            new_state=decisions.state.contiguous(),
            last_state=None if decisions.last is None else decisions.last.contiguous(),
            **self._entries(query),
            **options,
        )

    @outside_inference_mode
    def _entries(self, query: torch.Tensor) -> dict[str, Any]:
        """What `paged_decode` reads, and its workspace."""
        num_heads = query.shape[0] * query.shape[1]
        if self.decode_tickets.numel() != num_heads:
            self.decode_tickets = torch.zeros(num_heads, dtype=torch.int32, device=self.device)
        pages = self.pages()
        return {
            "ring_kv": self.ring_kv,
            "ring_state": self.ring_state,
            "seq_len": self.seq_len,
            "pages": None if pages is None else pages.pages,
            "page_table": None if pages is None else pages.page_table,
            "num_kept": None if pages is None else pages.num_kept,
            "page_scales": None if pages is None else pages.scales,
            "tickets": self.decode_tickets,
        }

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
            store_survivors(ring[:, :, 0], ring[:, :, 1], leaves_BHR, before, self.page_table, self.pool.pages, self.pool.scales)
        store_survivors(new.k, new.v, passes_BHN, before + leaving, self.page_table, self.pool.pages, self.pool.scales)

    def check(self) -> None:
        """Raises RuntimeError where a step found no page. Enough were reserved, so that this would be an error of ours."""
        if int(self.overflow):
            raise RuntimeError("a decode step found no free page and dropped an entry; please report this")

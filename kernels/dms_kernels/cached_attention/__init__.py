"""Attention of new queries over a compacted cache: pages of kept entries, the ring of recent tokens, and the new tokens.

Key k is visible to query q of its document iff `k <= q` and (`q - k <= window` or k is not evicted). Pages hold kept entries
that are older than the window of every query, so that all of them are visible.

Shapes: B batch, T queries, Hq query heads, H KV heads, G = Hq / H, D head dim, S keys, N pages of a pool, P entries of a page.
"""

from typing import NamedTuple

import torch

from dms_kernels import picking
from dms_kernels.cached_attention.few_queries import Plan, attend_few, make_plan
from dms_kernels.cached_attention.many_queries import attend_many
from dms_kernels.cached_attention.reference import reference

__all__ = ["Keys", "Pages", "Plan", "cached_attention", "make_plan", "reference"]

# Up to so many rows of scores a KV head, every page is read where it lies; above, its entries are gathered once for all queries.
_MAX_FEW_ROWS = 64


class Keys(NamedTuple):
    """Entries with positions. k, v: [B, H, S, D]; position [B, S] int, within the document, -1: nothing there; evicted [B, H, S] bool.

    all_visible: no entry is hidden from any query; position and evicted are not read then.
    """

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor | None = None
    evicted: torch.Tensor | None = None
    all_visible: bool = False


class Pages(NamedTuple):
    """Kept entries: the first num_kept [B, H] int32 of those that page_table [B, H, max_pages] int32 lists in pages [N, 2, P, D].

    plan: `make_plan` of this table, which reads pages in place; None: they are gathered through the table without reading
    anything back from the device.
    """

    pages: torch.Tensor
    page_table: torch.Tensor
    num_kept: torch.Tensor
    plan: Plan | None = None
    scales: torch.Tensor | None = None


def cached_attention(
    q: torch.Tensor,
    q_position: torch.Tensor | None,
    pages: Pages | None,
    recent: list[Keys],
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, Hq, T, D], q_position [B, T] int (-1: padding, gives 0) -> [B, T, Hq, D] in q's dtype.

    q_position may be None for a few queries that see every key and of which none is padding.

    recent: the ring, and the new tokens where they are not in it yet, in any order within each. The new tokens stand last, with
    positions that grow along S. sink_logits [Hq]: a logit beside the keys' (gpt_oss). Scores and sums are float32.
    """
    picking.count("cached_attention", "reference")
    H = recent[0].k.shape[1]
    rows = q.shape[1] // H * q.shape[2]
    attend = attend_few if rows <= _MAX_FEW_ROWS else attend_many
    return attend(q, q_position, pages, recent, window=window, scale=scale, softcap=softcap, sink_logits=sink_logits)

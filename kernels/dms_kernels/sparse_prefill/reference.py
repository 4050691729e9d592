"""Plain attention over every pair, and survivors stored with plain indexing, on any device: what the kernels are held to.

Shapes: B batch, T queries, S entries, Hq query heads, H KV heads, G = Hq / H, D head dim, N pages of a pool, P entries of a page.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dms_kernels.arguments import PagedKV, read_pages, seen_entries, state_lifetimes
from dms_kernels.quantization import quantize


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evicted: Tensor,
    start: Tensor | None,
    paged: PagedKV | None,
    *,
    window: int | Sequence[int],
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    last_position: Tensor | None = None,
) -> Tensor:
    """As `sparse_prefill`; float64 where q is, else float32."""
    B, Hq, T, D = q.shape
    H, S = k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    first = torch.zeros(B, dtype=torch.long, device=q.device) if start is None else start.long()
    query = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)
    there_BT1 = query >= first[:, None, None]
    near = (query - key <= window) | ~evicted[:, :, None] if isinstance(window, int) else _near(query - key, evicted, window)
    see_BHTS = (key <= query) & (key >= first[:, None, None, None]) & near
    # What padding left behind may be NaN.
    k, v = k.to(compute), v.to(compute).masked_fill(key[:, None] < first[:, None, None, None], 0.0)
    if paged is not None:
        page_k, page_v, held_BHK = read_pages(paged, compute)
        page_k, page_v = (x.masked_fill(~held_BHK[..., None], 0.0) for x in (page_k, page_v))
        k, v = torch.cat([page_k, k], 2), torch.cat([page_v, v], 2)
        held = held_BHK[:, :, None]
        if last_position is not None:
            held = seen_entries(paged, held_BHK, last_position[:, None] + (query[:, 0] - (S - 1)).int())
        see_BHTS = torch.cat([(held & there_BT1[:, None]), see_BHTS], 3)
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.reshape(B, H, Hq // H, T, D).to(compute), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    see = see_BHTS[:, :, None]
    scores = scores.masked_fill(~see, float("-inf"))
    sink = torch.full((Hq,), float("-inf"), device=q.device) if sink_logits is None else sink_logits
    sink = sink.to(compute).view(1, H, Hq // H, 1, 1).expand(B, -1, -1, T, 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    # A query that sees nothing is padding: softmax over nothing is NaN.
    out = torch.einsum("bhgts,bhsd->bhgtd", weights.masked_fill(~see, 0.0), v)
    out = out.masked_fill(~there_BT1[:, None, None], 0.0)
    return out.reshape(B, Hq, T, D).transpose(1, 2).to(q.dtype)


def _near(distance_TS: Tensor, state_BHS: Tensor, windows: Sequence[int]) -> Tensor:
    """[B, H, T, S] bool: no farther than entries in these states are visible."""
    return distance_TS <= state_lifetimes(tuple(windows), state_BHS.device)[state_BHS.long()][:, :, None]


def store_survivors_reference(k: Tensor, v: Tensor, keep: Tensor, paged: PagedKV, position: Tensor | None = None) -> None:
    """As `store_survivors`. Reads back how many there are."""
    P, K = paged.pages.shape[2], paged.num_lists
    if K > 1:
        keep = (keep[:, :, None] == torch.arange(1, K + 1, device=keep.device)[:, None]).flatten(1, 2)
    b, number, s = keep.nonzero(as_tuple=True)
    place = (paged.num_kept[..., None] + keep.cumsum(2) - 1)[b, number, s]
    page, entry, h = paged.page_table[b, number, place // P].long(), place % P, number // K
    if paged.positions is not None and position is not None:
        paged.positions[page, entry] = position[b, s]
    kv = torch.stack([k[b, h, s], v[b, h, s]], 1)
    if paged.page_scales is not None:
        kv, paged.page_scales[page, :, entry] = quantize(kv, paged.pages.dtype, 1)
    paged.pages[page, :, entry] = kv.to(paged.pages.dtype)

"""Many queries a head, as in prefill: blocks of queries over what they can see, and nothing else.

Of keys farther back than a block's windows only the kept ones are gathered, in order, so that their list needs no mask; the
masked part is the ring and a band of the block's length plus the window. The work is proportional to the visible pairs.
"""

import torch
import torch.nn.functional as F

_BLOCK = 512
# With capped scores or sink logits the softmax is written out, and holds its scores.
_BLOCK_EXPLICIT = 128
# A block's mask has a place for every key, and most of it is 0.
_MASK_ELEMENTS = 4 * 2**20


def attend_many(q, q_position, pages, recent, *, window: int, scale: float, softcap=None, sink_logits=None) -> torch.Tensor:
    """As `cached_attention`, over the last of `recent`, which holds the queries' own tokens, and one ring at most before it.

    Reads positions and decisions back from the device.
    """
    B, Hq, T, D = q.shape
    *rings, new = recent
    H = new.k.shape[1]
    G = Hq // H
    out = q.new_zeros(B, T, Hq, new.v.shape[-1])
    largest = _BLOCK if softcap is None and sink_logits is None else _BLOCK_EXPLICIT
    for b in range(B):
        here = new.position[b] >= 0
        key_at = here.nonzero()[:, 0]
        query_at = (q_position[b] >= 0).nonzero()[:, 0]
        if len(query_at) == 0:
            continue
        whole = len(key_at) == len(here)
        first = int(new.position[b, key_at[0]])
        # Place of the first query among the row's new tokens, which stand without gaps.
        offset = int(q_position[b, query_at[0]]) - first
        num_old = (rings[0].k.shape[2] if rings else 0) + (int(pages.num_kept[b].max()) if pages is not None else 0)
        num_keys = num_old + len(key_at)
        block = min(largest, max(16, _MASK_ELEMENTS // num_keys))
        mask = new.k.new_zeros(block, num_keys)
        for h in range(H):
            k, v, evicted = (x[b, h] if whole else x[b, h, key_at] for x in (new.k, new.v, new.evicted))
            kept_at = (~evicted).nonzero()[:, 0]
            kept_k, kept_v = k[kept_at], v[kept_at]
            page_k, page_v = (k[:0], v[:0]) if pages is None else _entries(pages, b, h, k.dtype)
            for start in range(0, len(query_at), block):
                at = query_at[start : start + block]
                lo, hi = offset + start, offset + start + len(at)
                band = max(0, lo - window)
                num_far = int(torch.searchsorted(kept_at, band))
                see = _see_band(lo, hi, band, evicted, window)
                ks, vs = [k[band:hi]], [v[band:hi]]
                if rings:
                    see = torch.cat([_see_ring(first + lo, len(at), rings[0], b, h, window), see], 1)
                    ks, vs = [rings[0].k[b, h], *ks], [rings[0].v[b, h], *vs]
                part = mask[: len(at), : see.shape[1] + num_far + len(page_k)]
                # What follows the masked part stays 0.
                part[:, : see.shape[1]].masked_fill_(~see, float("-inf"))
                keys, values = torch.cat([*ks, page_k, kept_k[:num_far]]), torch.cat([*vs, page_v, kept_v[:num_far]])
                queries = q[b, h * G : (h + 1) * G, at[0] : at[-1] + 1] if at[-1] - at[0] + 1 == len(at) else q[b, h * G : (h + 1) * G, at]
                queries = queries.to(keys.dtype)
                if softcap is None and sink_logits is None:
                    shape = (1, G, *keys.shape)
                    y = F.scaled_dot_product_attention(
                        queries[None], keys[None, None].expand(shape), values[None, None].expand(1, G, *values.shape), part, scale=scale
                    )[0]
                else:
                    sinks = None if sink_logits is None else sink_logits[h * G : (h + 1) * G]
                    y = _explicit(queries, keys, values, part, scale, softcap, sinks)
                out[b, at, h * G : (h + 1) * G] = y.transpose(0, 1).to(out.dtype)
                mask[: len(at), : see.shape[1]] = 0
    return out


def _entries(pages, b: int, h: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept entries of one head, [n, D] each."""
    num_kept, P = int(pages.num_kept[b, h]), pages.pages.shape[2]
    table = pages.page_table[b, h, : -(-num_kept // P)].long()
    taken = pages.pages[table]
    if pages.scales is not None:
        taken = (taken * pages.scales[table][..., None]).to(dtype)
    return taken[:, 0].flatten(0, 1)[:num_kept], taken[:, 1].flatten(0, 1)[:num_kept]


def _see_band(lo: int, hi: int, band: int, evicted: torch.Tensor, window: int) -> torch.Tensor:
    """[queries, keys] bool of the queries lo..hi and the keys band..hi of one row's new tokens."""
    query = torch.arange(lo, hi, device=evicted.device)[:, None]
    key = torch.arange(band, hi, device=evicted.device)
    return (key <= query) & ((query - key <= window) | ~evicted[band:hi])


def _see_ring(position: int, num_queries: int, ring, b: int, h: int, window: int) -> torch.Tensor:
    query = torch.arange(position, position + num_queries, device=ring.k.device)[:, None]
    key = ring.position[b]
    return (key >= 0) & ((query - key <= window) | ~ring.evicted[b, h])


def _explicit(q_GCD, k_SD, v_SD, mask_CS, scale: float, softcap, sinks_G) -> torch.Tensor:
    compute = torch.promote_types(q_GCD.dtype, torch.float32)
    scores = torch.matmul(q_GCD.to(compute), k_SD.to(compute).T) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    scores += mask_CS
    top = scores.amax(-1, keepdim=True)
    if sinks_G is not None:
        sink = sinks_G.to(compute)[:, None, None]
        top = torch.maximum(top, sink)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks_G is not None:
        total = total + (sink - top).exp()
    return torch.matmul(weights, v_SD.to(compute)) / total

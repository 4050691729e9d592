"""One decoding step of one layer's cache in plain PyTorch, on any device."""

import torch

_RMS_EPS = 1e-6
EVICT, UNDECIDED = 1, 2


def reference(
    k, v, evict, *, ring_kv, ring_state, seq_len, num_kept, page_table, pages, references, free, num_free, evicted, decided, overflow,
    ticket, window, sinks=0, alignment="own", real=None, q=None, cos=None, sin=None, q_norm=None, k_norm=None, norm_eps=1e-6, hidden=None,
    gate_weight=None, gate_bias=None, gate_scale=1.0, gate_offset=0.0, gate_normalize=False, evict_bias=0.0, page_scales=None,
):  # fmt: skip
    """As `append`. Pages are taken in the order of rows, then heads."""
    B, H, D = k.shape
    row = torch.arange(B, device=k.device)
    length = seq_len.long()
    slot = length % (window + 1)
    fits = slot < ring_kv.shape[3]
    present = torch.ones_like(fits) if real is None else real
    overflow |= (present & ~fits).any().to(overflow.dtype)
    present, slot = present & fits, torch.where(fits, slot, 0)
    if hidden is not None:
        evict = gate_logits(hidden, gate_weight, gate_bias, gate_scale, gate_offset, gate_normalize).expand(B, H) + evict_bias > 0
    if alignment == "next":
        rules = present & (length > 0)
        last = (length - 1).clamp(min=0) % (window + 1)
        last = torch.where(fits, last, 0)
        ruled = (evict & (length > sinks)[:, None]).to(torch.uint8)
        ring_state[row, :, last] = torch.where(rules[:, None], ruled, ring_state[row, :, last])
        state = torch.full((B, H), UNDECIDED, dtype=torch.uint8, device=k.device)
    else:
        rules = present
        state = (evict & (length >= sinks)[:, None]).to(torch.uint8)
    evicted += evict & rules[:, None]
    decided += rules

    leaves = (present & (length > window))[:, None] & (ring_state[row, :, slot] != EVICT)
    _store(leaves, ring_kv[row, :, :, slot], num_kept, page_table, pages, references, free, num_free, overflow, page_scales)

    new_k = rotate(norm(k, k_norm, norm_eps), cos, sin).to(k.dtype)
    kv = torch.stack([new_k, v], 2).to(ring_kv.dtype)
    ring_kv[row, :, :, slot] = torch.where(present[:, None, None, None], kv, ring_kv[row, :, :, slot])
    ring_state[row, :, slot] = torch.where(present[:, None], state, ring_state[row, :, slot])
    seq_len += present
    return None if q is None else rotate(norm(q, q_norm, norm_eps), cos, sin).to(q.dtype)


def _store(leaves_BH, kv_BH2D, num_kept, page_table, pages, references, free, num_free, overflow, page_scales) -> None:
    """Append what leaves the ring to pages; where no page is left it is lost, and overflow says so."""
    P, max_pages = pages.shape[2], page_table.shape[2]
    place, entry = num_kept.long() // P, num_kept.long() % P
    room = leaves_BH & (place < max_pages)
    wanted = room & (entry == 0)
    rank = wanted.flatten().cumsum(0).view_as(wanted)
    given = wanted & (rank <= num_free)
    b, h = given.nonzero(as_tuple=True)
    page = free[num_free - rank[b, h]]
    page_table[b, h, place[b, h]] = page
    references[page.long()] = 1
    num_free -= len(b)
    stored = room & (given | (entry > 0))
    overflow |= (leaves_BH & ~stored).any().to(overflow.dtype)
    b, h = stored.nonzero(as_tuple=True)
    page, entry, kv = page_table[b, h, place[b, h]].long(), entry[b, h], kv_BH2D[b, h]
    if page_scales is not None:
        kv, scale = quantize(kv, pages.dtype)
        page_scales[page, :, entry] = scale
    pages[page, :, entry] = kv.to(pages.dtype)
    num_kept += stored


def quantize(x, dtype: torch.dtype):
    """Numbers [..., D] as dtype (int8 or float8_e4m3fn) and their scales [...] float32: the largest becomes the dtype's largest."""
    most = 127.0 if dtype == torch.int8 else 448.0
    x = x.float()
    scale = x.abs().amax(-1) / most
    x = x * (1.0 / torch.where(scale > 0, scale, 1.0))[..., None]
    if dtype == torch.int8:
        x = torch.floor(x + 0.5)
    return x.clamp(-most, most).to(dtype), scale


def gate_logits(hidden, weight, bias, scale: float, offset: float, normalize: bool):
    """[B, H or 1] float32."""
    x = hidden.float()
    if normalize:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _RMS_EPS)
    return scale * torch.nn.functional.linear(x, weight.float(), bias.float()) - offset


def norm(x, weight, eps: float):
    """RMSNorm over the head dim, rounded to x's dtype before the weight, as transformers' models do."""
    if weight is None:
        return x
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding of the first dims of x [B, heads, D] in halves; cos, sin [B or 1, rot]."""
    if cos is None:
        return x
    rot = cos.shape[-1]
    turning, rest = x[..., :rot], x[..., rot:]
    half = torch.cat([-turning[..., rot // 2 :], turning[..., : rot // 2]], -1)
    turned = turning * cos[:, None] + half * sin[:, None]
    return torch.cat([turned, rest.to(turned.dtype)], -1)

"""Paged decode in plain PyTorch, on any device and in float64 too: everything gathered, one softmax."""

import torch


def reference(
    q, ring_kv, ring_state, seq_len, pages, page_table, num_kept, *, window, scale, softcap=None, sink_logits=None, q_position=None,
    real=None, new_k=None, new_v=None, new_position=None, new_state=None, last_state=None, page_scales=None,
):  # fmt: skip
    """As `paged_decode`, and reads nothing back from the device."""
    B, Hq, T, D = q.shape
    H, num_slots = ring_kv.shape[1], ring_kv.shape[3]
    compute = torch.promote_types(q.dtype, torch.float32)
    end = seq_len[:, None] - 1
    if q_position is None:
        q_position = end if real is None else torch.where(real[:, None], end, -1)
    slot = torch.arange(num_slots, dtype=torch.int32, device=q.device)
    size = (window + 1) if num_slots > window else num_slots
    position = torch.where(slot < seq_len[:, None].clamp(max=size), end - (end - slot) % (window + 1), -1)
    state = ring_state
    if last_state is not None:
        here = (position == end) & (end >= 0)
        state = torch.where(here[:, None] & (last_state != 2)[..., None], last_state[..., None], state)
    ks, vs, sees = [ring_kv[:, :, 0]], [ring_kv[:, :, 1]], [_visible(q_position, position, state, window)]
    if new_k is not None:
        ks, vs = [*ks, new_k], [*vs, new_v]
        sees.append(_visible(q_position, new_position, new_state, window))
    if pages is not None:
        k, v, there = _gather(pages, page_table, num_kept, page_scales, compute)
        ks, vs = [*ks, k], [*vs, v]
        sees.append(there[:, :, None] & (q_position >= 0)[:, None, :, None])
    see = torch.cat(sees, 3)[:, :, None]
    # What nobody may read may be anything, and 0 times NaN is NaN.
    alive = see.any(3)[..., 0, :, None]
    k, v = (torch.cat([x.to(compute) for x in xs], 2).masked_fill(~alive, 0.0) for xs in (ks, vs))
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.reshape(B, H, Hq // H, T, D).to(compute), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see, float("-inf"))
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, H, Hq // H, 1, 1).expand(B, -1, -1, T, 1)
        scores = torch.cat([scores, sink], -1)
    # Softmax over nothing is NaN.
    weights = scores.softmax(-1)[..., : see.shape[-1]].masked_fill(~see, 0.0)
    return torch.einsum("bhgts,bhsd->bhgtd", weights, v).reshape(B, Hq, T, D).transpose(1, 2).to(q.dtype)


def _visible(q_position, position, state, window: int) -> torch.Tensor:
    """[B, H, T, S] bool."""
    distance = q_position[:, :, None] - position[:, None, :]
    causal = (distance >= 0) & (position >= 0)[:, None]
    return causal[:, None] & ((distance <= window)[:, None] | (state != 1)[:, :, None])


def _gather(pages, page_table, num_kept, page_scales, compute: torch.dtype):
    """k and v [B, H, S, D] of all that the table lists, and which of it are entries [B, H, S]."""
    B, H, max_pages = page_table.shape
    P, D = pages.shape[2:]
    there = torch.arange(max_pages * P, device=pages.device) < num_kept[..., None]
    # Places behind the last page may hold any number.
    used = torch.arange(max_pages, device=pages.device) * P < num_kept[..., None]
    at = page_table.long().masked_fill(~used, 0)
    taken = pages[at].to(compute)
    if page_scales is not None:
        taken = taken * page_scales[at].to(compute)[..., None]
    k, v = (taken[:, :, :, i].reshape(B, H, max_pages * P, D) for i in (0, 1))
    return k, v, there

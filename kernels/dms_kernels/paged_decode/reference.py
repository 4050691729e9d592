"""Paged decode in plain PyTorch, on any device and in float64 too: everything gathered, one softmax."""

import torch
from torch import Tensor

from dms_kernels.arguments import PagedKV, PendingKV, Ring, in_slots, read_pages, seen_entries, state_lifetimes


def reference(
    q: Tensor,
    ring: Ring,
    paged: PagedKV | None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_position: Tensor | None = None,
    real: Tensor | None = None,
    pending: PendingKV | None = None,
    last_state: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """As `paged_decode`, and reads nothing back from the device."""
    ring, paged = in_slots(slot, ring, paged)
    B, Hq, T, D = q.shape
    H, num_slots, window = ring.kv.shape[1], ring.kv.shape[3], ring.window
    compute = torch.promote_types(q.dtype, torch.float32)
    end = ring.seq_len[:, None] - 1
    if q_position is None:
        q_position = end if real is None else torch.where(real[:, None], end, -1)
    slot = torch.arange(num_slots, dtype=torch.int32, device=q.device)
    size = (window + 1) if num_slots > window else num_slots
    position = torch.where(slot < ring.seq_len[:, None].clamp(max=size), end - (end - slot) % (window + 1), -1)
    state = ring.state
    if last_state is not None:
        here = (position == end) & (end >= 0)
        state = torch.where(here[:, None] & (last_state != 2)[..., None], last_state[..., None], state)
    ks, vs, sees = [ring.kv[:, :, 0]], [ring.kv[:, :, 1]], [_visible(q_position, position, state, ring.windows)]
    if pending is not None:
        ks, vs = [*ks, pending.k], [*vs, pending.v]
        sees.append(_visible(q_position, pending.position, pending.state, ring.windows))
    if paged is not None:
        k, v, there = read_pages(paged, compute)
        ks, vs = [*ks, k], [*vs, v]
        sees.append(seen_entries(paged, there, q_position) & (q_position >= 0)[:, None, :, None])
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


def _visible(q_position: Tensor, position: Tensor, state: Tensor, windows: tuple[int, ...]) -> Tensor:
    """[B, H, T, S] bool."""
    distance = q_position[:, :, None] - position[:, None, :]
    causal = (distance >= 0) & (position >= 0)[:, None]
    # A ring's slots that nobody has written may hold any state.
    lifetime = state_lifetimes(windows, state.device)[state.long().clamp(max=len(windows) + 1)]
    return causal[:, None] & (distance[:, None] <= lifetime[:, :, None])

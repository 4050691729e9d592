"""Plain attention over everything at once, on any device, in float64 too: what the faster routes are held to."""

import torch


def visible(q_position, keys, window: int) -> torch.Tensor:
    """[B, H or 1, T, S or 1] bool."""
    if keys.all_visible:
        return (q_position >= 0)[:, None, :, None]
    distance = q_position[:, :, None] - keys.position[:, None, :]
    causal = (distance >= 0) & (keys.position[:, None, :] >= 0)
    return causal[:, None] & ((distance <= window)[:, None] | ~keys.evicted[:, :, None, :])


def gather_pages(pages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v [B, H, S, D] of all table slots, and which of them hold an entry [B, H, S] bool."""
    B, H, max_pages = pages.page_table.shape
    P, D = pages.pages.shape[2:]
    table = pages.page_table.clamp(min=0).long()
    taken = pages.pages[table]
    if pages.scales is not None:
        taken = taken * pages.scales[table][..., None]
    k, v = (taken[:, :, :, i].reshape(B, H, max_pages * P, D) for i in (0, 1))
    there = torch.arange(max_pages * P, device=k.device) < pages.num_kept[..., None]
    return k, v, there


def reference(q, q_position, pages, recent, *, window: int, scale: float, softcap=None, sink_logits=None) -> torch.Tensor:
    """As `cached_attention`."""
    B, Hq, T, D = q.shape
    H = recent[0].k.shape[1]
    ks, vs, sees = [], [], []
    if pages is not None:
        k, v, there = gather_pages(pages)
        ks, vs = [k], [v]
        sees = [(there[:, :, None, :] & (q_position >= 0)[:, None, :, None]).expand(B, H, T, k.shape[2])]
    for keys in recent:
        ks, vs = [*ks, keys.k], [*vs, keys.v]
        sees.append(visible(q_position, keys, window).expand(B, H, T, keys.k.shape[2]))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, see = torch.cat(ks, 2).to(compute), torch.cat(vs, 2).to(compute), torch.cat(sees, 3)[:, :, None]
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.reshape(B, H, Hq // H, T, D).to(compute), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see, float("-inf"))
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, H, Hq // H, 1, 1).expand(B, -1, -1, T, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    # A row without keys is padding: softmax over nothing is NaN.
    out = torch.einsum("bhgts,bhsd->bhgtd", weights.masked_fill(~see, 0.0), v)
    out = out * (q_position >= 0)[:, None, None, :, None]
    return out.reshape(B, Hq, T, -1).transpose(1, 2).to(q.dtype)

"""One decoding step of one layer's cache in plain PyTorch, on any device."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dms_kernels.arguments import Counters, FreePages, GateInputs, NewToken, PagedKV, Ring, in_slots
from dms_kernels.quantization import quantize

_RMS_EPS = 1e-6
KEEP, EVICT, UNDECIDED = 0, 1, 2


def reference(
    token: NewToken,
    ring: Ring,
    paged: PagedKV,
    free_pages: FreePages,
    counters: Counters,
    *,
    sinks: int = 0,
    alignment: str = "own",
    release_gone: bool = True,
    slot: Tensor | None = None,
) -> Tensor | None:
    """As `append`. Pages are given back before others are taken, in the order of sequences, then heads and their lists."""
    if slot is not None:
        return _in_slots(token, ring, paged, free_pages, counters, slot, sinks=sinks, alignment=alignment, release_gone=release_gone)
    B, H, D = token.k.shape
    windows = ring.windows
    row = torch.arange(B, device=token.k.device)
    length = ring.seq_len.long()
    slot = length % (ring.window + 1)
    fits = slot < ring.kv.shape[3]
    present = torch.ones_like(fits) if token.real is None else token.real
    counters.overflow.logical_or_((present & ~fits).any())
    present, slot = present & fits, torch.where(fits, slot, 0)
    if isinstance(token.evict, Tensor):
        evict = token.evict
    elif len(windows) == 1:
        evict = gate_logits(token.evict).expand(B, H) + token.evict.evict_bias > 0
    else:
        evict = gate_logits(token.evict).unflatten(1, (-1, len(windows))).expand(B, H, -1) + token.evict.evict_bias > 0
    decision = evict.to(torch.uint8) if len(windows) == 1 else first_to_evict(evict)
    if alignment == "next":
        decides = present & (length > 0)
        last = (length - 1).clamp(min=0) % (ring.window + 1)
        last = torch.where(fits, last, 0)
        last_state = decision * (length > sinks)[:, None]
        ring.state[row, :, last] = torch.where(decides[:, None], last_state, ring.state[row, :, last])
        state = torch.full((B, H), UNDECIDED, dtype=torch.uint8, device=row.device)
    else:
        decides = present
        state = decision * (length >= sinks)[:, None]
    counters.evicted.add_((decision != 0) & decides[:, None])
    counters.decided.add_(decides)

    leaving = ring.state[row, :, slot]
    leaves = (present & (length > ring.window))[:, None] & (leaving != EVICT)
    if len(windows) > 1:
        if release_gone:
            _expire(present, length, windows, paged, free_pages)
        chosen = (leaving.int() - 2).clamp(min=0)
        leaves = (leaves[..., None] & (chosen[..., None] == torch.arange(len(windows), device=row.device))).flatten(1)
    _store(leaves, ring.kv[row, :, :, slot], length - ring.window - 1, paged, free_pages, counters.overflow)

    new_k = rotate(norm(token.k, token.k_norm, token.norm_eps), token.cos, token.sin).to(token.k.dtype)
    kv = torch.stack([new_k, token.v], 2).to(ring.kv.dtype)
    ring.kv[row, :, :, slot] = torch.where(present[:, None, None, None], kv, ring.kv[row, :, :, slot])
    ring.state[row, :, slot] = torch.where(present[:, None], state, ring.state[row, :, slot])
    ring.seq_len.add_(present)
    return None if token.q is None else rotate(norm(token.q, token.q_norm, token.norm_eps), token.cos, token.sin).to(token.q.dtype)


def _in_slots(
    token: NewToken, ring: Ring, paged: PagedKV, free_pages: FreePages, counters: Counters, slot: Tensor, **how: Any
) -> Tensor | None:
    """On copies of the rows that are used, which are written back."""
    here_ring, here_paged = in_slots(slot, ring, paged)
    assert here_paged is not None, "there are pages"
    row, there = slot.clamp(min=0), slot >= 0
    here = replace(counters, evicted=counters.evicted.index_select(0, row), decided=counters.decided.index_select(0, row))
    real = there if token.real is None else there & token.real
    rotated = reference(replace(token, real=real), here_ring, here_paged, free_pages, here, **how)
    used = row[there].long()
    for changed, kept in (
        (here_ring.kv, ring.kv),
        (here_ring.state, ring.state),
        (here_ring.seq_len, ring.seq_len),
        (here_paged.page_table, paged.page_table),
        (here_paged.num_kept, paged.num_kept),
        (here.evicted, counters.evicted),
        (here.decided, counters.decided),
    ):
        kept[used] = changed[there]
    return rotated


def first_to_evict(evict: Tensor) -> Tensor:
    """Decisions [..., K] bool, one a window -> [...] uint8, the state of a token: 0 where none evicts, 1 where the first does, else c + 1
    of the first, the c-th."""
    number = torch.arange(evict.shape[-1], device=evict.device)
    first = torch.where(evict, number, evict.shape[-1]).amin(-1)
    return torch.where(first == 0, EVICT, (first + 2).masked_fill(first == evict.shape[-1], KEEP)).to(torch.uint8)


def _expire(present: Tensor, length: Tensor, windows: Sequence[int], paged: PagedKV, free_pages: FreePages) -> None:
    """Give back the front page of each finite list whose entries are all gone for the token that comes, at position `length`."""
    P, K = paged.pages.shape[2], len(windows)
    positions, table = _positions(paged), paged.page_table
    for b, number in (present[:, None] & (paged.num_kept > 0)).nonzero().tolist():
        page, filled = int(table[b, number, 0]), min(P, int(paged.num_kept[b, number]))
        if number % K == 0 or length[b] - positions[page, filled - 1] <= windows[number % K]:
            continue
        table[b, number, :-1] = table[b, number, 1:].clone()
        paged.num_kept[b, number] -= filled
        free_pages.references[page] -= 1
        if free_pages.references[page] == 0:
            free_pages.free[free_pages.num_free] = page
            free_pages.num_free.add_(1)


def _positions(paged: PagedKV) -> Tensor:
    if paged.positions is None:
        raise ValueError("pages of several windows come with the positions of their entries")
    return paged.positions


def _store(leaves_BL: Tensor, kv_BH2D: Tensor, position_B: Tensor, paged: PagedKV, free_pages: FreePages, overflow: Tensor) -> None:
    """Append what leaves the ring to lists of pages, L = H * K; where no page is left it is lost, and `overflow` says so."""
    P, max_pages = paged.pages.shape[2], paged.page_table.shape[2]
    place, entry = paged.num_kept.long() // P, paged.num_kept.long() % P
    room = leaves_BL & (place < max_pages)
    wanted = room & (entry == 0)
    rank = wanted.flatten().cumsum(0).view_as(wanted)
    given = wanted & (rank <= free_pages.num_free)
    b, number = given.nonzero(as_tuple=True)
    page = free_pages.free[free_pages.num_free - rank[b, number]]
    paged.page_table[b, number, place[b, number]] = page
    free_pages.references[page.long()] = 1
    free_pages.num_free.sub_(len(b))
    stored = room & (given | (entry > 0))
    overflow.logical_or_((leaves_BL & ~stored).any())
    b, number = stored.nonzero(as_tuple=True)
    h = number // (leaves_BL.shape[1] // kv_BH2D.shape[1])
    page, entry, kv = paged.page_table[b, number, place[b, number]].long(), entry[b, number], kv_BH2D[b, h]
    if paged.page_scales is not None:
        kv, paged.page_scales[page, :, entry] = quantize(kv, paged.pages.dtype, 1)
    paged.pages[page, :, entry] = kv.to(paged.pages.dtype)
    if paged.positions is not None:
        paged.positions[page, entry] = position_B[b].int()
    paged.num_kept.add_(stored)


def gate_logits(gate: GateInputs) -> Tensor:
    """[B, H or 1] float32, without evict_bias."""
    x = gate.hidden.float()
    if gate.normalize:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _RMS_EPS)
    return gate.scale * torch.nn.functional.linear(x, gate.weight.float(), gate.bias.float()) - gate.offset


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the head dim, rounded to x's dtype before the weight, as transformers' models do."""
    if weight is None:
        return x
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary embedding of the first dims of x [B, heads, D] in halves; cos, sin [B or 1, rot]."""
    if cos is None or sin is None:
        return x
    rot = cos.shape[-1]
    turning, rest = x[..., :rot], x[..., rot:]
    half = torch.cat([-turning[..., rot // 2 :], turning[..., : rot // 2]], -1)
    turned = turning * cos[:, None] + half * sin[:, None]
    return torch.cat([turned, rest.to(turned.dtype)], -1)

"""The Triton kernel of `append`, its launch parameters, and the custom operator.

Shapes: B batch, H KV heads, G query heads of each, D head dim, R ring slots, N pages of a pool, P entries of a page, M model dim, K
windows (KP: padded to a power of 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dms_kernels import dispatch
from dms_kernels.arguments import Counters, FreePages, GateInputs, NewToken, PagedKV, Ring, expect_contiguous, strides, with_dense_rows
from dms_kernels.launching import CachedLaunch, Launch, on_device_of, specialization
from dms_kernels.packing import group_of, scales_of, store_packed

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

_MOST_BLOCK = 4096


@dataclass(frozen=True)
class AppendLaunch:
    """How the kernel is launched."""

    block: int
    """elements of the hidden state that are multiplied by the gate's weights at a time"""
    num_warps: int


def launch(*, M: int, group: int, dim: int, num_logits: int = 1) -> AppendLaunch:
    """M: of the hidden state, 0 where there is no gate. group and dim: query heads of a KV head and head dim, padded, as num_logits, the
    gate's logits of a head, is."""
    if M:
        return AppendLaunch(block=min(max(16, _MOST_BLOCK // num_logits), dispatch.padded(M)), num_warps=4)
    # One warp has nobody to wait for; the gate's product wants more.
    return AppendLaunch(block=16, num_warps=max(1, min(4, group * dim // 512)))


@triton.jit
def _gate_logit(hidden, weight, bias, M, scale, offset, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """scale * (x w + b) - offset in float32, x divided by its RMS first under NORMALIZE."""
    product = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + at, mask=at < M, other=0.0).to(tl.float32)
        product += x * tl.load(weight + at, mask=at < M, other=0.0).to(tl.float32)
        square += x * x
    logit = tl.sum(product, 0)
    if NORMALIZE:
        logit *= tl.rsqrt(tl.sum(square, 0) / M + 1e-6)
    return scale * (logit + tl.load(bias).to(tl.float32)) - offset


@triton.jit
def _gate_logits(
    hidden, weight, bias, M, scale, offset, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr
):  # fmt: skip
    """As `_gate_logit`, of a head's K rows of weight [K, M] -> [KP] float32; anything behind the first K."""
    j = tl.arange(0, KP)
    product = tl.zeros([KP, BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + at, mask=at < M, other=0.0).to(tl.float32)
        rows = tl.load(weight + j[:, None] * M + at[None, :], mask=(j < K)[:, None] & (at < M)[None, :], other=0.0)
        product += x[None, :] * rows.to(tl.float32)
        square += x * x
    logits = tl.sum(product, 1)
    if NORMALIZE:
        logits *= tl.rsqrt(tl.sum(square, 0) / M + 1e-6)
    return scale * (logits + tl.load(bias + j, mask=j < K, other=0.0).to(tl.float32)) - offset


@triton.jit
def _rounded(x, like, ROUNDS: tl.constexpr):
    """Through the dtype of `like` where PyTorch, one operation at a time, would go through it."""
    if ROUNDS:
        x = x.to(like).to(tl.float32)
    return x


@triton.jit
def _rotate(
    rows, there, norm, cos, sin, eps,
    D: tl.constexpr, DP: tl.constexpr, ROT: tl.constexpr, NORM: tl.constexpr, NORM_ROUNDS: tl.constexpr, ROPE_ROUNDS: tl.constexpr,
):  # fmt: skip
    """RMSNorm over D, then rotation of the first ROT dims in halves, of what lies at rows [n] of pointers -> [n, DP] float32.

    A weight, or angles, of a wider dtype than x's leave the product in float32: NORM_ROUNDS and ROPE_ROUNDS are False then.
    """
    dim = tl.arange(0, DP)
    # The other half of the pair that dim rotates in; the rest stands still.
    partner = tl.where(dim < ROT // 2, dim + ROT // 2, tl.where(dim < ROT, dim - ROT // 2, dim))
    mask = there[:, None] & (dim < D)[None, :]
    x = tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if ROT > 0:
        other = tl.load(rows[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        weight = tl.load(norm + dim, mask=dim < D, other=0.0).to(tl.float32)[None, :]
        x = _rounded(x * factor, dtype, True)
        x = _rounded(x * weight, dtype, NORM_ROUNDS)
        if ROT > 0:
            weight = tl.load(norm + partner, mask=dim < D, other=0.0).to(tl.float32)[None, :]
            other = _rounded(other * factor, dtype, True)
            other = _rounded(other * weight, dtype, NORM_ROUNDS)
    if ROT > 0:
        c = tl.load(cos + dim, mask=dim < ROT, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sin + dim, mask=dim < ROT, other=0.0).to(tl.float32)[None, :]
        other = tl.where(dim < ROT // 2, -1.0, 1.0)[None, :] * other
        x = _rounded(x * c, dtype, NORM_ROUNDS and ROPE_ROUNDS) + _rounded(other * s, dtype, NORM_ROUNDS and ROPE_ROUNDS)
    return x


@triton.jit
def _quantize(x, dtype: tl.constexpr):
    """One token's numbers [1, DP] as dtype, and their scale."""
    x = x.to(tl.float32)
    if dtype == tl.int8:
        most = 127.0
    else:
        most = 448.0
    scale = tl.max(tl.abs(x)) / most
    x = x * (1.0 / tl.where(scale > 0, scale, 1.0))
    if dtype == tl.int8:
        x = tl.floor(x + 0.5)
    x = tl.minimum(tl.maximum(x, -most), most)
    return x.to(dtype), scale


@triton.jit
def _write_entry(row, scales, scale_at, x, dim, D: tl.constexpr, DP: tl.constexpr, QUANTIZED: tl.constexpr, GROUP: tl.constexpr):
    """x [1, DP] as an entry of pages that begins at `row`; of its scales the first is number scale_at."""
    if GROUP > 0:
        one = tl.arange(0, 1)
        store_packed(row + one, scales + scale_at + one, x, one == 0, D, DP, GROUP)
    elif QUANTIZED:
        numbers, scale = _quantize(x, row.dtype.element_ty)
        tl.store(row + dim[None, :], numbers, mask=(dim < D)[None, :])
        tl.store(scales + scale_at, scale)
    else:
        tl.store(row + dim[None, :], x, mask=(dim < D)[None, :])


@triton.jit
def _take_page(place, entry, table_row, max_pages, references, free, num_free):
    """Number of the page that entry `entry` of the head's page `place` goes to, taken from the free ones where it is the
    page's first; -1: there is none."""
    page = -1
    if place < max_pages:
        if entry == 0:
            top = tl.atomic_add(num_free, -1) - 1
            if top >= 0:
                page = tl.load(free + top)
                tl.store(references + page, 1)
                tl.store(table_row + place, page)
            else:
                tl.atomic_add(num_free, 1)
        else:
            page = tl.load(table_row + place)
    return page


@triton.jit
def _lock(lock):
    """Wait until no other program has pages in hand: a page that is given back and one that is taken at once would meet on the stack."""
    while tl.atomic_cas(lock, 0, 1, sem="acquire", scope="gpu") != 0:
        pass
    tl.debug_barrier()


@triton.jit
def _unlock(lock):
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release", scope="gpu")


@triton.jit
def _take_page_locked(place, entry, table_row, max_pages, references, free, num_free, lock):
    """As `_take_page`, where other programs may give pages back."""
    page = -1
    if place < max_pages:
        if entry == 0:
            _lock(lock)
            # Around the first-level cache, which does not see what other processors write.
            top = tl.load(num_free, cache_modifier=".cg") - 1
            if top >= 0:
                page = tl.load(free + top, cache_modifier=".cg")
                tl.debug_barrier()
                tl.store(num_free, top)
                tl.store(references + page, 1)
                tl.store(table_row + place, page)
            _unlock(lock)
        else:
            page = tl.load(table_row + place)
    return page


@triton.jit
def _release_front(table_row, num_pages, references, free, num_free, lock, CHUNK: tl.constexpr):
    """Give back a list's oldest page, and move its row of the table left by one place."""
    page = tl.load(table_row)
    at = tl.arange(0, CHUNK)
    for start in range(0, num_pages - 1, CHUNK):
        there = start + at < num_pages - 1
        moved = tl.load(table_row + start + at + 1, mask=there, other=0)
        tl.debug_barrier()
        tl.store(table_row + start + at, moved, mask=there)
        tl.debug_barrier()
    _lock(lock)
    left = tl.load(references + page, cache_modifier=".cg") - 1
    top = tl.load(num_free, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(references + page, left)
    if left == 0:
        tl.store(free + top, page)
        tl.store(num_free, top + 1)
    _unlock(lock)


@triton.jit
def _expire(
    table_rows, num_kept, positions, newest, max_pages, references, free, num_free, lock,
    WINDOWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Release the front page of each of a head's finite lists whose entries are all gone for the token at `newest`. A list loses one
    entry a token at most, and so one page. table_rows, num_kept: those of the head's first list."""
    c = tl.arange(0, KP)
    window = tl.zeros([KP], tl.int32)
    for j in tl.static_range(1, K):
        window = tl.where(c == j, WINDOWS[j], window)
    kept = tl.load(num_kept + c, mask=(c > 0) & (c < K), other=0)
    front = tl.load(table_rows + c * max_pages, mask=kept > 0, other=0)
    youngest = tl.load(positions + front.to(tl.int64) * P + tl.minimum(kept, P) - 1, mask=kept > 0, other=0)
    gone = (kept > 0) & (newest - youngest > window)
    if tl.sum(gone.to(tl.int32), 0) > 0:
        for j in tl.static_range(1, K):
            if tl.sum(((c == j) & gone).to(tl.int32), 0) > 0:
                have = tl.sum(tl.where(c == j, kept, 0), 0)
                _release_front(table_rows + j * max_pages, (have + P - 1) // P, references, free, num_free, lock, 64)
                tl.store(num_kept + j, tl.maximum(have - P, 0))


# These change while a cache grows, and what is compiled should not.
@triton.jit(do_not_specialize=["num_slots", "max_pages"])
def append_kernel(
    k, v, evict, real, slots, q, rotated, cos, sin, q_norm, k_norm, hidden, gate_weight, gate_bias,
    ring, ring_state, seq_len, num_kept, table, pages, scales, positions, references, free, num_free, evicted, decided, overflow, ticket, lock,
    k_stride_b, k_stride_h, v_stride_b, v_stride_h, evict_stride_b, evict_stride_h, q_stride_b, q_stride_h,
    cos_stride_b, sin_stride_b, hidden_stride_b, weight_stride_h, bias_stride_h,
    num_slots, window, sinks, max_pages, M, eps, gate_scale, gate_offset, evict_bias,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROT: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr, SLOTS: tl.constexpr, QUERY: tl.constexpr, NEXT: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_ROUNDS: tl.constexpr, K_ROUNDS: tl.constexpr, ROPE_ROUNDS: tl.constexpr,
    QUANTIZED: tl.constexpr, GROUP: tl.constexpr, WINDOWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Grid (H, B). States: 0 keep, 1 evict, 2 undecided, c + 1 for class c > 1. WINDOWS: all K of them where there are several. Row `row` of the
    state is that of sequence b. GROUP: beside pages of int4, as in `packing`; else 0."""
    # Of an entry in pages.
    WIDTH: tl.constexpr = D // 2 if GROUP > 0 else D
    SCALES: tl.constexpr = D // GROUP if GROUP > 0 else 1
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b
    if SLOTS:
        row = tl.load(slots + b).to(tl.int64)
    in_slot = row >= 0
    row = tl.maximum(row, 0)
    head = row * H + h
    dim = tl.arange(0, DP)
    within = (dim < D)[None, :]
    one = tl.arange(0, 1)
    ring_k = ring + head * 2 * num_slots * D
    state_row = ring_state + head * num_slots
    table_row = table + head * (K * max_pages)

    # What was there before, all of it before anything is changed.
    length = tl.load(seq_len + row)
    if K == 1:
        kept = tl.load(num_kept + head)
    evicted_before = tl.load(evicted + head)
    decided_before = tl.load(decided + row)
    present = in_slot & (length >= 0)
    if REAL:
        present = present & (tl.load(real + b) != 0)
    slot, last = length % (window + 1), tl.maximum(length - 1, 0) % (window + 1)
    fits = slot < num_slots
    if present & (fits == 0):
        tl.atomic_max(overflow, 1)
    present = present & fits
    leaves = present & (length > window)
    leaving_state = tl.load(state_row + slot, mask=leaves, other=1).to(tl.int32)
    slot_k = ring_k + slot * D + (one * num_slots)[:, None] + dim[None, :]
    slot_v = slot_k + num_slots * D
    leaving = (dim < tl.where(leaves, D, 0))[None, :]
    leaving_k = tl.load(slot_k, mask=leaving, other=0.0)
    leaving_v = tl.load(slot_v, mask=leaving, other=0.0)

    # The gate. `evicts` is the state that it decides on.
    if K > 1:
        j = tl.arange(0, KP)
        if GATE:
            logits = _gate_logits(
                hidden + b * hidden_stride_b, gate_weight + h * weight_stride_h, gate_bias + h * bias_stride_h, M, gate_scale, gate_offset,
                NORMALIZE, BLOCK, K, KP,
            )  # fmt: skip
            evicted_by = (logits + evict_bias > 0) & (j < K)
        else:
            evicted_by = tl.load(evict + b * evict_stride_b + h * evict_stride_h + j, mask=j < K, other=0) != 0
        by = tl.min(tl.where(evicted_by, j, K), 0)
        evicts = tl.where(by == K, 0, tl.where(by == 0, 1, by + 2))
    elif GATE:
        logit = _gate_logit(
            hidden + b * hidden_stride_b, gate_weight + h * weight_stride_h, gate_bias + h * bias_stride_h, M, gate_scale, gate_offset,
            NORMALIZE, BLOCK,
        )  # fmt: skip
        evicts = (logit + evict_bias > 0).to(tl.int32)
    else:
        evicts = (tl.load(evict + b * evict_stride_b + h * evict_stride_h) != 0).to(tl.int32)
    if NEXT:
        # It rules the ring's last token, and the new one waits for its successor.
        rules = present & (length > 0)
        last_state = evicts * (length > sinks).to(tl.int32)
        leaving_state = tl.where(last == slot, last_state, leaving_state)
        state = 2
    else:
        rules = present
        state = evicts * (length >= sinks).to(tl.int32)

    # Queries, keys and values.
    cos_row, sin_row = cos, sin
    if ROT > 0:
        cos_row, sin_row = cos + b * cos_stride_b, sin + b * sin_stride_b
    if QUERY:
        g = tl.arange(0, GP)
        turned = _rotate(
            q + b * q_stride_b + (h * G + g).to(tl.int64) * q_stride_h, g < G, q_norm, cos_row, sin_row, eps, D, DP, ROT, Q_NORM, Q_ROUNDS, ROPE_ROUNDS,
        )  # fmt: skip
        at = rotated + ((b * H + h) * G + g)[:, None] * D + dim[None, :]
        tl.store(at, turned.to(rotated.dtype.element_ty), mask=(g < G)[:, None] & within)
    new_k = _rotate(
        k + b * k_stride_b + h * k_stride_h + one, one == 0, k_norm, cos_row, sin_row, eps, D, DP, ROT, K_NORM, K_ROUNDS, ROPE_ROUNDS,
    )  # fmt: skip
    new_k = new_k.to(k.dtype.element_ty).to(ring.dtype.element_ty)
    new_v = tl.load(v + b * v_stride_b + h * v_stride_h + one[:, None] + dim[None, :], mask=within, other=0.0).to(ring.dtype.element_ty)

    # Loads of one thread and stores of another meet at the same addresses.
    tl.debug_barrier()

    number = head
    if K > 1:
        if RELEASE:
            # For the token at 0 nothing is gone.
            newest = tl.where(present, length, 0)
            _expire(table_row, num_kept + head * K, positions, newest, max_pages, references, free, num_free, lock, WINDOWS, K, KP, P)
        tl.debug_barrier()
        which = tl.maximum(leaving_state - 2, 0)
        number = head * K + which
        table_row += which * max_pages
        kept = tl.load(num_kept + number)
    if leaves & (leaving_state != 1):
        if K > 1:
            page = _take_page_locked(kept // P, kept % P, table_row, max_pages, references, free, num_free, lock)
        else:
            page = _take_page(kept // P, kept % P, table_row, max_pages, references, free, num_free)
        if page >= 0:
            page_k = pages + page.to(tl.int64) * (2 * P * WIDTH) + kept % P * WIDTH
            scale_at = (page.to(tl.int64) * (2 * P) + kept % P) * SCALES
            _write_entry(page_k, scales, scale_at, leaving_k, dim, D, DP, QUANTIZED, GROUP)
            _write_entry(page_k + P * WIDTH, scales, scale_at + P * SCALES, leaving_v, dim, D, DP, QUANTIZED, GROUP)
            if K > 1:
                tl.store(positions + page.to(tl.int64) * P + kept % P, length - window - 1)
            tl.store(num_kept + number, kept + 1)
        else:
            tl.atomic_max(overflow, 1)
    coming = (dim < tl.where(present, D, 0))[None, :]
    tl.store(slot_k, new_k, mask=coming)
    tl.store(slot_v, new_v, mask=coming)
    if NEXT:
        tl.store(state_row + last, last_state.to(tl.uint8), mask=rules)
    tl.store(state_row + slot, tl.zeros([], tl.uint8) + state, mask=present)
    if K > 1:
        tl.store(evicted + head, evicted_before + (evicts != 0).to(tl.int32), mask=rules)
    else:
        tl.store(evicted + head, evicted_before + evicts, mask=rules)

    # The row's length changes once all its programs have read it.
    tl.debug_barrier()
    if tl.atomic_add(ticket + b, 1, sem="acq_rel", scope="gpu") == H - 1:
        tl.store(ticket + b, 0)
        tl.store(seq_len + row, length + 1, mask=present)
        tl.store(decided + row, decided_before + 1, mask=rules)


def prepare(
    token: NewToken,
    ring: Ring,
    paged: PagedKV,
    free_pages: FreePages,
    counters: Counters,
    slot: torch.Tensor | None,
    sinks: int,
    alignment: str,
    release_gone: bool,
) -> tuple[torch.Tensor, Launch]:
    """The rotated queries, or no elements where there are none, and the launch, of arguments that were checked."""
    expect_contiguous(
        ring_kv=ring.kv, ring_state=ring.state, seq_len=ring.seq_len, num_kept=paged.num_kept, page_table=paged.page_table, pages=paged.pages,
        page_scales=paged.page_scales, positions=paged.positions, references=free_pages.references, free=free_pages.free, evicted=counters.evicted,
        decided=counters.decided, ticket=counters.ticket, slot=slot,
    )  # fmt: skip
    (B, H, D), K = token.k.shape, len(ring.windows)
    k, v = with_dense_rows(token.k), with_dense_rows(token.v)
    evict = hidden = weight = bias = None
    numbers, normalize = (1.0, 0.0, 0.0), False
    if isinstance(token.evict, GateInputs):
        gate = token.evict
        hidden, weight, bias = with_dense_rows(gate.hidden), with_dense_rows(gate.weight), gate.bias
        numbers, normalize = (gate.scale, gate.offset, gate.evict_bias), gate.normalize
    else:
        evict = token.evict
    q, cos, sin = (None if x is None else with_dense_rows(x) for x in (token.q, token.cos, token.sin))
    if K > 1:
        # Rows of a head's logits follow one another.
        evict, weight, bias = (None if x is None else x.contiguous() for x in (evict, weight, bias))
    rotated = k.new_empty(0) if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    G = 1 if q is None else q.shape[1] // H
    M = 0 if hidden is None else hidden.shape[1]
    dim, group = dispatch.padded(D), dispatch.power_of_two(G)
    chosen = launch(M=M, group=group, dim=dim, num_logits=dispatch.power_of_two(K))
    gate_strides = (*strides(weight, 1), *strides(bias, 1))
    if K > 1 and weight is not None:
        # One gate for all heads, or one each.
        gate_strides = (0, 0) if weight.shape[0] == K else (K * M, K)
    args = (
        k, v, None if evict is None else evict.view(torch.uint8), None if token.real is None else token.real.contiguous().view(torch.uint8), slot,
        q, rotated, cos, sin, token.q_norm, token.k_norm, hidden, weight, bias,
        ring.kv, ring.state, ring.seq_len, paged.num_kept, paged.page_table, paged.pages, scales_of(paged.pages, paged.page_scales),
        paged.positions, free_pages.references, free_pages.free, free_pages.num_free, counters.evicted, counters.decided, counters.overflow,
        counters.ticket, counters.ticket[-1:] if K > 1 else None,
        *strides(k, 2), *strides(v, 2), *strides(evict, 2), *strides(q, 2), *strides(cos, 1), *strides(sin, 1), *strides(hidden, 1),
        *gate_strides,
        ring.kv.shape[3], ring.window, sinks, paged.page_table.shape[2], M, token.norm_eps, *numbers,
    )  # fmt: skip
    constants = dict(
        H=H, G=G, GP=group, D=D, DP=dim, ROT=0 if cos is None else cos.shape[1], P=paged.pages.shape[2],
        GATE=hidden is not None, NORMALIZE=normalize, BLOCK=chosen.block,
        REAL=token.real is not None, SLOTS=slot is not None, QUERY=q is not None, NEXT=alignment == "next",
        Q_NORM=token.q_norm is not None, K_NORM=token.k_norm is not None,
        Q_ROUNDS=token.q_norm is None or token.q_norm.dtype == k.dtype, K_ROUNDS=token.k_norm is None or token.k_norm.dtype == k.dtype,
        ROPE_ROUNDS=cos is not None and cos.dtype == k.dtype,
        QUANTIZED=paged.page_scales is not None, GROUP=group_of(paged.pages, D), WINDOWS=ring.windows if K > 1 else (), K=K, KP=dispatch.power_of_two(K), RELEASE=release_gone,
    )  # fmt: skip
    # A contracted multiply and add would skip the rounding between them that plain PyTorch does.
    options = {"num_warps": chosen.num_warps, "enable_fp_fusion": False}
    return rotated, Launch(append_kernel, (H, B), args, constants, options)


@torch.library.custom_op(
    f"{dispatch.NAMESPACE}::append",
    mutates_args=(
        "ring_kv", "ring_state", "seq_len", "num_kept", "page_table", "pages", "references", "num_free", "evicted", "decided", "overflow",
        "ticket", "page_scales", "positions",
    ),
)  # fmt: skip
def append_step(
    k: torch.Tensor,
    v: torch.Tensor,
    evict: torch.Tensor | None,
    ring_kv: torch.Tensor,
    ring_state: torch.Tensor,
    seq_len: torch.Tensor,
    num_kept: torch.Tensor,
    page_table: torch.Tensor,
    pages: torch.Tensor,
    page_scales: torch.Tensor | None,
    positions: torch.Tensor | None,
    references: torch.Tensor,
    free: torch.Tensor,
    num_free: torch.Tensor,
    evicted: torch.Tensor,
    decided: torch.Tensor,
    overflow: torch.Tensor,
    ticket: torch.Tensor,
    windows: Sequence[int],
    sinks: int,
    next_alignment: bool,
    real: torch.Tensor | None,
    slot: torch.Tensor | None,
    q: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    hidden: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    gate_scale: float,
    gate_offset: float,
    gate_normalize: bool,
    evict_bias: float,
    release_gone: bool,
) -> torch.Tensor:
    """The rotated queries, or no elements where there are none. ticket: with several windows one more, a lock."""
    dispatch.count("append", "triton")
    if k.numel() == 0:
        return k.new_empty(0) if q is None else q.new_empty(q.shape)
    gate: torch.Tensor | GateInputs | None = evict
    if hidden is not None and gate_weight is not None and gate_bias is not None:
        gate = GateInputs(hidden, gate_weight, gate_bias, gate_scale, gate_offset, gate_normalize, evict_bias)
    assert gate is not None, "there are decisions, or a gate that makes them"
    token = NewToken(k, v, gate, q, q_norm, k_norm, norm_eps, cos, sin, real)
    ring = Ring(ring_kv, ring_state, seq_len, windows[0], tuple(windows[1:]))
    paged = PagedKV(pages, page_table, num_kept, page_scales, positions=positions, windows=tuple(windows) if len(windows) > 1 else ())
    free_pages, counters = FreePages(free, num_free, references), Counters(evicted, decided, overflow, ticket)
    alignment = "next" if next_alignment else "own"
    rotated, launched = prepare(token, ring, paged, free_pages, counters, slot, sinks, alignment, release_gone)
    with torch.cuda.device_of(k):
        launched.run()
    return rotated


@append_step.register_fake
def _(
    k, v, evict, ring_kv, ring_state, seq_len, num_kept, page_table, pages, page_scales, positions, references, free, num_free, evicted, decided,
    overflow, ticket, windows, sinks, next_alignment, real, slot, q, *rest,
):  # fmt: skip
    return k.new_empty(0) if q is None else q.new_empty(q.shape)


def launch_append(
    token: NewToken,
    ring: Ring,
    paged: PagedKV,
    free_pages: FreePages,
    counters: Counters,
    slot: torch.Tensor | None,
    sinks: int,
    alignment: str,
    release_gone: bool,
) -> torch.Tensor | None:
    """`append` of arguments that were checked. An operator takes tensors and numbers alone."""
    gate = token.evict if isinstance(token.evict, GateInputs) else None
    rotated = append_step(
        k=token.k,
        v=token.v,
        evict=None if isinstance(token.evict, GateInputs) else token.evict,
        ring_kv=ring.kv,
        ring_state=ring.state,
        seq_len=ring.seq_len,
        num_kept=paged.num_kept,
        page_table=paged.page_table,
        pages=paged.pages,
        page_scales=paged.page_scales,
        positions=paged.positions,
        references=free_pages.references,
        free=free_pages.free,
        num_free=free_pages.num_free,
        evicted=counters.evicted,
        decided=counters.decided,
        overflow=counters.overflow,
        ticket=counters.ticket,
        windows=ring.windows,
        sinks=sinks,
        next_alignment=alignment == "next",
        real=token.real,
        slot=slot,
        q=token.q,
        cos=token.cos,
        sin=token.sin,
        q_norm=token.q_norm,
        k_norm=token.k_norm,
        norm_eps=token.norm_eps,
        hidden=None if gate is None else gate.hidden,
        gate_weight=None if gate is None else gate.weight,
        gate_bias=None if gate is None else gate.bias,
        gate_scale=1.0 if gate is None else gate.scale,
        gate_offset=0.0 if gate is None else gate.offset,
        gate_normalize=False if gate is None else gate.normalize,
        evict_bias=0.0 if gate is None else gate.evict_bias,
        release_gone=release_gone,
    )
    return None if token.q is None else rotated


class CachedAppend:
    """`append` of one cache, for its owner, who calls at every step: what the cache is made of is checked once, and the kernel launched as it was
    before."""

    def __init__(
        self, ring: Ring, paged: PagedKV, free_pages: FreePages, counters: Counters, *, sinks: int, alignment: str, release_gone: bool
    ):
        """All of it as `append` takes it, and valid; another one is needed as soon as a tensor of it is replaced."""
        self._state = ring, paged, free_pages, counters
        self._how = sinks, alignment, release_gone
        self._made: dict[Any, CachedLaunch] = {}

    def __call__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        evict: torch.Tensor | GateInputs,
        real: torch.Tensor | None,
        slot: torch.Tensor | None = None,
    ) -> None:
        """Store tokens that are rotated already; k, v [B, H, D] and what goes with them as in `NewToken`, valid too."""
        decision = hidden = weight = bias = None
        numbers: tuple[Any, ...] = ()
        if isinstance(evict, GateInputs):
            hidden, weight, bias = evict.hidden, evict.weight, evict.bias
            numbers = (evict.scale, evict.offset, evict.normalize, evict.evict_bias)
        else:
            decision = evict
        key = (
            specialization(k),
            specialization(v),
            specialization(decision),
            specialization(hidden),
            specialization(weight),
            specialization(bias),
            specialization(real),
            specialization(slot),
            numbers,
        )
        cached = self._made.get(key)
        dispatch.count("append", "triton")
        with on_device_of(k):
            if cached is not None:
                cached(k, v, decision, real, slot, hidden, weight, bias)
                return
            _, launched = prepare(NewToken(k, v, evict, real=real), *self._state, slot, *self._how)
            cached = CachedLaunch(launched, ("k", "v", "evict", "real", "slots", "hidden", "gate_weight", "gate_bias"))
        if all(x is None or x.stride(-1) == 1 for x in (k, v, hidden)) and all(
            x is None or x.is_contiguous() for x in (decision, weight, bias, real)
        ):
            # Else the launch was with copies.
            self._made[key] = cached

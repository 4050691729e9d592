"""The Triton kernel of `append`.

Shapes: B batch, H KV heads, G query heads of each, D head dim, R ring slots, N pages of a pool, P entries of a page, M model dim, K
windows (KP: padded to a power of 2).
"""

from dms_kernels.packing import store_packed

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error


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
def _write_row(row, scales, scale_at, x, dim, D: tl.constexpr, QUANTIZED: tl.constexpr):
    """x [1, DP] as a key or value of pages that begins at `row`, with scale number scale_at."""
    if QUANTIZED:
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
            place = page.to(tl.int64) * (2 * P) + kept % P
            if GROUP > 0:
                page_row, scale_row = pages + place * (D // 2) + one, scales + place * (3 * (D // GROUP)) + one
                store_packed(page_row, scale_row, leaving_k, leaving_v, one == 0, P, D, DP, GROUP)
            else:
                _write_row(pages + place * D, scales, place, leaving_k, dim, D, QUANTIZED)
                _write_row(pages + (place + P) * D, scales, place + P, leaving_v, dim, D, QUANTIZED)
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

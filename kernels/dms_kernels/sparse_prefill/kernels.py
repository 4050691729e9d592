"""Triton kernels of sparse prefill: listing the kept entries, attention over what is visible, storing the survivors.

A program of `prefill_kernel` answers C = BLOCK_M // HEADS consecutive queries for HEADS query heads of one KV head, row
c * HEADS + g. What they see falls into classes: the pages, all of it visible; the kept entries beyond the block's windows, all
visible, by their list; the band inside every window, all visible; the edge, which some windows have left, and the diagonal. Only
the last two, with the ends of pages and list that fill no tile, pay for masks by element. Scores are in base 2.

A hidden score is a large finite number: a row that has met only hidden entries so far carries garbage, which the first visible
one scales by exp2(HIDDEN - top) = 0. Every query that is there sees itself, so that no row ends in garbage.

With K windows entries of class j are visible as far as w_j. Those of each class from 2 on beyond the first window have a list of their own,
of which a block reads the part that any of its queries sees, as it does of their pages: both with masks by element. `evicted` holds states
then: 0 stays for good, 1 the first class, j + 1 class j.
"""

from dms_kernels.packing import load_packed, store_packed

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

HIDDEN = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _count_before(flags, stride, wanted, first, end, BLOCK: tl.constexpr):
    """How many of flags[first:end] are `wanted`; end is a multiple of BLOCK."""
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    for n in range(0, end, BLOCK):
        s = n + tl.arange(0, BLOCK)
        counts += ((tl.load(flags + s.to(tl.int64) * stride) == wanted) & (s >= first)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit(do_not_specialize=["F", "num_blocks"])
def list_kept_kernel(
    evicted, start, kept, num_before, F, num_blocks, H, stride_b, stride_h, stride_s, BLOCK: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """kept [B, H, F] int32: the entries below F that are kept and not padding, in order; num_before [B, H, F] int32: how many of
    them stand before each entry. With several windows both [B, H * K, F], list c that of class c + 1. Each program counts what comes before
    its block by itself, which needs no second launch."""
    pid = tl.program_id(0)
    block, number = pid % num_blocks, pid // num_blocks
    bh, wanted = number // K, 0
    if K > 1:
        wanted = tl.where(number % K == 0, 0, number % K + 2)
    b, h = bh // H, bh % H
    first = 0
    if start is not None:
        first = tl.load(start + b)
    flags = evicted + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    s = block * BLOCK + tl.arange(0, BLOCK)
    inside = s < F
    flag = tl.load(flags + s.to(tl.int64) * stride_s, mask=inside, other=1)
    here = (flag == wanted) & (s >= first) & inside
    one = here.to(tl.int32)
    rank = _count_before(flags, stride_s, wanted, first, block * BLOCK, BLOCK) + tl.cumsum(one, 0) - one
    row = number.to(tl.int64) * F
    tl.store(num_before + row + s, rank, mask=inside)
    tl.store(kept + row + rank, s, mask=here)


@triton.jit
def _rows(pointers_ND, d_D, there_N, D: tl.constexpr, MASKED: tl.constexpr):
    """[N, D] padded to d; 0 beyond D, and where MASKED in rows that are not there."""
    if MASKED:
        return tl.load(pointers_ND, mask=there_N[:, None] & (d_D < D)[None, :], other=0.0)
    if d_D.shape[0] == D:
        return tl.load(pointers_ND)
    return tl.load(pointers_ND, mask=(d_D < D)[None, :], other=0.0)


@triton.jit
def _scores(q, k, k_scale, factor, cap, SCALED: tl.constexpr):
    """[M, N] float32 in base 2, or where neither SCALED nor capped, still to be multiplied by `factor`. k_scale: [N] float32 or
    None. cap: softcap * log2(e) beside a `factor` for the tanh's argument, or None."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if k_scale is not None:
        scores *= k_scale[None, :]
    if cap is not None:
        scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * factor)))
    elif SCALED:
        scores *= factor
    return scores


@triton.jit
def _take(scores, factor, v, v_scale, acc, total, top):
    """Take a tile into the running softmax. The factor is 1 where scores are hidden: of HIDDEN times another number the fused
    multiply-add would leave a huge remainder."""
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    weights = tl.exp2(tl.fma(scores, factor, -new_top[:, None]))
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    if v_scale is not None:
        weights *= v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _part(number, part, parts, SPLIT: tl.constexpr):
    """The share of one part: where it begins and ends."""
    if SPLIT:
        each = tl.cdiv(number, parts)
        return tl.minimum(part * each, number), tl.minimum(part * each + each, number)
    return 0, number


@triton.jit
def _add_pages(
    q,
    pages,
    scales,
    table,
    begin,
    end,
    held,
    positions,
    from_position,
    d,
    acc,
    total,
    top,
    factor,
    cap,
    D: tl.constexpr,
    P: tl.constexpr,
    LIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Entries begin to end of a head's pages, which hold `held`. Weights of quantised values are held LIFT times as high. GROUP > 0: pages of
    int4, as in `packing`, which become numbers as they are read. positions [N, P], beside MASKED: queries see entries from positions
    from_position [M] on; None: all of them."""
    column = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        entry = n + column
        visible = entry < held
        if MASKED:
            # The last entry once more instead of what nobody wrote.
            entry = tl.minimum(entry, held - 1)
        if P % BLOCK_N == 0:
            # One page a tile: a scalar read.
            page = tl.load(table + n // P)
        else:
            page = tl.load(table + entry // P)
        row = page.to(tl.int64) * (2 * P) + entry % P
        k_scale = None
        v_scale = None
        if GROUP > 0:
            at = pages + row * (D // 2)
            scale_at = scales + row * (3 * (D // GROUP))
            k = load_packed(at, scale_at, None, q.dtype, True, P, D, d.shape[0], GROUP, False)
            v = load_packed(at, scale_at, None, q.dtype, False, P, D, d.shape[0], GROUP, False)
        else:
            at = pages + row[:, None] * D + d[None, :]
            k = _rows(at, d, None, D, False).to(q.dtype)
            v = _rows(at + P * D, d, None, D, False).to(q.dtype)
            if scales is not None:
                k_scale = tl.load(scales + row)
                v_scale = tl.load(scales + row + P) * LIFT
        scores = _scores(q, k, k_scale, factor, cap, MASKED)
        if MASKED:
            scores = tl.where(visible[None, :], scores, HIDDEN)
            if positions is not None:
                position = tl.load(positions + page.to(tl.int64) * P + entry % P)
                scores = tl.where(position[None, :] >= from_position[:, None], scores, HIDDEN)
        acc, total, top = _take(scores, factor if not MASKED and cap is None else 1.0, v, v_scale, acc, total, top)
    return acc, total, top


@triton.jit(do_not_specialize=["T", "S", "F", "window", "max_pages", "num_blocks", "parts"])
def prefill_kernel(
    q,
    k,
    v,
    evicted,
    start,
    kept,
    num_before,
    pages,
    scales,
    page_positions,
    page_table,
    num_kept,
    last_position,
    sink_logits,
    out,
    state,
    T,
    S,
    F,
    H,
    window,
    max_pages,
    num_blocks,
    parts,
    factor,
    cap,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_eb,
    stride_eh,
    stride_es,
    D: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    LIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWS: tl.constexpr,
    K: tl.constexpr,
):
    """q [B, H * G, T, D], k and v [B, H, S, D], evicted [B, H, S] uint8 with strides; start [B]; kept, num_before [B, H, F] of
    `list_kept_kernel`, None where no window ends within S; pages [N, 2, P, D], scales [N, 2, P], page_table [B, H, max_pages],
    num_kept [B, H]; with GROUP > 0 pages and scales as in `packing`; sink_logits [H * G]. factor, cap: as `_scores` takes them. WINDOWS: all K of several, with which the dims of H are
    H * K in kept, num_before, page_table and num_kept; page_positions [N, P], last_position [B], that of entry S - 1.

    Writes out [B, T, H * G, D]. SPLIT: each program takes one of `parts` parts of what its queries see, and writes sums
    [parts, B, T, H * G, D] float32 to `out`, largest scores and total weights [parts, 2, B, T, H * G] to `state`.

    The grid is (blocks of queries) x B x H x (shares of a KV head's query heads) x parts; the last queries, which see most,
    come first.
    """
    C: tl.constexpr = BLOCK_M // HEADS
    SHARES: tl.constexpr = (G + HEADS - 1) // HEADS
    # Where a load waits for another that says where its rows are, each has half of the stages.
    LOOKED_UP: tl.constexpr = 2 * STAGES - 1
    # Keys that end with the block's own tokens, in whole tiles.
    DIAGONAL: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    pid = tl.program_id(0)
    per_block = tl.num_programs(0) // num_blocks
    block = num_blocks - 1 - pid // per_block
    part = pid % parts
    share = pid % per_block // parts % SHARES
    bh = pid % per_block // (parts * SHARES)
    b, h = bh // H, bh % H

    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    g = share * HEADS + row % HEADS
    t = block * C + row // HEADS
    there = (row < C * HEADS) & (g < G) & (t < T)
    # Entries of the block's first and last query, and the row's first entry.
    i_first = block * C + (S - T)
    i_last = tl.minimum(i_first + C, S) - 1
    first = 0
    if start is not None:
        first = tl.load(start + b)

    q += b.to(tl.int64) * stride_qb
    q_MD = _rows(q + ((h * G + g).to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt)[:, None] + d[None, :], d, there, D, True)
    k += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    evicted += b.to(tl.int64) * stride_eb + h.to(tl.int64) * stride_eh

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], HIDDEN, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sink_logits is not None:
        sink = tl.load(sink_logits + h * G + g, mask=there, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(part == 0, sink, top)
        total += tl.where(part == 0, 1.0, 0.0)

    # Parts take alike of the tiles without masks, and the last one all others.
    is_last = part == parts - 1
    if pages is not None:
        held = tl.where(i_last >= first, tl.load(num_kept + bh * K), 0)
        table = page_table + bh.to(tl.int64) * (K * max_pages)
        num_paged = held // BLOCK_N
        begin, end = _part(num_paged, part, parts, SPLIT)
        acc, total, top = _add_pages(
            q_MD,
            pages,
            scales,
            table,
            begin * BLOCK_N,
            end * BLOCK_N,
            held,
            None,
            None,
            d,
            acc,
            total,
            top,
            factor,
            cap,
            D,
            P,
            LIFT,
            GROUP,
            BLOCK_N,
            STAGES if P % BLOCK_N == 0 else LOOKED_UP,
            False,
        )
        acc, total, top = _add_pages(
            q_MD,
            pages,
            scales,
            table,
            num_paged * BLOCK_N,
            tl.where(is_last, held, 0),
            held,
            None,
            None,
            d,
            acc,
            total,
            top,
            factor,
            cap,
            D,
            P,
            LIFT,
            GROUP,
            BLOCK_N,
            2 if STAGES > 1 and scales is None else 1,
            True,
        )
        if K > 1:
            # Position of entry 0.
            origin = tl.load(last_position + b) - (S - 1)
            for c in tl.static_range(1, K):
                held = tl.where(i_last >= first, tl.load(num_kept + bh * K + c), 0)
                table = page_table + (bh.to(tl.int64) * K + c) * max_pages
                oldest = i_first + origin - WINDOWS[c]
                # Positions rise from entry to entry, by 1 at least: so many of the last ones can be seen.
                page = tl.load(table + tl.maximum(held - 1, 0) // P, mask=held > 0, other=0)
                newest = tl.load(page_positions + page.to(tl.int64) * P + (held + P - 1) % P, mask=held > 0, other=0)
                front = tl.maximum(held - 1 - (newest - oldest), 0) // BLOCK_N * BLOCK_N
                begin, end = _part(tl.cdiv(tl.maximum(held - front, 0), BLOCK_N), part, parts, SPLIT)
                acc, total, top = _add_pages(
                    q_MD,
                    pages,
                    scales,
                    table,
                    front + begin * BLOCK_N,
                    tl.minimum(front + end * BLOCK_N, held),
                    held,
                    page_positions,
                    oldest + tl.arange(0, BLOCK_M) // HEADS,
                    d,
                    acc,
                    total,
                    top,
                    factor,
                    cap,
                    D,
                    P,
                    LIFT,
                    GROUP,
                    BLOCK_N,
                    2 if STAGES > 1 and scales is None else 1,
                    True,
                )
        acc *= 1.0 / LIFT

    # Entries near..edge have left some windows, edge..diagonal none, and those from there on are not before every query.
    near = tl.maximum(i_first - window, first)
    diagonal = tl.maximum(i_last + 1 - DIAGONAL, near)
    num_band = tl.maximum(diagonal - tl.maximum(near, i_last - window), 0) // BLOCK_N
    edge = diagonal - num_band * BLOCK_N
    num_far = 0
    if kept is not None:
        num_before += bh.to(tl.int64) * (K * F)
        num_far = tl.load(num_before + tl.maximum(i_first - window, 0))
        kept += bh.to(tl.int64) * (K * F)
    num_list_tiles = num_far // BLOCK_N
    column = tl.arange(0, BLOCK_N)
    # One loop for list and band, so that memory is waited for once.
    begin, end = _part(num_list_tiles + num_band, part, parts, SPLIT)
    for tile in tl.range(begin, end, num_stages=STAGES if kept is None else LOOKED_UP):
        s = edge + (tile - num_list_tiles) * BLOCK_N + column
        if kept is not None:
            list_entry = tl.load(kept + tile * BLOCK_N + column, mask=tile * BLOCK_N + column < num_list_tiles * BLOCK_N, other=0)
            s = tl.where(tile < num_list_tiles, list_entry, s)
        at = s.to(tl.int64)
        k_ND = _rows(k + (at * stride_ks)[:, None] + d[None, :], d, None, D, False)
        v_ND = _rows(v + (at * stride_vs)[:, None] + d[None, :], d, None, D, False)
        scores = _scores(q_MD, k_ND, None, factor, cap, False)
        acc, total, top = _take(scores, factor if cap is None else 1.0, v_ND, None, acc, total, top)

    if K > 1 and kept is not None:
        for c in tl.static_range(1, K):
            list_before, list_kept = num_before + c * F, kept + c * F
            num_gone = tl.load(list_before + tl.maximum(i_first - WINDOWS[c], 0))
            num_listed = tl.load(list_before + tl.maximum(i_first - window, 0))
            begin, end = _part(tl.cdiv(num_listed - num_gone, BLOCK_N), part, parts, SPLIT)
            for tile in tl.range(begin, end, num_stages=2 if STAGES > 1 else 1):
                at = num_gone + tile * BLOCK_N + column
                s = tl.load(list_kept + at, mask=at < num_listed, other=0)
                k_ND = _rows(k + (s.to(tl.int64) * stride_ks)[:, None] + d[None, :], d, at < num_listed, D, True)
                v_ND = _rows(v + (s.to(tl.int64) * stride_vs)[:, None] + d[None, :], d, at < num_listed, D, True)
                scores = _scores(q_MD, k_ND, None, factor, cap, True)
                # Of what is not there every query is too far away.
                s = tl.where(at < num_listed, s, -S - WINDOWS[c])
                i = i_first + tl.arange(0, BLOCK_M) // HEADS
                scores = tl.where(i[:, None] - s[None, :] <= WINDOWS[c], scores, HIDDEN)
                acc, total, top = _take(scores, 1.0, v_ND, None, acc, total, top)

    # What is left of the list, the edge, the diagonal.
    num_rest = tl.cdiv(num_far, BLOCK_N) - num_list_tiles
    num_edge = tl.cdiv(edge - near, BLOCK_N)
    num_diagonal = tl.cdiv(tl.maximum(i_last + 1 - diagonal, 0), BLOCK_N)
    num_masked = num_rest + num_edge + num_diagonal
    # What follows from the rows is reckoned anew, rather than held in registers: no number is below 0, which the compiler can't know.
    i = i_first + (tl.minimum(num_diagonal, 0) + tl.arange(0, BLOCK_M)) // HEADS
    rest = num_list_tiles * BLOCK_N
    list_entry = column
    if kept is not None:
        list_entry = tl.load(kept + rest + column, mask=rest + column < num_far, other=0)
    for tile in tl.range(0, tl.where(is_last, num_masked, 0), num_stages=STAGES):
        in_list, in_edge = tile < num_rest, tile < num_rest + num_edge
        begin = tl.where(in_edge, near + (tile - num_rest) * BLOCK_N, diagonal + (tile - num_rest - num_edge) * BLOCK_N)
        begin = tl.where(in_list, rest, begin)
        end = tl.where(in_list, num_far, tl.where(in_edge, edge, i_last + 1))
        s = begin + column
        inside = s < end
        at = tl.where(in_list, list_entry, s).to(tl.int64)
        k_ND = _rows(k + (at * stride_ks)[:, None] + d[None, :], d, inside, D, True)
        v_ND = _rows(v + (at * stride_vs)[:, None] + d[None, :], d, inside, D, True)
        # Queries so far behind an entry see it; one before it, or before an entry at S, is behind by a huge unsigned number.
        # Entries of the list are kept, and an entry's number in the list is no larger than its entry.
        leaves = tl.load(evicted + s.to(tl.int64) * stride_es, mask=s < tl.where(in_list, 0, end), other=0)
        if K > 1:
            reach = tl.where(leaves == 0, S, window)
            for j in tl.static_range(1, K):
                reach = tl.where(leaves == j + 2, WINDOWS[j], reach)
            reach = reach.to(tl.uint32)
        else:
            reach = tl.where(leaves == 0, S, window).to(tl.uint32)
        s = tl.where(inside, s, S)
        # Masks are made after the product: before it, they would take its registers.
        scores = _scores(q_MD, k_ND, None, factor, cap, True)
        scores = tl.where((i[:, None] - s[None, :]).to(tl.uint32) <= reach[None, :], scores, HIDDEN)
        acc, total, top = _take(scores, 1.0, v_ND, None, acc, total, top)

    answered = i >= first
    row = tl.minimum(num_masked, 0) + tl.arange(0, BLOCK_M)
    g = share * HEADS + row % HEADS
    t = block * C + row // HEADS
    there = (row < C * HEADS) & (g < G) & (t < T)
    at = (b.to(tl.int64) * T + t) * (H * G) + h * G + g
    if SPLIT:
        num_rows = (per_block // (parts * SHARES)).to(tl.int64) * (G * T)
        tl.store(state + (2 * part) * num_rows + at, tl.where(answered, top, 0.0), mask=there)
        tl.store(state + (2 * part + 1) * num_rows + at, tl.where(answered, total, 1.0), mask=there)
        at += part * num_rows
        acc = tl.where(answered[:, None], acc, 0.0)
    else:
        acc = tl.where(answered[:, None], acc / total[:, None], 0.0)
    tl.store(out + at[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=there[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_rows", "parts"])
def merge_kernel(sums, state, out, num_rows, parts, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """sums [parts, num_rows, D] and state [parts, 2, num_rows] of `prefill_kernel` -> out [num_rows, D]."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < num_rows
    d = tl.arange(0, BLOCK_D)
    largest = tl.full([ROWS], HIDDEN, dtype=tl.float32)
    for part in range(parts):
        largest = tl.maximum(largest, tl.load(state + 2 * part * num_rows + at, mask=inside, other=0.0))
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for part in range(parts):
        # A part that saw nothing has weight 0, since the others' largest is far above HIDDEN.
        weight = tl.exp2(tl.load(state + 2 * part * num_rows + at, mask=inside, other=0.0) - largest)
        total += weight * tl.load(state + (2 * part + 1) * num_rows + at, mask=inside, other=1.0)
        acc += weight[:, None] * _rows(sums + (part * num_rows + at)[:, None] * D + d[None, :], d, inside, D, True)
    acc = acc / total[:, None]
    tl.store(out + at[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["S", "num_blocks", "max_pages"])
def store_survivors_kernel(
    k,
    v,
    keep,
    num_kept,
    page_table,
    pages,
    scales,
    position,
    page_positions,
    S,
    H,
    max_pages,
    num_blocks,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_ms,
    D: tl.constexpr,
    P: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
):
    """Copy those of a head's BLOCK entries that stay, ROWS at a time. LARGEST: what the largest component of a quantised entry
    becomes; ROUND: to whole numbers; GROUP > 0: instead of both, pages of int4, as in `packing`. Each program counts those before its own by itself. Of K lists a program fills one, c, from the entries
    of which `keep` is c + 1; position [B, S] goes to page_positions [N, P]."""
    pid = tl.program_id(0)
    block, number = pid % num_blocks, pid // num_blocks
    bh, wanted = number // K, 1
    if K > 1:
        wanted = number % K + 1
    b, h = bh // H, bh % H
    keep += b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    k += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    table = page_table + number.to(tl.int64) * max_pages
    place = tl.load(num_kept + number) + _count_before(keep, stride_ms, wanted, 0, block * BLOCK, BLOCK)
    d = tl.arange(0, BLOCK_D)
    for n in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, S), ROWS):
        s = n + tl.arange(0, ROWS)
        stays = tl.load(keep + s.to(tl.int64) * stride_ms, mask=s < S, other=0) == wanted
        one = stays.to(tl.int32)
        mine = place + tl.cumsum(one, 0) - one
        place += tl.sum(one, 0)
        page = tl.load(table + mine // P, mask=stays, other=0).to(tl.int64)
        row = page * (2 * P) + mine % P
        if K > 1:
            tl.store(page_positions + page * P + mine % P, tl.load(position + b.to(tl.int64) * S + s, mask=stays, other=0), mask=stays)
        at = s.to(tl.int64)[:, None]
        key = _rows(k + at * stride_ks + d[None, :], d, stays, D, True)
        value = _rows(v + at * stride_vs + d[None, :], d, stays, D, True)
        if GROUP > 0:
            store_packed(pages + row * (D // 2), scales + row * (3 * (D // GROUP)), key, value, stays, P, D, BLOCK_D, GROUP)
        else:
            _store_rows(key, pages, scales, row, stays, d, D, LARGEST, ROUND)
            _store_rows(value, pages, scales, row + P, stays, d, D, LARGEST, ROUND)


@triton.jit
def _store_rows(x, pages, scales, row, stays, d, D: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr):
    if scales is not None:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 1) / LARGEST
        tl.store(scales + row, scale, mask=stays)
        x *= (1.0 / tl.where(scale > 0, scale, 1.0))[:, None]
        if ROUND:
            x = tl.floor(x + 0.5)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    tl.store(pages + row[:, None] * D + d[None, :], x.to(pages.dtype.element_ty), mask=stays[:, None] & (d < D)[None, :])

"""Kernels of the fused gated attention's forward, and what the backward's share with them.

Ranges. With windows w_1 < ... < w_K, w_(K+1) endless, a key is in range r of a query if the gap from it is over w_r and at most
w_(r+1): decisions 1 to r count, and its bias is their sum. In range 0, its window, nothing counts.

Lists. Each range r >= 1 has a list, without the keys that no query gives weight there: |q_i| |k_j| scale + bias_j < floor_i - margin
for all i, where floor_i bounds query i's log-sum-exp from below. Over i, |q_i| scale x - floor_i is convex in x = |k_j|, so its
values at x = 0 and at the longest key bound it between them by a straight line. Gates of a trained model are nearly binary: most
evicted keys go. A list holds every key of the later ones; biases only fall with r, so that this adds none.

Attention. One program for a block of positions and the G query heads of one KV head. Keys come in loops of three kinds, so that
only the narrow last one pays for masks:

    far     range after range, its list's keys that are in it for every query, copied together: a bias per key
    band    inside every query's window, before the block: nothing to add
    masked  the tiles where a window ends and those of the diagonal: bias, causality and documents element by element

Far and band know nothing of documents. Where one begins inside the block, its rows are set back before the masked loop.

All scores are in base 2. Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, K windows, C positions
of a block, M rows of a tile (position c, query head g of the group: row c * G + g), N keys of a tile.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

# A masked score. Finite: a row that has only seen masked keys holds garbage, never NaN, which its own key wipes out.
NEG = tl.constexpr(-1e30)
# In place of a log-sum-exp: the row's probabilities become 0.
NEVER = tl.constexpr(1e30)


@triton.jit
def load_rows(pointers, stride, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] from offsets `stride` of rows; zeros beyond D, and where `is_row` is false if MASKED."""
    d = tl.arange(0, BLOCK_D)
    pointers = pointers + stride[:, None] + d[None, :]
    if MASKED and D != BLOCK_D:
        return tl.load(pointers, mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    elif D != BLOCK_D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def row_offsets(r_M, stride_t, stride_h, G: tl.constexpr):
    """Of the rows of a tile. A group's heads may lie T * D apart, which is too far for 32 bits."""
    return (r_M // G) * stride_t + (r_M % G).to(tl.int64) * stride_h


@triton.jit
def store_rows(pointers, stride, is_row, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = pointers + stride[:, None] + d[None, :]
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def tanh(x2):
    """tanh(x) from x2 = 2 log2(e) x; right at both ends, where exp2 is 0 or infinite."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x2))


@triton.jit
def score(a, b, scale2, cap_in, cap_out, HAS_SOFTCAP: tl.constexpr):
    """Rows of a against rows of b: base-2 scores, and the softcap's slope (with no softcap something to be ignored).

    scale2 = log2(e) scale, or with a softcap cap_in = 2 log2(e) scale / softcap and cap_out = log2(e) softcap.
    """
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if HAS_SOFTCAP:
        bent = tanh(x * cap_in)
        return bent * cap_out, 1.0 - bent * bent
    else:
        return x * scale2, x


@triton.jit
def near_tiles(i0, i_last, first, window, BLOCK_N: tl.constexpr):
    """The keys near a block of queries [i0, i_last], in tiles of BLOCK_N from `begin` on.

    Tiles [0, num_edge) may hold keys that some query has left behind its window, [num_edge, diagonal) need no mask
    but the documents', [diagonal, num) hold keys that are the future of some query. `diagonal` is never below `num_edge`.
    """
    begin = tl.maximum(i0 - window, first)
    num_edge = tl.cdiv(tl.maximum(i_last - window - begin, 0), BLOCK_N)
    diagonal = tl.maximum((i0 - begin) // BLOCK_N, num_edge)
    num = tl.cdiv(i_last + 1 - begin, BLOCK_N)
    return begin, num_edge, diagonal, num


@triton.jit
def window_edge(i0, i_last, first, nearer, window):
    """The keys [begin, stop) that some queries of [i0, i_last] have left behind their window and some not, and all behind the nearer."""
    begin = tl.maximum(i0 - window, first)
    return begin, tl.minimum(tl.maximum(i_last - window, begin), tl.maximum(i0 - nearer, first))


@triton.jit
def num_edge_tiles(i0, i_last, first, windows, BLOCK_N: tl.constexpr, K: tl.constexpr):
    """Tiles at the edges of all windows but the nearest."""
    num = 0
    for j in tl.static_range(1, K):
        begin, stop = window_edge(i0, i_last, first, windows[j - 1], windows[j])
        num += tl.cdiv(stop - begin, BLOCK_N)
    return num


@triton.jit
def masked_tile(step, num_near, near, i0, i_last, first, windows, T, BLOCK_N: tl.constexpr, K: tl.constexpr):
    """The keys [begin, stop) of a masked tile: `near` if it is among the `num_near` of `near_tiles`, which come first."""
    begin, stop, num = near, T, num_near
    for j in tl.static_range(1, K):
        edge_begin, edge_stop = window_edge(i0, i_last, first, windows[j - 1], windows[j])
        begin = tl.where(step < num, begin, edge_begin + (step - num) * BLOCK_N)
        stop = tl.where(step < num, stop, edge_stop)
        num += tl.cdiv(edge_stop - edge_begin, BLOCK_N)
    return begin, stop


@triton.jit
def masked_bias(log2_keep, gap_MN, j_N, is_key_N, windows, T, K: tl.constexpr):
    """[M, N] biases of keys, by the windows that they have left."""
    bias_N = tl.load(log2_keep + j_N, mask=is_key_N, other=0.0)
    bias_MN = tl.where(gap_MN > windows[0], bias_N[None, :], 0.0)
    for j in tl.static_range(1, K):
        bias_N = tl.load(log2_keep + j * T + j_N, mask=is_key_N, other=0.0)
        bias_MN = tl.where(gap_MN > windows[j], bias_N[None, :], bias_MN)
    return bias_MN


@triton.jit(do_not_specialize=["window", "window_2", "window_3", "window_4", "sinks"])
def measure_kernel(
    q,
    k,
    log_keep,
    first,
    last,
    norm_q,
    norm_k,
    floor,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    gate_stride_b,
    gate_stride_t,
    gate_stride_h,
    gate_stride_k,
    T,
    H,
    window,
    window_2,
    window_3,
    window_4,
    sinks,
    scale,
    cap_in,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Write norm_q [B,H,T,G], norm_k [B,H,T] and floor [B,H,T,G], all float32 (floor in nats).

    The floor is the larger of two scores that the query surely sees: its own key's and that of its document's first,
    to which trained models give much of their attention.
    """
    C: tl.constexpr = BLOCK_M // G
    windows = (window, window_2, window_3, window_4)
    num_blocks = tl.cdiv(T, C)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    i0 = (pid % num_blocks) * C
    r_M = tl.arange(0, BLOCK_M)
    i_M = i0 + r_M // G
    is_row_M = (r_M < C * G) & (i_M < T)
    q += b * q_stride_b + i0.to(tl.int64) * q_stride_t + h * G * q_stride_h
    q_MD = load_rows(q, row_offsets(r_M, q_stride_t, q_stride_h, G), is_row_M, D, BLOCK_D, True).to(tl.float32)
    k += b * k_stride_b + h * k_stride_h
    own_MD = load_rows(k + i0.to(tl.int64) * k_stride_t, (r_M // G) * k_stride_t, is_row_M, D, BLOCK_D, True).to(tl.float32)
    if HAS_SEGMENTS:
        first_M = tl.load(first + b * T + i_M, mask=is_row_M, other=0)
    else:
        first_M = tl.zeros([BLOCK_M], tl.int32)
    head_MD = load_rows(k, first_M.to(tl.int64) * k_stride_t, is_row_M, D, BLOCK_D, True).to(tl.float32)
    own_M = tl.sum(q_MD * own_MD, 1)
    head_M = tl.sum(q_MD * head_MD, 1)
    if HAS_SOFTCAP:
        own_M = tanh(own_M * cap_in) * softcap
        head_M = tanh(head_M * cap_in) * softcap
    else:
        own_M *= scale
        head_M *= scale
    gate = log_keep + b * gate_stride_b + h * gate_stride_h
    for j in tl.static_range(K):
        gate_M = tl.load(gate + first_M.to(tl.int64) * gate_stride_t + j * gate_stride_k, mask=is_row_M, other=0.0)
        gate_M = tl.maximum(gate_M, NEG, propagate_nan=tl.PropagateNan.ALL)
        head_M += tl.where((i_M - first_M > windows[j]) & (sinks == 0), gate_M, 0.0)
    floor_M = tl.maximum(own_M, head_M, propagate_nan=tl.PropagateNan.ALL)
    if HAS_SEGMENTS:
        floor_M = tl.where(tl.load(last + b * T + i_M, mask=is_row_M, other=0) < 0, NEVER, floor_M)
    rows = (bh * T + i0) * G + r_M
    tl.store(floor + rows, floor_M, mask=is_row_M)
    tl.store(norm_q + rows, tl.sqrt(tl.sum(q_MD * q_MD, 1)), mask=is_row_M)
    tl.store(norm_k + bh * T + i_M, tl.sqrt(tl.sum(own_MD * own_MD, 1)), mask=is_row_M & (r_M % G == 0))


@triton.jit(do_not_specialize=["sinks"])
def list_kernel(
    log_keep,
    first,
    norm_k,
    limits,
    log2_keep,
    kept,
    kept_log2_keep,
    num_before,
    gate_stride_b,
    gate_stride_t,
    gate_stride_h,
    gate_stride_k,
    T,
    H,
    sinks,
    margin,
    cap_in,
    softcap,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One program for each sequence and head, over all its tokens in order, for one range after the other.

    limits [B,H,3]: see `fused._list_far_keys`. Writes log2_keep [B,H,K,T], the bias of each token in each range (0 for sinks,
    finite); kept [B,H,K,T] int32, the keys worth their while there from the front, and from the back those that were so in the
    range before (all in the window) and are no longer; kept_log2_keep [B,H,K,PADDING+T], the bias of the former in that order,
    after a padding that weighs nothing; num_before [B,H,K,T+1] int32, how many of the former come before a token.
    """
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    log_keep += b * gate_stride_b + (bh % H) * gate_stride_h
    base = tl.load(limits + bh * 3)
    slope = tl.load(limits + bh * 3 + 1)
    reach = tl.load(limits + bh * 3 + 2)
    norm_k += bh * T
    log2_keep += bh * K * T
    kept += bh * K * T
    kept_log2_keep += bh * K * (PADDING + T)
    num_before += bh * K * (T + 1)
    for r in tl.static_range(K):
        tl.store(kept_log2_keep + tl.arange(0, PADDING), tl.full([PADDING], NEG, tl.float32))
        kept_log2_keep += PADDING
        num_kept = tl.zeros([], tl.int32)
        num_dropped = tl.zeros([], tl.int32)
        for at in range(0, T, BLOCK):
            j = at + tl.arange(0, BLOCK)
            is_key = j < T
            if HAS_SEGMENTS:
                position = j - tl.load(first + b * T + j, mask=is_key, other=0)
            else:
                position = j
            norm = tl.load(norm_k + j, mask=is_key, other=0.0)
            ceiling = base + slope * norm
            if HAS_SOFTCAP:
                ceiling = tl.minimum(ceiling, base + tanh(norm * reach * cap_in) * softcap)
            for i in tl.static_range(K):
                gate = tl.load(log_keep + j.to(tl.int64) * gate_stride_t + i * gate_stride_k, mask=is_key, other=0.0)
                gate = tl.maximum(gate, NEG, propagate_nan=tl.PropagateNan.ALL)
                gate = tl.where(position < sinks, 0.0, gate)
                if i == 0:
                    total = gate
                else:
                    total += gate
                # Worded so that a NaN keeps the key and comes through.
                is_open = is_key & ~(ceiling + total < -margin)
                if i + 1 == r:
                    was_kept = is_open
                if i == r:
                    bias = total
                    is_kept = is_open
                if i > r:
                    is_kept |= is_open
            after = num_kept + tl.cumsum(is_kept.to(tl.int32), 0)
            before = after - is_kept.to(tl.int32)
            if r == 0:
                is_listed = is_key
                dropped_before = j - before
            else:
                is_dropped = was_kept & ~is_kept
                is_listed = is_kept | is_dropped
                dropped_before = num_dropped + tl.cumsum(is_dropped.to(tl.int32), 0) - 1
                num_dropped += tl.sum(is_dropped.to(tl.int32), 0)
            bias2 = bias * 1.4426950408889634
            tl.store(log2_keep + j, bias2, mask=is_key)
            tl.store(num_before + j, before, mask=is_key)
            tl.store(kept + tl.where(is_kept, before, T - 1 - dropped_before), j, mask=is_listed)
            tl.store(kept_log2_keep + before, bias2, mask=is_kept)
            num_kept += tl.sum(is_kept.to(tl.int32), 0)
        tl.store(num_before + T, num_kept)
        log2_keep += T
        kept += T
        kept_log2_keep += T
        num_before += T + 1


@triton.jit
def gather_kernel(
    k,
    v,
    kept,
    num_before,
    kept_k,
    kept_v,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    T,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Write kept_k and kept_v [B,H,K,PADDING+T,D]: zeros, then the keys of each list one after the other; the rest stays as it was.

    A copy, for the kernels read a row as often as query blocks follow it, and loads that wait for an index are not prefetched.
    """
    num_tiles = tl.cdiv(PADDING + T, BLOCK_N)
    pid = tl.program_id(0)
    bhk = (pid // num_tiles).to(tl.int64)
    bh = bhk // K
    num_kept = tl.load(num_before + bhk * (T + 1) + T)
    row_N = (pid % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_written_N = row_N < PADDING + num_kept
    is_kept_N = (row_N >= PADDING) & is_written_N
    index_N = tl.load(kept + bhk * T + row_N - PADDING, mask=is_kept_N, other=0).to(tl.int64)
    k += (bh // H) * k_stride_b + (bh % H) * k_stride_h
    v += (bh // H) * v_stride_b + (bh % H) * v_stride_h
    k_ND = load_rows(k, index_N * k_stride_t, is_kept_N, D, BLOCK_D, True)
    v_ND = load_rows(v, index_N * v_stride_t, is_kept_N, D, BLOCK_D, True)
    head = bhk * (PADDING + T) * D
    store_rows(kept_k + head, row_N.to(tl.int64) * D, is_written_N, k_ND, D, BLOCK_D)
    store_rows(kept_v + head, row_N.to(tl.int64) * D, is_written_N, v_ND, D, BLOCK_D)


@triton.jit
def _fold(x_MN, factor, v_ND, peak_M, total_M, acc_MD):
    """Take the scores factor * x of a tile into the running softmax."""
    # On products without a bias the factor joins the exponent's subtraction: one instruction less for each score.
    new_M = tl.maximum(peak_M, tl.max(x_MN, 1) * factor)
    shrink_M = tl.exp2(peak_M - new_M)
    p_MN = tl.exp2(tl.fma(x_MN, factor, -new_M[:, None]))
    total_M = total_M * shrink_M + tl.sum(p_MN, 1)
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision="ieee")
    return new_M, total_M, acc_MD


@triton.jit(do_not_specialize=["window", "window_2", "window_3", "window_4"])
def forward_kernel(
    q,
    k,
    v,
    log2_keep,
    kept_log2_keep,
    kept_k,
    kept_v,
    num_before,
    first,
    last,
    sink_logits,
    out,
    lse2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    T,
    H,
    window,
    window_2,
    window_3,
    window_4,
    scale2,
    cap_in,
    cap_out,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PADDING: tl.constexpr,
):
    """q [B,T,Hq,D], k and v [B,T,H,D] by strides; out [B,T,Hq,D] and lse2 [B,H,T,G] contiguous; lists: see `list_kernel`."""
    C: tl.constexpr = BLOCK_M // G
    num_blocks = tl.cdiv(T, C)
    pid = tl.program_id(0)
    # A head after the other keeps its keys in the L2 cache; its long blocks first leave short ones for the end.
    bh = pid // num_blocks
    i0 = (num_blocks - 1 - pid % num_blocks) * C
    i_last = tl.minimum(i0 + C, T) - 1
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    bh = bh.to(tl.int64)

    windows = (window, window_2, window_3, window_4)
    r_M = tl.arange(0, BLOCK_M)
    i_M = i0 + r_M // G
    n_N = tl.arange(0, BLOCK_N)
    is_row_M = (r_M < C * G) & (i_M < T)
    q_offsets_M = row_offsets(r_M, q_stride_t, q_stride_h, G)
    q_block = q + b * q_stride_b + i0.to(tl.int64) * q_stride_t + h * G * q_stride_h
    q_MD = load_rows(q_block, q_offsets_M, is_row_M, D, BLOCK_D, True)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    if HAS_SEGMENTS:
        first += b * T
        document = tl.load(first + i0)
        first_M = tl.load(first + i_M, mask=i_M < T, other=0)
    else:
        document = 0
    if HAS_GATE:
        log2_keep += bh * K * T
        begin, num_edge, diagonal, num_tiles = near_tiles(i0, i_last, document, window, BLOCK_N)
    else:
        begin, num_edge, diagonal, num_tiles = near_tiles(i0, i_last, document, T, BLOCK_N)

    if HAS_SINK:
        sink_M = tl.load(sink_logits + h * G + r_M % G).to(tl.float32) * 1.4426950408889634
        one_M = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        sink_M = tl.full([BLOCK_M], NEG, tl.float32)
        one_M = tl.zeros([BLOCK_M], tl.float32)
    peak_M, total_M = sink_M, one_M
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_GATE:
        far_stop = begin
        for r in tl.static_range(K):
            next_stop, far_first = document, document
            if r + 1 < K:
                next_stop, far_first = window_edge(i0, i_last, document, windows[r], windows[r + 1])
            far_before = num_before + (bh * K + r) * (T + 1)
            far_begin = PADDING + tl.load(far_before + far_first)
            far_end = PADDING + tl.load(far_before + far_stop)
            far_stop = next_stop
            far_log2_keep = kept_log2_keep + (bh * K + r) * (PADDING + T)
            far_k = kept_k + (bh * K + r) * (PADDING + T) * D
            far_v = kept_v + (bh * K + r) * (PADDING + T) * D
            # From the end, so that the last tile reaches into the padding before the list instead of needing a mask.
            for step in range(tl.cdiv(far_end - far_begin, BLOCK_N)):
                at = far_end - (step + 1) * BLOCK_N
                bias_N = tl.load(far_log2_keep + at + n_N)
                if HAS_SEGMENTS or r + 1 < K:
                    bias_N = tl.where(at + n_N >= far_begin, bias_N, NEG)
                k_ND = load_rows(far_k + at.to(tl.int64) * D, n_N * D, None, D, BLOCK_D, False)
                v_ND = load_rows(far_v + at.to(tl.int64) * D, n_N * D, None, D, BLOCK_D, False)
                x_MN, _ = score(q_MD, k_ND, scale2, cap_in, cap_out, HAS_SOFTCAP)
                peak_M, total_M, acc_MD = _fold(x_MN + bias_N[None, :], 1.0, v_ND, peak_M, total_M, acc_MD)

    for tile in range(num_edge, diagonal):
        j0 = (begin + tile * BLOCK_N).to(tl.int64)
        k_ND = load_rows(k + j0 * k_stride_t, n_N * k_stride_t, None, D, BLOCK_D, False)
        v_ND = load_rows(v + j0 * v_stride_t, n_N * v_stride_t, None, D, BLOCK_D, False)
        x_MN, _ = score(q_MD, k_ND, 1.0, cap_in, 1.0, HAS_SOFTCAP)
        peak_M, total_M, acc_MD = _fold(x_MN, cap_out if HAS_SOFTCAP else scale2, v_ND, peak_M, total_M, acc_MD)

    if HAS_SEGMENTS:
        is_first_M = first_M == document
        peak_M = tl.where(is_first_M, peak_M, sink_M)
        total_M = tl.where(is_first_M, total_M, one_M)
        acc_MD = tl.where(is_first_M[:, None], acc_MD, 0.0)

    num_near = num_edge + num_tiles - diagonal
    for step in range(num_near + num_edge_tiles(i0, i_last, document, windows, BLOCK_N, K)):
        near = begin + (step + tl.where(step < num_edge, 0, diagonal - num_edge)) * BLOCK_N
        j0, j_stop = masked_tile(step, num_near, near, i0, i_last, document, windows, T, BLOCK_N, K)
        j_N = j0 + n_N
        is_key_N = j_N < j_stop
        j0 = j0.to(tl.int64)
        k_ND = load_rows(k + j0 * k_stride_t, n_N * k_stride_t, is_key_N, D, BLOCK_D, True)
        v_ND = load_rows(v + j0 * v_stride_t, n_N * v_stride_t, is_key_N, D, BLOCK_D, True)
        x_MN, _ = score(q_MD, k_ND, scale2, cap_in, cap_out, HAS_SOFTCAP)
        gap_MN = i_M[:, None] - j_N[None, :]
        if HAS_GATE:
            x_MN += masked_bias(log2_keep, gap_MN, j_N, is_key_N, windows, T, K)
        is_seen_MN = gap_MN >= 0
        if K > 1:
            is_seen_MN &= is_key_N[None, :]
        if HAS_SEGMENTS:
            is_seen_MN &= j_N[None, :] >= first_M[:, None]
        x_MN = tl.where(is_seen_MN, x_MN, NEG)
        peak_M, total_M, acc_MD = _fold(x_MN, 1.0, v_ND, peak_M, total_M, acc_MD)

    out_MD = acc_MD / total_M[:, None]
    lse2_M = peak_M + tl.log2(total_M)
    if HAS_SEGMENTS:
        is_padding_M = tl.load(last + b * T + i_M, mask=is_row_M, other=0) < 0
        out_MD = tl.where(is_padding_M[:, None], 0.0, out_MD)
        lse2_M = tl.where(is_padding_M, NEVER, lse2_M)
    tl.store(lse2 + (bh * T + i0) * G + r_M, lse2_M, mask=is_row_M)
    out += (b * T + i0) * H * G * D + h * G * D
    store_rows(out, ((r_M // G) * H * G + r_M % G) * D, is_row_M, out_MD, D, BLOCK_D)

"""Fused gated attention, backward: dq by blocks of queries; dk, dv and the gate's gradient by tiles of keys. No atomics.

A tile's keys have one reach, the last range in which they weigh anything: of reach K are those that all later queries see, of
reach r < K those that only queries within w_(r+1) do (the front of the last list and the backs of all; see `forward`). So each key
belongs to one program, which sums over all its queries and over the G query heads, and writes it once. Where few keys are kept their
tiles are cut into pieces, each of a range of queries and with a program of its own (`merge` adds them up).

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, K windows, C positions of a block; M, N see `forward`.
"""

# Triton's tuples grow as loops over constants are unrolled.
# mypy: disable-error-code="assignment, misc"

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

from dms_kernels.gated_attention.forward import (
    NEG,
    NEVER,
    load_rows,
    masked_bias,
    masked_tile,
    near_tiles,
    num_edge_tiles,
    row_offsets,
    score,
    store_rows,
    window_edge,
)


@triton.jit
def delta_kernel(
    grad_out,
    out,
    lse2,
    delta,
    padded_lse2,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    T,
    H,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Write delta, the sum over D of grad_out * out: what the softmax takes off each score's gradient.

    lse2 is [B,H,T*G]; delta and padded_lse2, its copy, [B,H,T*G+PADDING] float32. In the padding probabilities come out as 0.
    """
    C: tl.constexpr = BLOCK_M // G
    num_rows = T * G + PADDING
    num_blocks = tl.cdiv(num_rows, C * G)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    i0 = (pid % num_blocks) * C
    r_M = tl.arange(0, BLOCK_M)
    is_row_M = (r_M < C * G) & (i0 + r_M // G < T)
    grad_out += b * grad_stride_b + i0.to(tl.int64) * grad_stride_t + h * G * grad_stride_h
    grad_MD = load_rows(grad_out, row_offsets(r_M, grad_stride_t, grad_stride_h, G), is_row_M, D, BLOCK_D, True)
    out += (b * T + i0) * H * G * D + h * G * D
    out_MD = load_rows(out, ((r_M // G) * H * G + r_M % G) * D, is_row_M, D, BLOCK_D, True)
    delta_M = tl.sum(grad_MD.to(tl.float32) * out_MD.to(tl.float32), 1)
    row_M = i0 * G + r_M
    lse2_M = tl.load(lse2 + bh * T * G + row_M, mask=is_row_M, other=NEVER)
    is_written_M = (r_M < C * G) & (row_M < num_rows)
    tl.store(delta + bh * num_rows + row_M, delta_M, mask=is_written_M)
    tl.store(padded_lse2 + bh * num_rows + row_M, lse2_M, mask=is_written_M)


@triton.jit
def _fold_keys(x_MN, slope_MN, lse2_M, delta_M, grad_MD, k_ND, v_ND, acc_MD, HAS_SOFTCAP: tl.constexpr):
    """Add a tile's part of dq: base-2 scores x, the softcap's slope if there is one."""
    p_MN = tl.exp2(x_MN - lse2_M[:, None])
    ds_MN = p_MN * (tl.dot(grad_MD, tl.trans(v_ND), input_precision="ieee") - delta_M[:, None])
    if HAS_SOFTCAP:
        ds_MN *= slope_MN
    return tl.dot(ds_MN.to(k_ND.dtype), k_ND, acc_MD, input_precision="ieee")


@triton.jit(do_not_specialize=["window", "window_2", "window_3", "window_4"])
def queries_kernel(
    q,
    k,
    v,
    grad_out,
    log2_keep,
    kept_log2_keep,
    kept_k,
    kept_v,
    num_before,
    first,
    lse2,
    delta,
    grad_q,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    T,
    H,
    window,
    window_2,
    window_3,
    window_4,
    scale,
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
    HAS_SOFTCAP: tl.constexpr,
    PADDING: tl.constexpr,
):
    """grad_q [B,T,Hq,D] contiguous; the loops are the forward's."""
    C: tl.constexpr = BLOCK_M // G
    num_blocks = tl.cdiv(T, C)
    pid = tl.program_id(0)
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
    q += b * q_stride_b + i0.to(tl.int64) * q_stride_t + h * G * q_stride_h
    q_MD = load_rows(q, row_offsets(r_M, q_stride_t, q_stride_h, G), is_row_M, D, BLOCK_D, True)
    grad_out += b * grad_stride_b + i0.to(tl.int64) * grad_stride_t + h * G * grad_stride_h
    grad_MD = load_rows(grad_out, row_offsets(r_M, grad_stride_t, grad_stride_h, G), is_row_M, D, BLOCK_D, True)
    rows = bh * (T * G + PADDING) + i0 * G
    lse2_M = tl.load(lse2 + rows + r_M, mask=is_row_M, other=NEVER)
    delta_M = tl.load(delta + rows + r_M, mask=is_row_M, other=0.0)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    if HAS_SEGMENTS:
        first += b * T
        document = tl.load(first + i0)
        first_M = tl.load(first + i_M, mask=i_M < T, other=0)
        # Far and band lie before the documents that begin inside the block.
        before_lse2_M = tl.where(first_M == document, lse2_M, NEVER)
    else:
        document = 0
        before_lse2_M = lse2_M
    if HAS_GATE:
        log2_keep += bh * K * T
        begin, num_edge, diagonal, num_tiles = near_tiles(i0, i_last, document, window, BLOCK_N)
    else:
        begin, num_edge, diagonal, num_tiles = near_tiles(i0, i_last, document, T, BLOCK_N)
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
                x_MN, slope_MN = score(q_MD, k_ND, scale2, cap_in, cap_out, HAS_SOFTCAP)
                acc_MD = _fold_keys(x_MN + bias_N[None, :], slope_MN, before_lse2_M, delta_M, grad_MD, k_ND, v_ND, acc_MD, HAS_SOFTCAP)

    for tile in range(num_edge, diagonal):
        j0 = (begin + tile * BLOCK_N).to(tl.int64)
        k_ND = load_rows(k + j0 * k_stride_t, n_N * k_stride_t, None, D, BLOCK_D, False)
        v_ND = load_rows(v + j0 * v_stride_t, n_N * v_stride_t, None, D, BLOCK_D, False)
        x_MN, slope_MN = score(q_MD, k_ND, scale2, cap_in, cap_out, HAS_SOFTCAP)
        acc_MD = _fold_keys(x_MN, slope_MN, before_lse2_M, delta_M, grad_MD, k_ND, v_ND, acc_MD, HAS_SOFTCAP)

    num_near = num_edge + num_tiles - diagonal
    for step in range(num_near + num_edge_tiles(i0, i_last, document, windows, BLOCK_N, K)):
        near = begin + (step + tl.where(step < num_edge, 0, diagonal - num_edge)) * BLOCK_N
        j0, j_stop = masked_tile(step, num_near, near, i0, i_last, document, windows, T, BLOCK_N, K)
        j_N = j0 + n_N
        is_key_N = j_N < j_stop
        j0 = j0.to(tl.int64)
        k_ND = load_rows(k + j0 * k_stride_t, n_N * k_stride_t, is_key_N, D, BLOCK_D, True)
        v_ND = load_rows(v + j0 * v_stride_t, n_N * v_stride_t, is_key_N, D, BLOCK_D, True)
        x_MN, slope_MN = score(q_MD, k_ND, scale2, cap_in, cap_out, HAS_SOFTCAP)
        gap_MN = i_M[:, None] - j_N[None, :]
        if HAS_GATE:
            x_MN += masked_bias(log2_keep, gap_MN, j_N, is_key_N, windows, T, K)
        is_seen_MN = gap_MN >= 0
        if K > 1:
            is_seen_MN &= is_key_N[None, :]
        if HAS_SEGMENTS:
            is_seen_MN &= j_N[None, :] >= first_M[:, None]
        x_MN = tl.where(is_seen_MN, x_MN, NEG)
        acc_MD = _fold_keys(x_MN, slope_MN, lse2_M, delta_M, grad_MD, k_ND, v_ND, acc_MD, HAS_SOFTCAP)

    grad_q += (b * T + i0) * H * G * D + h * G * D
    store_rows(grad_q, ((r_M // G) * H * G + r_M % G) * D, is_row_M, acc_MD * scale, D, BLOCK_D)


@triton.jit
def _fold_queries(
    x_NM,
    slope_NM,
    lse2_M,
    delta_M,
    q_MD,
    grad_MD,
    v_ND,
    grad_k_ND,
    grad_v_ND,
    grad_gates,
    counts,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
    MASKED: tl.constexpr,
    K: tl.constexpr,
):
    """Add a tile's part of dk (still to be scaled), dv and the gradients of the K decisions.

    Decision r counts where counts[r], bool [N, M], is true if MASKED, else for all alike: counts[r] is 1.0 or 0.0.
    """
    p_NM = tl.exp2(x_NM - lse2_M[None, :])
    if NEEDS_V:
        grad_v_ND = tl.dot(p_NM.to(grad_MD.dtype), grad_MD, grad_v_ND, input_precision="ieee")
    if NEEDS_K or NEEDS_GATE:
        ds_NM = p_NM * (tl.dot(v_ND, tl.trans(grad_MD), input_precision="ieee") - delta_M[None, :])
        if NEEDS_GATE:
            added = ()
            if MASKED:
                for r in tl.static_range(K):
                    added += (grad_gates[r] + tl.sum(tl.where(counts[r], ds_NM, 0.0), 1),)
            else:
                sum_N = tl.sum(ds_NM, 1)
                for r in tl.static_range(K):
                    added += (grad_gates[r] + sum_N * counts[r],)
            grad_gates = added
        if NEEDS_K:
            if HAS_SOFTCAP:
                ds_NM *= slope_NM
            grad_k_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, grad_k_ND, input_precision="ieee")
    return grad_k_ND, grad_v_ND, grad_gates


@triton.jit(do_not_specialize=["window", "window_2", "window_3", "window_4", "sinks", "split_tiles", "piece_blocks", "most_kept"])
def keys_kernel(
    q,
    k,
    v,
    grad_out,
    log2_keep,
    kept,
    num_before,
    first,
    last,
    lse2,
    delta,
    grad_k,
    grad_v,
    grad_gate,
    partial_k,
    partial_v,
    partial_gate,
    partial_rows,
    num_partial,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    T,
    H,
    window,
    window_2,
    window_3,
    window_4,
    sinks,
    scale,
    scale2,
    cap_in,
    cap_out,
    split_tiles,
    piece_blocks,
    most_kept,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
    PADDING: tl.constexpr,
    PIECES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """grad_k and grad_v [B,T,H,D] and grad_gate [B,T,H,K] float32, contiguous.

    PIECES above 1 (see `launch.KeySplit`): the first programs are piece 0 of the first `split_tiles` tiles of all heads, then piece 1 of
    these, and so on. A tile that is cut leaves each piece's sums under the id of its program: partial_k and partial_v [.,N,D] and
    partial_gate [.,K,N], float32, the rows of keys in [T] as partial_rows [.,N] (-1: none) and the number of its pieces as num_partial
    under that of piece 0; 0 pieces say that it was not cut. HEADS: a power of two, at least as many as there are.

    Queries come in blocks of C from the tile's first key on. Those at the diagonal and those at which a window leaves the
    tile are masked element by element; between them and after them a bias per key says all.
    """
    C: tl.constexpr = BLOCK_M // G
    NEAR: tl.constexpr = NEEDS_K or NEEDS_V
    pid = tl.program_id(0)
    # Tile after tile of all heads, those with the most queries first: a head after the other would leave its long tiles for the end.
    programs_of_head = tl.cdiv(T, BLOCK_N) + (K if HAS_GATE else 0)
    if PIECES > 1:
        programs_of_head += (PIECES - 1) * split_tiles
    num_heads = tl.num_programs(0) // programs_of_head
    tile = pid // num_heads
    bh = pid % num_heads
    if PIECES > 1:
        may_split = tile < PIECES * split_tiles
        piece = tl.where(may_split, tile // split_tiles, 0)
        tile -= tl.where(may_split, piece, PIECES - 1) * split_tiles
        heads = tl.arange(0, HEADS)
        kept_of_heads = tl.load(num_before + heads.to(tl.int64) * K * (T + 1) + (K - 1) * (T + 1) + T, mask=heads < num_heads, other=0)
        may_split &= tl.sum(kept_of_heads, 0) < most_kept
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    bh = bh.to(tl.int64)

    n_N = tl.arange(0, BLOCK_N)
    if HAS_GATE:
        # Those of the longest reach first: they have the most queries.
        num_before += bh * K * (T + 1)
        kept += bh * K * T
        num_kept = tl.load(num_before + (K - 1) * (T + 1) + T)
        reach, num_keys, tiles_before, num_tiles = K, num_kept, 0, tl.cdiv(num_kept, BLOCK_N)
        for i in tl.static_range(K):
            r = K - 1 - i
            num_reaching = T
            if r > 0:
                num_reaching = tl.load(num_before + (r - 1) * (T + 1) + T)
            is_before = tile < num_tiles
            reach = tl.where(is_before, reach, r)
            num_keys = tl.where(is_before, num_keys, num_reaching - num_kept)
            tiles_before = tl.where(is_before, tiles_before, num_tiles)
            num_tiles += tl.cdiv(num_reaching - num_kept, BLOCK_N)
            num_kept = num_reaching
        at_N = (tile - tiles_before) * BLOCK_N + n_N
        is_key_N = at_N < num_keys
        row_N = tl.where(reach == K, at_N + (K - 1) * T, reach * T + T - 1 - at_N)
        index_N = tl.load(kept + row_N, mask=is_key_N, other=0)
    else:
        reach = 1
        index_N = tile * BLOCK_N + n_N
        is_key_N = index_N < T
        window = T
    windows = (window, window_2, window_3, window_4)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    k_ND = load_rows(k, index_N.to(tl.int64) * k_stride_t, is_key_N, D, BLOCK_D, True)
    v_ND = load_rows(v, index_N.to(tl.int64) * v_stride_t, is_key_N, D, BLOCK_D, True)

    if HAS_SEGMENTS:
        first += b * T
        last_N = tl.load(last + b * T + index_N, mask=is_key_N, other=-1)
        # Padding keeps to itself.
        is_seen_N = is_key_N & (last_N >= 0)
        i_end = tl.max(tl.where(is_seen_N, last_N, -1), 0) + 1
        document = tl.load(first + tl.maximum(i_end - 1, 0))
    else:
        is_seen_N = is_key_N
        i_end = T
        document = 0
    j_N = tl.where(is_seen_N, index_N, T)
    j_first = tl.min(j_N, 0)
    j_last = tl.max(tl.where(is_seen_N, index_N, -1), 0)
    if HAS_GATE:
        log2_keep += bh * K * T
        biases = ()
        for r in tl.static_range(K):
            biases += (tl.where(reach > r, tl.load(log2_keep + r * T + index_N, mask=is_key_N, other=0.0), NEG),)
        for r in tl.static_range(K):
            # Queries further than its reach see none of it, and those in the window do not ask its gate.
            seen_end = tl.minimum(i_end, j_last + windows[r] + 1) if NEAR or r > 0 else 0
            i_end = tl.where(reach == r, seen_end, i_end)
    else:
        biases = (tl.zeros([BLOCK_N], tl.float32),)
    # Blocks of queries after the tile's last key belong to its document: the keys of others are the same for all of them.
    other_N = tl.where(is_seen_N & (j_N >= document), 0.0, NEG)

    # Of the blocks of queries, masked are [0, num_diagonal) and, for each window that leaves the tile, [edges[r], fars[r]).
    span = tl.maximum(j_last - j_first, 0)
    num_blocks = tl.cdiv(tl.maximum(i_end - j_first, 0), C)
    # Only gaps beyond the window have a gate.
    num_diagonal = tl.minimum(tl.cdiv(span, C), num_blocks) if NEAR else 0
    far = num_diagonal
    edges, fars = (), ()
    for r in tl.static_range(K):
        edges += (tl.maximum(far, tl.minimum((windows[r] + 1) // C, num_blocks)),)
        far = tl.minimum((span + windows[r]) // C + 1, num_blocks)
        fars += (far,)
    # How many come before each edge in the masked loop, and before each range in the other; and of all.
    num_masked, num_plain = num_diagonal, edges[0] - num_diagonal if NEAR else 0
    masked_before, plain_before = (), ()
    for r in tl.static_range(K):
        masked_before += (num_masked,)
        plain_before += (num_plain,)
        num_masked += fars[r] - edges[r]
        num_plain += (edges[r + 1] if r + 1 < K else num_blocks) - fars[r]
    masked_begin, masked_end, plain_begin, plain_end = 0, num_masked, 0, num_plain
    if PIECES > 1:
        num_steps = num_masked + num_plain
        piece_steps = tl.where(may_split, piece_blocks, num_steps)
        is_split = num_steps > piece_steps
        piece_begin = tl.minimum(piece * piece_steps, num_steps)
        piece_end = tl.minimum(piece_begin + piece_steps, num_steps)
        masked_begin, masked_end = tl.minimum(piece_begin, num_masked), tl.minimum(piece_end, num_masked)
        plain_begin, plain_end = piece_begin - masked_begin, piece_end - masked_end
        if pid < split_tiles * num_heads:
            tl.store(partial_rows + pid.to(tl.int64) * BLOCK_N + n_N, tl.where(is_key_N, index_N, -1))
            tl.store(num_partial + pid, tl.where(is_split, tl.cdiv(num_steps, piece_steps), 0))
        # One number, for the loops have no registers to spare. What is not cut belongs to its first piece alone.
        to_partial = tl.where(is_split, tl.where(piece_begin < piece_end, 1, 0), tl.where(piece == 0, -1, 0))

    r_M = tl.arange(0, BLOCK_M)
    c_M = r_M // G
    q_offsets_M = row_offsets(r_M, q_stride_t, q_stride_h, G)
    grad_offsets_M = row_offsets(r_M, grad_stride_t, grad_stride_h, G)
    q += b * q_stride_b + h * G * q_stride_h
    grad_out += b * grad_stride_b + h * G * grad_stride_h
    lse2 += bh * (T * G + PADDING)
    delta += bh * (T * G + PADDING)
    grad_k_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_gates = (tl.zeros([BLOCK_N], tl.float32),) * K

    for step in range(masked_begin, masked_end):
        shift = 0
        for r in tl.static_range(K):
            shift = tl.where(step < masked_before[r], shift, edges[r] - masked_before[r])
        i0 = j_first + (step + shift) * C
        i_M = i0 + c_M
        at = i0.to(tl.int64)
        q_MD = load_rows(q + at * q_stride_t, q_offsets_M, i_M < T, D, BLOCK_D, True)
        grad_MD = load_rows(grad_out + at * grad_stride_t, grad_offsets_M, i_M < T, D, BLOCK_D, True)
        lse2_M = tl.load(lse2 + at * G + r_M)
        delta_M = tl.load(delta + at * G + r_M)
        if C * G != BLOCK_M:
            lse2_M = tl.where(r_M < C * G, lse2_M, NEVER)
        x_NM, slope_NM = score(k_ND, q_MD, scale2, cap_in, cap_out, HAS_SOFTCAP)
        gap_NM = i_M[None, :] - j_N[:, None]
        is_far = ()
        for r in tl.static_range(K):
            is_far += (gap_NM > windows[r],)
        if HAS_GATE:
            bias_NM = tl.where(is_far[0], biases[0][:, None], 0.0)
            for r in tl.static_range(1, K):
                bias_NM = tl.where(is_far[r], biases[r][:, None], bias_NM)
            x_NM += bias_NM
        is_seen_NM = gap_NM >= 0
        if HAS_SEGMENTS:
            first_M = tl.load(first + i_M, mask=i_M < T, other=0)
            is_seen_NM &= j_N[:, None] >= first_M[None, :]
        x_NM = tl.where(is_seen_NM, x_NM, NEG)
        grad_k_ND, grad_v_ND, grad_gates = _fold_queries(
            x_NM,
            slope_NM,
            lse2_M,
            delta_M,
            q_MD,
            grad_MD,
            v_ND,
            grad_k_ND,
            grad_v_ND,
            grad_gates,
            is_far,
            HAS_SOFTCAP,
            NEEDS_K,
            NEEDS_V,
            NEEDS_GATE,
            True,
            K,
        )

    for step in range(plain_begin, plain_end):
        shift = num_diagonal
        for r in tl.static_range(K):
            shift = tl.where(step < plain_before[r], shift, fars[r] - plain_before[r])
        i0 = j_first + (step + shift) * C
        i_M = i0 + c_M
        at = i0.to(tl.int64)
        q_MD = load_rows(q + at * q_stride_t, q_offsets_M, i_M < T, D, BLOCK_D, True)
        grad_MD = load_rows(grad_out + at * grad_stride_t, grad_offsets_M, i_M < T, D, BLOCK_D, True)
        lse2_M = tl.load(lse2 + at * G + r_M)
        delta_M = tl.load(delta + at * G + r_M)
        if C * G != BLOCK_M or HAS_SEGMENTS:
            # The document may end inside its last block.
            lse2_M = tl.where((r_M < C * G) & (i_M < i_end), lse2_M, NEVER)
        x_NM, slope_NM = score(k_ND, q_MD, scale2, cap_in, cap_out, HAS_SOFTCAP)
        counts = ()
        bias_N = tl.zeros([BLOCK_N], tl.float32)
        for r in tl.static_range(K):
            is_past = step >= plain_before[r]
            counts += (tl.where(is_past, 1.0, 0.0),)
            bias_N = tl.where(is_past, biases[r], bias_N)
        if HAS_GATE or HAS_SEGMENTS:
            x_NM += (other_N + bias_N)[:, None]
        grad_k_ND, grad_v_ND, grad_gates = _fold_queries(
            x_NM,
            slope_NM,
            lse2_M,
            delta_M,
            q_MD,
            grad_MD,
            v_ND,
            grad_k_ND,
            grad_v_ND,
            grad_gates,
            counts,
            HAS_SOFTCAP,
            NEEDS_K,
            NEEDS_V,
            NEEDS_GATE,
            False,
            K,
        )

    if NEEDS_GATE:
        if HAS_SEGMENTS:
            position_N = index_N - tl.load(first + index_N, mask=is_key_N, other=0)
        else:
            position_N = index_N
        # A sink's gate rules nothing, and a key left out passes nothing on.
        ruled_gates = ()
        for r in tl.static_range(K):
            ruled_gates += (tl.where((reach > r) & (position_N >= sinks), grad_gates[r], 0.0),)
    if PIECES > 1:
        if to_partial > 0:
            partial = tl.program_id(0).to(tl.int64) * BLOCK_N
            if NEEDS_K:
                store_rows(partial_k + partial * D, n_N * D, is_key_N, grad_k_ND, D, BLOCK_D)
            if NEEDS_V:
                store_rows(partial_v + partial * D, n_N * D, is_key_N, grad_v_ND, D, BLOCK_D)
            if NEEDS_GATE:
                for r in tl.static_range(K):
                    tl.store(partial_gate + partial * K + r * BLOCK_N + n_N, ruled_gates[r], mask=is_key_N)
        is_key_N &= to_partial < 0
    index_N = index_N.to(tl.int64)
    if NEEDS_K:
        store_rows(grad_k + b * T * H * D + h * D, index_N * H * D, is_key_N, grad_k_ND * scale, D, BLOCK_D)
    if NEEDS_V:
        store_rows(grad_v + b * T * H * D + h * D, index_N * H * D, is_key_N, grad_v_ND, D, BLOCK_D)
    if NEEDS_GATE:
        for r in tl.static_range(K):
            tl.store(grad_gate + ((b * T + index_N) * H + h) * K + r, ruled_gates[r], mask=is_key_N)

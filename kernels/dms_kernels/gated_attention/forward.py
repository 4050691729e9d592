"""Fused gated attention, forward: one program for a block of positions and the G query heads of one KV head.

Keys come in three loops, so that only the narrow last one pays for masks:

    far     the head's list of kept keys, copied together: a bias per key
    band    inside every query's window, before the block: nothing to add
    masked  the tiles where the window ends and those of the diagonal: bias, causality and documents element by element

Far and band know nothing of documents. Where one begins inside the block, its rows are set back before the masked loop.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, C positions of a block; M, N see `scores`.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

from dms_kernels.gated_attention.scores import NEG, NEVER, load_rows, near_tiles, score, store_rows


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


@triton.jit(do_not_specialize=["window"])
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
    scale2,
    cap_in,
    cap_out,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PADDING: tl.constexpr,
):
    """q [B,T,Hq,D], k and v [B,T,H,D] by strides; out [B,T,Hq,D] and lse2 [B,H,T,G] contiguous; lists: see `lists`."""
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

    r_M = tl.arange(0, BLOCK_M)
    i_M = i0 + r_M // G
    n_N = tl.arange(0, BLOCK_N)
    is_row_M = (r_M < C * G) & (i_M < T)
    q_offsets_M = (r_M // G) * q_stride_t + (r_M % G) * q_stride_h
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
        log2_keep += bh * T
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
        num_before += bh * (T + 1)
        far_begin = PADDING + tl.load(num_before + document)
        far_end = PADDING + tl.load(num_before + begin)
        kept_log2_keep += bh * (PADDING + T)
        kept_k += bh * (PADDING + T) * D
        kept_v += bh * (PADDING + T) * D
        # From the end, so that the last tile reaches into the padding before the list instead of needing a mask.
        for step in range(tl.cdiv(far_end - far_begin, BLOCK_N)):
            at = far_end - (step + 1) * BLOCK_N
            bias_N = tl.load(kept_log2_keep + at + n_N)
            if HAS_SEGMENTS:
                bias_N = tl.where(at + n_N >= far_begin, bias_N, NEG)
            k_ND = load_rows(kept_k + at.to(tl.int64) * D, n_N * D, None, D, BLOCK_D, False)
            v_ND = load_rows(kept_v + at.to(tl.int64) * D, n_N * D, None, D, BLOCK_D, False)
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

    for step in range(num_edge + num_tiles - diagonal):
        tile = step + tl.where(step < num_edge, 0, diagonal - num_edge)
        j_N = begin + tile * BLOCK_N + n_N
        is_near_N = j_N < T
        j0 = (begin + tile * BLOCK_N).to(tl.int64)
        k_ND = load_rows(k + j0 * k_stride_t, n_N * k_stride_t, is_near_N, D, BLOCK_D, True)
        v_ND = load_rows(v + j0 * v_stride_t, n_N * v_stride_t, is_near_N, D, BLOCK_D, True)
        x_MN, _ = score(q_MD, k_ND, scale2, cap_in, cap_out, HAS_SOFTCAP)
        gap_MN = i_M[:, None] - j_N[None, :]
        if HAS_GATE:
            bias_N = tl.load(log2_keep + j_N, mask=is_near_N, other=0.0)
            x_MN += tl.where(gap_MN > window, bias_N[None, :], 0.0)
        is_seen_MN = gap_MN >= 0
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

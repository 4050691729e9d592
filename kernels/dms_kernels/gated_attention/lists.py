"""Which keys are worth a far query's while: the list of each head, made on the device without a transfer.

A far key j can be left out if no query gives it weight: |q_i| |k_j| scale + log_keep_j < floor_i - margin for all i, where
floor_i bounds query i's log-sum-exp from below. Over i, |q_i| scale x - floor_i is convex in x = |k_j|, so its values at x = 0
and at the longest key bound it between them by a straight line. Gates of a trained model are nearly binary: most evicted keys go.

Letters: B batch, T tokens, H KV heads, G query heads of each, D head dim; M rows (position c, head g: c * G + g).
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

from dms_kernels.gated_attention.scores import NEG, NEVER, load_rows, store_rows, tanh


@triton.jit(do_not_specialize=["window", "sinks"])
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
    T,
    H,
    window,
    sinks,
    scale,
    cap_in,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Write norm_q [B,H,T,G], norm_k [B,H,T] and floor [B,H,T,G], all float32 (floor in nats).

    The floor is the larger of two scores that the query surely sees: its own key's and that of its document's first,
    to which trained models give much of their attention.
    """
    C: tl.constexpr = BLOCK_M // G
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
    q_MD = load_rows(q, (r_M // G) * q_stride_t + (r_M % G) * q_stride_h, is_row_M, D, BLOCK_D, True).to(tl.float32)
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
    gate_M = tl.load(gate + first_M.to(tl.int64) * gate_stride_t, mask=is_row_M, other=0.0)
    head_M += tl.where((i_M - first_M > window) & (sinks == 0), tl.maximum(gate_M, NEG, propagate_nan=tl.PropagateNan.ALL), 0.0)
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
    T,
    H,
    sinks,
    margin,
    cap_in,
    softcap,
    BLOCK: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One program for each sequence and head, over all its tokens in order.

    limits [B,H,3]: see `far_keys.choose`. Writes log2_keep [B,H,T], the bias of each token (0 for sinks, finite); kept [B,H,T]
    int32, the keys worth their while from the front, the others from the back; kept_log2_keep [B,H,PADDING+T], the bias of
    the former in that order, after a padding that weighs nothing; num_before [B,H,T+1] int32, how many of the former come
    before a token.
    """
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    log_keep += b * gate_stride_b + (bh % H) * gate_stride_h
    base = tl.load(limits + bh * 3)
    slope = tl.load(limits + bh * 3 + 1)
    reach = tl.load(limits + bh * 3 + 2)
    norm_k += bh * T
    log2_keep += bh * T
    kept += bh * T
    kept_log2_keep += bh * (PADDING + T)
    tl.store(kept_log2_keep + tl.arange(0, PADDING), tl.full([PADDING], NEG, tl.float32))
    kept_log2_keep += PADDING
    num_before += bh * (T + 1)
    num_kept = tl.zeros([], tl.int32)
    for at in range(0, T, BLOCK):
        j = at + tl.arange(0, BLOCK)
        is_key = j < T
        bias = tl.load(log_keep + j.to(tl.int64) * gate_stride_t, mask=is_key, other=0.0)
        bias = tl.maximum(bias, NEG, propagate_nan=tl.PropagateNan.ALL)
        if HAS_SEGMENTS:
            position = j - tl.load(first + b * T + j, mask=is_key, other=0)
        else:
            position = j
        bias = tl.where(position < sinks, 0.0, bias)
        norm = tl.load(norm_k + j, mask=is_key, other=0.0)
        ceiling = base + slope * norm
        if HAS_SOFTCAP:
            ceiling = tl.minimum(ceiling, base + tanh(norm * reach * cap_in) * softcap)
        # Worded so that a NaN keeps the key and comes through.
        is_kept = is_key & ~(ceiling + bias < -margin)
        after = num_kept + tl.cumsum(is_kept.to(tl.int32), 0)
        before = after - is_kept.to(tl.int32)
        bias2 = bias * 1.4426950408889634
        tl.store(log2_keep + j, bias2, mask=is_key)
        tl.store(num_before + j, before, mask=is_key)
        tl.store(kept + tl.where(is_kept, before, T - 1 - (j - before)), j, mask=is_key)
        tl.store(kept_log2_keep + before, bias2, mask=is_kept)
        num_kept += tl.sum(is_kept.to(tl.int32), 0)
    tl.store(num_before + T, num_kept)


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
    PADDING: tl.constexpr,
):
    """Write kept_k and kept_v [B,H,PADDING+T,D]: zeros, then the listed keys one after the other; the rest stays.

    A copy, for the kernels read a row as often as query blocks follow it, and loads that wait for an index are not prefetched.
    """
    num_tiles = tl.cdiv(PADDING + T, BLOCK_N)
    pid = tl.program_id(0)
    bh = (pid // num_tiles).to(tl.int64)
    num_kept = tl.load(num_before + bh * (T + 1) + T)
    row_N = (pid % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_written_N = row_N < PADDING + num_kept
    is_kept_N = (row_N >= PADDING) & is_written_N
    index_N = tl.load(kept + bh * T + row_N - PADDING, mask=is_kept_N, other=0).to(tl.int64)
    k += (bh // H) * k_stride_b + (bh % H) * k_stride_h
    v += (bh // H) * v_stride_b + (bh % H) * v_stride_h
    k_ND = load_rows(k, index_N * k_stride_t, is_kept_N, D, BLOCK_D, True)
    v_ND = load_rows(v, index_N * v_stride_t, is_kept_N, D, BLOCK_D, True)
    head = bh * (PADDING + T) * D
    store_rows(kept_k + head, row_N.to(tl.int64) * D, is_written_N, k_ND, D, BLOCK_D)
    store_rows(kept_v + head, row_N.to(tl.int64) * D, is_written_N, v_ND, D, BLOCK_D)

"""What the distillation loss does with rows of logits: divergences in one read of each pair, gradients in another.

Products x are read in the dtype of the matrix product and are float32 from there on. Logits are in units of ln 2, so that
e^logit is 2^z: z = unit * y, with y = tanh(inner * (x + bias)), inner = scale / softcap and unit = log2(e) * softcap, or
without a softcap y = +-(x + bias) and unit = log2(e) * |scale|. The multiplication by unit is left to the fused
multiply-add that subtracts the maximum, whose rounded value cancels. With p = 2^z / sum 2^z of the student (s) and the
teacher (t):

    forward   KL(t || s) = sum p_t (z_t - z_s) - lse_t + lse_s             d/dz_s = p_s - p_t
    reverse   KL(s || t) = sum p_s (z_s - z_t) - lse_s + lse_t             d/dz_s = p_s (log p_s - log p_t - KL(s || t))
    between   beta KL(t || m) + (1 - beta) KL(s || m)                      d/dz_s = (1 - beta) p_s (log p_s - log p_m - KL(s || m))
              with m = beta t + (1 - beta) s: log p_m - log p_s = log(1 - beta + beta p_t / p_s)

At the ends one pass finds the maxima, the sums and the cross term together, scaling all three down whenever a maximum
moves, and a second writes the gradient: two reads. Between them the mixture needs both normalisers before its logarithm,
so its sums are a pass of their own: three reads.

A logit of -inf, as a bias that masks tokens makes, counts as LOWEST: what has no chance on either side adds 0 and not
0 * inf. What has one on one side only makes a KL so large that it is handed on as inf. NaN stays NaN.

Letters: n rows, V vocabulary, P parts in which a row is cut; s student, t teacher, m their mixture.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

# Far below any logit, and far enough above the least float32 that sums over a vocabulary of them are finite.
LOWEST = tl.constexpr(-1.0e30)
# Maximum of no logit at all: above LOWEST times any unit, so that what is masked weighs 0 however the product is rounded.
EMPTY = tl.constexpr(-1.0e20)
# No divergence of ordinary logits gets there.
INFINITE = tl.constexpr(1.0e20)

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
BETWEEN = tl.constexpr(2)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    """PRECISE: by its series near 0, where the quotient loses digits that logits rounded to half do not have."""
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    if PRECISE:
        square = tl.minimum(x * x, 1.0)
        series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
        tanh = tl.where(tl.abs(x) < 0.3, x * series, tanh)
    return tanh


@triton.jit
def _logits(row, bias, columns, stride, V, inner, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, FLIP: tl.constexpr, MASKED: tl.constexpr):
    """y at these columns, LOWEST past the vocabulary."""
    inside = columns < V
    if MASKED:
        # Up to the stride, a multiple of 16, so that loads stay wide; nobody has written what is past V.
        y = tl.load(row + columns, mask=columns < stride, other=0.0).to(tl.float32)
    else:
        y = tl.load(row + columns).to(tl.float32)
    if HAS_BIAS:
        if MASKED:
            y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            y += tl.load(bias + columns).to(tl.float32)
    if HAS_CAP:
        y = _tanh(y * inner, row.dtype.element_ty == tl.float32)
    if FLIP:
        y = -y
    if HAS_BIAS:
        y = tl.maximum(y, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    if MASKED:
        y = tl.where(inside, y, LOWEST)
    return y


@triton.jit
def _max_of_lane(x):
    return tl.max(x, 1, keep_dims=True)


@triton.jit
def _sum_of_lane(x):
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _add_statistics(top_s, sum_s, top_t, sum_t, cross, y_s, y_t, unit, KIND: tl.constexpr):
    """Each lane's running maximum of z, sum relative to it and cross term by unit, with a tile's columns added."""
    new_s = tl.maximum(top_s, _max_of_lane(y_s) * unit)
    new_t = tl.maximum(top_t, _max_of_lane(y_t) * unit)
    shrink_s = tl.exp2(top_s - new_s)
    shrink_t = tl.exp2(top_t - new_t)
    p_s = tl.exp2(tl.fma(y_s, unit, -new_s))
    p_t = tl.exp2(tl.fma(y_t, unit, -new_t))
    sum_s = sum_s * shrink_s + _sum_of_lane(p_s)
    sum_t = sum_t * shrink_t + _sum_of_lane(p_t)
    if KIND == FORWARD:
        cross = cross * shrink_t + _sum_of_lane(p_t * (y_t - y_s))
    if KIND == REVERSE:
        cross = cross * shrink_s + _sum_of_lane(p_s * (y_s - y_t))
    return new_s, sum_s, new_t, sum_t, cross


@triton.jit(do_not_specialize=["tiles", "num_rows"])
def row_statistics(
    logits_s,  # [n, stride], V columns in use
    logits_t,  # likewise
    bias_s,  # [V], read if HAS_BIAS_S
    bias_t,
    partial,  # out: [5, n, P] float32: maximum and sum of s, of t, cross term
    stride,
    V,
    tiles,  # tiles of a program
    num_rows,
    inner,
    unit,
    KIND: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FLIP: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One pass over a part of a row. A lane is one thread's columns: what runs along the row stays in its registers,
    and lanes meet once, at the end."""
    row, index, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits_s += row * stride
    logits_t += row * stride
    STEP: tl.constexpr = LANES * WIDTH
    TILE: tl.constexpr = UNROLL * STEP
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    top_s = tl.full([LANES, 1], EMPTY, tl.float32)
    top_t = tl.full([LANES, 1], EMPTY, tl.float32)
    sum_s = tl.zeros([LANES, 1], tl.float32)
    sum_t = tl.zeros([LANES, 1], tl.float32)
    cross = tl.zeros([LANES, 1], tl.float32)
    begin = index * tiles * TILE
    end = tl.minimum(begin + tiles * TILE, V)
    whole = begin + (end - begin) // TILE * TILE
    for first in range(begin, whole, TILE):
        for step in tl.static_range(UNROLL):
            offsets = first + step * STEP + columns
            y_s = _logits(logits_s, bias_s, offsets, stride, V, inner, HAS_BIAS_S, HAS_CAP, FLIP, False)
            y_t = _logits(logits_t, bias_t, offsets, stride, V, inner, HAS_BIAS_T, HAS_CAP, FLIP, False)
            top_s, sum_s, top_t, sum_t, cross = _add_statistics(top_s, sum_s, top_t, sum_t, cross, y_s, y_t, unit, KIND)
    for first in range(whole, end, STEP):
        y_s = _logits(logits_s, bias_s, first + columns, stride, V, inner, HAS_BIAS_S, HAS_CAP, FLIP, True)
        y_t = _logits(logits_t, bias_t, first + columns, stride, V, inner, HAS_BIAS_T, HAS_CAP, FLIP, True)
        top_s, sum_s, top_t, sum_t, cross = _add_statistics(top_s, sum_s, top_t, sum_t, cross, y_s, y_t, unit, KIND)

    row_top_s = tl.max(top_s)
    row_top_t = tl.max(top_t)
    shrink_s = tl.exp2(top_s - row_top_s)
    shrink_t = tl.exp2(top_t - row_top_t)
    plane = num_rows.to(tl.int64) * num_parts
    partial += row * num_parts + index
    tl.store(partial, row_top_s)
    tl.store(partial + plane, tl.sum(sum_s * shrink_s))
    tl.store(partial + 2 * plane, row_top_t)
    tl.store(partial + 3 * plane, tl.sum(sum_t * shrink_t))
    if KIND == FORWARD:
        tl.store(partial + 4 * plane, tl.sum(cross * shrink_t) * unit)
    if KIND == REVERSE:
        tl.store(partial + 4 * plane, tl.sum(cross * shrink_s) * unit)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def merge_statistics(
    partial,  # [5, n, P]
    live,  # [n] bool, read if HAS_LIVE: rows that count
    constants,  # out: [6, n] float32: see below
    loss,  # out: [n] float32, in nats; not written if KIND is BETWEEN
    num_rows,
    num_parts,
    KIND: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Rows' normalisers, and at the ends their divergences, from the parts'. Constants of a row: maximum and log2 of the
    sum of s, of t, divergence in bits that its gradient subtracts, 1 or (where the row does not count) 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    index = tl.arange(0, PARTS)[None, :]
    place = row.to(tl.int64)[:, None] * num_parts + index
    given = inside[:, None] & (index < num_parts)
    plane = num_rows.to(tl.int64) * num_parts
    tops_s = tl.load(partial + place, mask=given, other=EMPTY)
    tops_t = tl.load(partial + 2 * plane + place, mask=given, other=EMPTY)
    top_s = tl.max(tops_s, 1)
    top_t = tl.max(tops_t, 1)
    shrink_s = tl.exp2(tops_s - top_s[:, None])
    shrink_t = tl.exp2(tops_t - top_t[:, None])
    sum_s = tl.sum(tl.load(partial + plane + place, mask=given, other=0.0) * shrink_s, 1)
    sum_t = tl.sum(tl.load(partial + 3 * plane + place, mask=given, other=0.0) * shrink_t, 1)
    # Rows past the last have no sum.
    sum_s = tl.where(inside, sum_s, 1.0)
    sum_t = tl.where(inside, sum_t, 1.0)
    log_s = tl.log2(sum_s)
    log_t = tl.log2(sum_t)
    if HAS_LIVE:
        counts = tl.load(live + row, mask=inside, other=0).to(tl.int1)
    else:
        counts = inside
    tl.store(constants + row, top_s, mask=inside)
    tl.store(constants + num_rows + row, log_s, mask=inside)
    tl.store(constants + 2 * num_rows + row, top_t, mask=inside)
    tl.store(constants + 3 * num_rows + row, log_t, mask=inside)
    tl.store(constants + 5 * num_rows + row, tl.where(counts, 1.0, 0.0), mask=inside)
    if KIND != BETWEEN:
        cross = tl.load(partial + 4 * plane + place, mask=given, other=0.0)
        # Maxima and logarithms are subtracted apart: the difference of two lse would lose their size in digits.
        apart = (top_s - top_t) + (log_s - log_t)
        if KIND == FORWARD:
            divergence = tl.sum(cross * shrink_t, 1) / sum_t + apart
        else:
            divergence = tl.sum(cross * shrink_s, 1) / sum_s - apart
        tl.store(constants + 4 * num_rows + row, divergence, mask=inside)
        nats = tl.where(divergence > INFINITE, float("inf"), divergence * 0.6931471805599453)
        tl.store(loss + row, tl.where(counts, nats, 0.0), mask=inside)


@triton.jit
def _log_ratios(a, b, beta):
    """log2(p_s / p_m) and log2(p_t / p_m) of a = log2 p_s and b = log2 p_t."""
    # Beyond these bounds the smaller probability is too small for its factor to matter, and the larger one's is exact.
    apart = tl.minimum(tl.maximum(b - a, -126.0), 126.0)
    ratio = -tl.log2((1.0 - beta) + beta * tl.exp2(apart))
    return ratio, ratio + apart


@triton.jit
def _add_mixture(sum_s, sum_t, y_s, y_t, unit, top_s, log_s, top_t, log_t, beta):
    a = tl.fma(y_s, unit, -top_s) - log_s
    b = tl.fma(y_t, unit, -top_t) - log_t
    ratio_s, ratio_t = _log_ratios(a, b, beta)
    sum_s += tl.exp2(a) * ratio_s
    sum_t += tl.exp2(b) * ratio_t
    return sum_s, sum_t


@triton.jit(do_not_specialize=["tiles", "num_rows"])
def mixture_divergences(
    logits_s,  # [n, stride], V columns in use
    logits_t,
    bias_s,
    bias_t,
    constants,  # [6, n]
    partial,  # out: [2, n, P] float32: parts of KL(s || m) and of KL(t || m), in bits
    stride,
    V,
    tiles,
    num_rows,
    inner,
    unit,
    beta,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, index, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits_s += row * stride
    logits_t += row * stride
    top_s = tl.load(constants + row)
    log_s = tl.load(constants + num_rows + row)
    top_t = tl.load(constants + 2 * num_rows + row)
    log_t = tl.load(constants + 3 * num_rows + row)
    columns = tl.arange(0, BLOCK)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    begin = index * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, V)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for first in range(begin, whole, BLOCK):
        y_s = _logits(logits_s, bias_s, first + columns, stride, V, inner, HAS_BIAS_S, HAS_CAP, FLIP, False)
        y_t = _logits(logits_t, bias_t, first + columns, stride, V, inner, HAS_BIAS_T, HAS_CAP, FLIP, False)
        sum_s, sum_t = _add_mixture(sum_s, sum_t, y_s, y_t, unit, top_s, log_s, top_t, log_t, beta)
    for first in range(whole, end, BLOCK):
        y_s = _logits(logits_s, bias_s, first + columns, stride, V, inner, HAS_BIAS_S, HAS_CAP, FLIP, True)
        y_t = _logits(logits_t, bias_t, first + columns, stride, V, inner, HAS_BIAS_T, HAS_CAP, FLIP, True)
        sum_s, sum_t = _add_mixture(sum_s, sum_t, y_s, y_t, unit, top_s, log_s, top_t, log_t, beta)
    partial += row * num_parts + index
    tl.store(partial, tl.sum(sum_s))
    tl.store(partial + num_rows.to(tl.int64) * num_parts, tl.sum(sum_t))


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def merge_mixture(
    partial,  # [2, n, P]
    constants,  # [6, n]; out: the divergence in bits
    loss,  # out: [n] float32, in nats
    num_rows,
    num_parts,
    beta,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    index = tl.arange(0, PARTS)[None, :]
    place = row.to(tl.int64)[:, None] * num_parts + index
    given = inside[:, None] & (index < num_parts)
    kl_s = tl.sum(tl.load(partial + place, mask=given, other=0.0), 1)
    kl_t = tl.sum(tl.load(partial + num_rows.to(tl.int64) * num_parts + place, mask=given, other=0.0), 1)
    counts = tl.load(constants + 5 * num_rows + row, mask=inside, other=0.0)
    tl.store(constants + 4 * num_rows + row, kl_s, mask=inside)
    nats = (beta * kl_t + (1.0 - beta) * kl_s) * 0.6931471805599453
    tl.store(loss + row, tl.where(counts > 0, nats, 0.0), mask=inside)


@triton.jit
def _gradient(y_s, y_t, unit, top_s, log_s, top_t, log_t, divergence, factor, beta, KIND: tl.constexpr, HAS_CAP: tl.constexpr):
    """By the student's x: factor holds what is the same for the whole row."""
    a = tl.fma(y_s, unit, -top_s) - log_s
    b = tl.fma(y_t, unit, -top_t) - log_t
    if KIND == FORWARD:
        gradient = tl.exp2(a) - tl.exp2(b)
    elif KIND == REVERSE:
        gradient = tl.exp2(a) * ((a - b) - divergence)
    else:
        ratio_s, _ = _log_ratios(a, b, beta)
        gradient = tl.exp2(a) * (ratio_s - divergence)
    gradient *= factor
    if HAS_CAP:
        gradient *= 1.0 - y_s * y_s
    return gradient


@triton.jit(do_not_specialize=["tiles", "num_rows"])
def write_gradients(
    logits_s,  # [n, stride], V columns in use; out: the gradients by them
    logits_t,
    bias_s,
    bias_t,
    constants,  # [6, n]
    stride,
    V,
    tiles,
    num_rows,
    inner,
    unit,
    beta,
    scale,
    KIND: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits_s += row * stride
    logits_t += row * stride
    top_s = tl.load(constants + row)
    log_s = tl.load(constants + num_rows + row)
    top_t = tl.load(constants + 2 * num_rows + row)
    log_t = tl.load(constants + 3 * num_rows + row)
    divergence = tl.load(constants + 4 * num_rows + row)
    factor = tl.load(constants + 5 * num_rows + row) * scale
    columns = tl.arange(0, BLOCK)
    begin = index * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, V)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for first in range(begin, whole, BLOCK):
        y_s = _logits(logits_s, bias_s, first + columns, stride, V, inner, HAS_BIAS_S, HAS_CAP, FLIP, False)
        y_t = _logits(logits_t, bias_t, first + columns, stride, V, inner, HAS_BIAS_T, HAS_CAP, FLIP, False)
        gradient = _gradient(y_s, y_t, unit, top_s, log_s, top_t, log_t, divergence, factor, beta, KIND, HAS_CAP)
        tl.store(logits_s + first + columns, gradient.to(logits_s.dtype.element_ty))
    for first in range(whole, end, BLOCK):
        y_s = _logits(logits_s, bias_s, first + columns, stride, V, inner, HAS_BIAS_S, HAS_CAP, FLIP, True)
        y_t = _logits(logits_t, bias_t, first + columns, stride, V, inner, HAS_BIAS_T, HAS_CAP, FLIP, True)
        gradient = _gradient(y_s, y_t, unit, top_s, log_s, top_t, log_t, divergence, factor, beta, KIND, HAS_CAP)
        tl.store(logits_s + first + columns, gradient.to(logits_s.dtype.element_ty), mask=first + columns < stride)

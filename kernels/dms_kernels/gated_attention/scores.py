"""What the kernels of the fused gated attention share: scores, rows and the order of tiles. All in base 2.

Letters: M rows of a tile (position c, query head g: row c * G + g), N keys of a tile, D head dim.
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

"""Fused gated attention, backward: the sums of tiles of keys that were cut into pieces. No atomics: pieces are added in their order.

Letters: B batch, T tokens, H KV heads, D head dim, K windows, N keys of a tile.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

from dms_kernels.gated_attention.forward import load_rows, store_rows


@triton.jit
def merge_kernel(
    partial_k,
    partial_v,
    partial_gate,
    partial_rows,
    num_partial,
    grad_k,
    grad_v,
    grad_gate,
    T,
    H,
    num_heads,
    num_split,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
):
    """Add up the pieces of tiles that `keys_kernel` cut, the nearest queries' first. num_split: tiles of all heads that may be cut.

    One program for ROWS keys of a tile.
    """
    pid = tl.program_id(0)
    tile = pid // (BLOCK_N // ROWS)
    bh = (tile % num_heads).to(tl.int64)
    b = bh // H
    h = bh % H
    n_N = (pid % (BLOCK_N // ROWS)) * ROWS + tl.arange(0, ROWS)
    num_pieces = tl.load(num_partial + tile)
    row_N = tl.load(partial_rows + tile.to(tl.int64) * BLOCK_N + n_N)
    is_key_N = (row_N >= 0) & (num_pieces > 0)
    index_N = (b * T + row_N) * H + h
    grad_k_ND = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_v_ND = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for piece in range(num_pieces):
        partial = (piece * num_split + tile).to(tl.int64) * BLOCK_N
        if NEEDS_K:
            grad_k_ND += load_rows(partial_k + partial * D, n_N * D, is_key_N, D, BLOCK_D, True)
        if NEEDS_V:
            grad_v_ND += load_rows(partial_v + partial * D, n_N * D, is_key_N, D, BLOCK_D, True)
    if NEEDS_K:
        store_rows(grad_k, index_N * D, is_key_N, grad_k_ND * scale, D, BLOCK_D)
    if NEEDS_V:
        store_rows(grad_v, index_N * D, is_key_N, grad_v_ND, D, BLOCK_D)
    if NEEDS_GATE:
        for r in tl.static_range(K):
            grad_gate_N = tl.zeros([ROWS], tl.float32)
            for piece in range(num_pieces):
                partial = (piece * num_split + tile).to(tl.int64) * BLOCK_N
                grad_gate_N += tl.load(partial_gate + partial * K + r * BLOCK_N + n_N, mask=is_key_N, other=0.0)
            tl.store(grad_gate + index_N * K + r, grad_gate_N, mask=is_key_N)

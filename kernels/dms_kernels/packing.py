"""Entries of int4 pages in Triton kernels: as `quantization` has them, written and read.

Shapes: N entries, D head dim, GROUP components that share a scale. Rows are padded to the next power of 2, which no group crosses: D is a multiple
of GROUP. Pointers are those of the keys' rows; TO_VALUE rows behind each is that of the entry's value.
"""

import torch
from torch import Tensor

from dms_kernels.quantization import KEY_LEVELS, VALUE_LEVELS, group_size

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error


_KEY_LEVELS, _VALUE_LEVELS = tl.constexpr(KEY_LEVELS), tl.constexpr(VALUE_LEVELS)


def group_of(pages: Tensor | None, head_dim: int) -> int:
    """GROUP of these pages; 0: they are not of int4."""
    return group_size(head_dim) if pages is not None and pages.dtype == torch.uint8 else 0


@triton.jit
def _codes(x, LEVELS: tl.constexpr, GROUP: tl.constexpr):
    """x [N, D] -> codes of the even and of the odd components [N, D / GROUP, GROUP / 2] int32, scale and least component [N, D / GROUP] as int16."""
    groups = tl.reshape(x.to(tl.float32), [x.shape[0], x.shape[1] // GROUP, GROUP])
    low = tl.min(groups, 2)
    span = tl.max(groups, 2) - low
    least = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    scale = tl.minimum(span * (1.0 / LEVELS), 65504.0).to(tl.float16)
    step = scale.to(tl.float32)
    # Divided as PyTorch does: another number of the last bit would put what lies between two codes on the other side.
    factor = tl.div_rn(1.0, tl.where(step > 0, step, 1.0))
    codes = tl.floor((groups - least.to(tl.float32)[:, :, None]) * factor[:, :, None] + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS * 1.0).to(tl.int32)
    even, odd = tl.split(tl.reshape(codes, [x.shape[0], x.shape[1] // GROUP, GROUP // 2, 2]))
    return even, odd, scale.to(tl.int16, bitcast=True), least.to(tl.int16, bitcast=True)


@triton.jit
def store_packed(
    rows_N, scale_rows_N, k, v, there_N, TO_VALUE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Keys and values [N, DP], zeros from D on, to entries that begin at these pointers."""
    GROUPS: tl.constexpr = D // GROUP
    at, group = tl.arange(0, DP // 2)[None, :], tl.arange(0, DP // GROUP)[None, :]
    there, there_group = there_N[:, None] & (at < D // 2), there_N[:, None] & (group < GROUPS)
    even, odd, scale, least = _codes(k, _KEY_LEVELS, GROUP)
    scales = scale_rows_N[:, None] + group
    bit = tl.arange(0, GROUP // 2)[None, None, :]
    tl.store(rows_N[:, None] + at, tl.reshape((even & 15) | (odd & 15) << 4, [k.shape[0], DP // 2]).to(tl.uint8), mask=there)
    tl.store(scales, scale, mask=there_group)
    tl.store(scales + GROUPS, least, mask=there_group)
    tl.store(scales + 2 * GROUPS, tl.sum(even >> 4 << bit, 2).to(tl.int16), mask=there_group)
    fifth = tl.sum(odd >> 4 << bit, 2).to(tl.int16)
    even, odd, scale, least = _codes(v, _VALUE_LEVELS, GROUP)
    scales += TO_VALUE * 3 * GROUPS
    tl.store(rows_N[:, None] + TO_VALUE * (D // 2) + at, tl.reshape(even | odd << 4, [k.shape[0], DP // 2]).to(tl.uint8), mask=there)
    tl.store(scales, scale, mask=there_group)
    tl.store(scales + GROUPS, least, mask=there_group)
    tl.store(scales + 2 * GROUPS, fifth, mask=there_group)


@triton.jit
def _as_float(codes):
    """Small whole numbers in float32: beside 2^23 they are the last bits. An instruction that converts takes several times as long as these two."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    return tl.load(pointers)


@triton.jit
def load_packed(
    rows_N, scale_rows_N, there_N, dtype: tl.constexpr, KEYS: tl.constexpr, TO_VALUE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys, or else values, of entries that begin at these pointers -> [N, DP] in `dtype`; 0 beyond D, and where MASKED in rows that are not there."""
    N: tl.constexpr = rows_N.shape[0]
    GROUPS: tl.constexpr = D // GROUP
    SOME: tl.constexpr = MASKED or DP != D
    at, group = tl.arange(0, DP // 2)[None, :], tl.arange(0, DP // GROUP)[None, :]
    there, there_group = at < D // 2, group < GROUPS
    if MASKED:
        there, there_group = there & there_N[:, None], there_group & there_N[:, None]
    scales = scale_rows_N[:, None] + group
    if not KEYS:
        rows_N += TO_VALUE * (D // 2)
        scales += TO_VALUE * 3 * GROUPS
    numbers = tl.reshape(_load(rows_N[:, None] + at, there, SOME).to(tl.int32), [N, DP // GROUP, GROUP // 2])
    scale = _load(scales, there_group, SOME).to(tl.float16, bitcast=True).to(tl.float32)[:, :, None]
    least = _load(scales + GROUPS, there_group, SOME).to(tl.float16, bitcast=True).to(tl.float32)[:, :, None]
    even, odd = numbers & 15, numbers >> 4
    if KEYS:
        bit = tl.arange(0, GROUP // 2)[None, None, :]
        even_fifth = _load(scales + 2 * GROUPS, there_group, SOME).to(tl.int32)[:, :, None]
        odd_fifth = _load(scales + (2 + TO_VALUE * 3) * GROUPS, there_group, SOME).to(tl.int32)[:, :, None]
        even, odd = even | (even_fifth >> bit & 1) << 4, odd | (odd_fifth >> bit & 1) << 4
    return tl.reshape(tl.join((_as_float(even) * scale + least).to(dtype), (_as_float(odd) * scale + least).to(dtype)), [N, DP])

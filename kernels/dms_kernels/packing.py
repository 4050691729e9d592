"""Entries of int4 pages in Triton kernels: as `quantization` has them, written and read.

Shapes: N rows, D head dim, GROUP components that share a scale. Rows are padded to the next power of 2, which no group crosses: D is a multiple
of GROUP. A group's scale and least component are one number of 32 bits here, the scale in the low half.
"""

import torch
from torch import Tensor

from dms_kernels.quantization import group_size

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error


def group_of(pages: Tensor | None, head_dim: int) -> int:
    """GROUP of these pages; 0: they are not of int4."""
    return group_size(head_dim) if pages is not None and pages.dtype == torch.uint8 else 0


def scales_of(pages: Tensor | None, page_scales: Tensor | None) -> Tensor | None:
    """page_scales as kernels take them, in the same memory."""
    if pages is None or page_scales is None or pages.dtype != torch.uint8:
        return page_scales
    return page_scales.view(torch.int32)


@triton.jit
def packed(x, GROUP: tl.constexpr):
    """x [N, D] -> [N, D / 2] uint8, and [N, D / GROUP] int32."""
    groups = tl.reshape(x.to(tl.float32), [x.shape[0], x.shape[1] // GROUP, GROUP])
    low = tl.min(groups, 2)
    span = tl.max(groups, 2) - low
    least = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    scale = tl.minimum(span * (1.0 / 15.0), 65504.0).to(tl.float16)
    step = scale.to(tl.float32)
    # Divided as PyTorch does: another number of the last bit would put what lies between two codes on the other side.
    factor = tl.div_rn(1.0, tl.where(step > 0, step, 1.0))
    codes = tl.floor((groups - least.to(tl.float32)[:, :, None]) * factor[:, :, None] + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.int32)
    low_codes, high_codes = tl.split(tl.reshape(codes, [x.shape[0], x.shape[1] // 2, 2]))
    low_half, high_half = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, least.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (low_codes | (high_codes << 4)).to(tl.uint8), low_half | high_half


@triton.jit
def store_packed(rows_N, scale_rows_N, x, there_N, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr):
    """x [N, DP], zeros from D on, to entries that begin at these pointers."""
    at, group = tl.arange(0, DP // 2), tl.arange(0, DP // GROUP)
    numbers, scales = packed(x, GROUP)
    tl.store(rows_N[:, None] + at[None, :], numbers, mask=there_N[:, None] & (at < D // 2)[None, :])
    tl.store(scale_rows_N[:, None] + group[None, :], scales, mask=there_N[:, None] & (group < D // GROUP)[None, :])


@triton.jit
def _as_float(codes):
    """0 to 15 in float32: beside 2^23 they are the last bits. An instruction that converts takes several times as long as these two."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def load_packed(
    rows_N, scale_rows_N, there_N, dtype: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr
):
    """Entries that begin at these pointers -> [N, DP] in `dtype`; 0 beyond D, and where MASKED in rows that are not there."""
    N: tl.constexpr = rows_N.shape[0]
    at, group = tl.arange(0, DP // 2)[None, :], tl.arange(0, DP // GROUP)[None, :]
    if MASKED:
        numbers = tl.load(rows_N[:, None] + at, mask=there_N[:, None] & (at < D // 2), other=0)
        scales = tl.load(scale_rows_N[:, None] + group, mask=there_N[:, None] & (group < D // GROUP), other=0)
    elif DP == D:
        numbers = tl.load(rows_N[:, None] + at)
        scales = tl.load(scale_rows_N[:, None] + group)
    else:
        numbers = tl.load(rows_N[:, None] + at, mask=at < D // 2, other=0)
        scales = tl.load(scale_rows_N[:, None] + group, mask=group < D // GROUP, other=0)
    scale = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, :, None]
    least = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, :, None]
    numbers = tl.reshape(numbers, [N, DP // GROUP, GROUP // 2])
    even = (_as_float(numbers & 15) * scale + least).to(dtype)
    odd = (_as_float(numbers >> 4) * scale + least).to(dtype)
    return tl.reshape(tl.join(even, odd), [N, DP])

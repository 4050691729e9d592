"""Arithmetic of the narrow types, each operation rounded once, to nearest even, as PTX defines it.

bfloat16 and float16 are held as their bits in uint16. A sum or product that float64 does not hold exactly is rounded to odd there (Boldo
and Melquiond, "Emulation of FMA and correctly rounded sums", 2008): rounded once more it comes out as if it had been rounded once.
"""

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray
_TINIEST = {np.dtype(np.float32): np.float32(2.0**-126), np.dtype(np.float64): np.float64(2.0**-1022)}


def bf16_values(bits: Array) -> Array:
    """float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(values: Array) -> Array:
    """Of float32, rounded; one NaN for all."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FFF
    return rounded


def f16_values(bits: Array) -> Array:
    """float32."""
    return bits.view(np.float16).astype(np.float32)


def f16_bits(values: Array) -> Array:
    return np.asarray(values).astype(np.float16).view(np.uint16)


def e4m3_values(bits: Array) -> Array:
    """float32, of uint8."""
    return torch.from_numpy(np.array(bits)).view(torch.float8_e4m3fn).float().numpy()


def e4m3_bits(values: Array) -> Array:
    """Of float32, rounded; what is beyond the largest becomes that."""
    return torch.from_numpy(np.clip(values, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def values_of(bits: Array, kind: str) -> Array:
    return bf16_values(bits) if kind == "bf16" else f16_values(bits)


def bits_of(values: Array, kind: str) -> Array:
    return bf16_bits(values) if kind == "bf16" else f16_bits(values)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once to float32."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    # A second rounding matters where the first ended half-way between two float32, or below the normal ones.
    doubtful = ((total.view(np.int64) & 0x1FFF_FFFF) == 0x1000_0000) | ((np.abs(total) < 2.0**-126) & (total != 0))
    if doubtful.any():
        total = _to_odd(product, np.asarray(c, np.float64), total)
    return total.astype(np.float32)


def half_fma(a: Array, b: Array, c: Array, kind: str) -> Array:
    """Bits of a * b + c, rounded once, of numbers that `kind` (bf16 or f16) holds, given as float32."""
    product = np.multiply(a, b, dtype=np.float64)
    c = np.asarray(c, np.float64)
    total = _to_odd(product, c, product + c)
    if kind == "f16":
        return f16_bits(total)
    near = total.astype(np.float32)
    inexact = (near.astype(np.float64) != total) & np.isfinite(near)
    # To odd in float32 too: the even one of two neighbours gives way to the other.
    even = inexact & ((near.view(np.uint32) & np.uint32(1)) == 0)
    return bf16_bits(np.where(even, np.nextafter(near, np.where(total > near, np.inf, -np.inf).astype(np.float32)), near))


def _to_odd(a: Array, b: Array, total: Array) -> Array:
    """total, the rounded a + b, or its neighbour on the other side of the exact sum where that is what is odd."""
    part = total - a
    error = (a - (total - part)) + (b - part)
    total = np.ascontiguousarray(total)
    even = (error != 0) & np.isfinite(total) & ((total.view(np.int64) & 1) == 0)
    return np.where(even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def flushed(values: Array) -> Array:
    """.ftz: zeros of the same sign for numbers below the normal ones."""
    return np.where(np.abs(values) < _TINIEST[values.dtype], np.copysign(np.zeros((), values.dtype), values), values)

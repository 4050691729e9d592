"""How entries of pages are stored in fewer bits. Every entry is quantised by itself, when it comes, so that a page never has to be written again.

int8 and fp8 (e4m3): a number a component, and one float32 scale for each key and each value. int4: two components a byte, and for each group of
them a scale and the group's least component in float16. Keys have a fifth bit for each component, beside the scales of their entry: a page's
keys and values then are rows of one size.

Why the fifth bit: what 4 bits lose is lost in the keys. Grouped along 32 tokens of a channel (KIVI, arXiv 2402.02750), 4 bits lose no less than 5
do along channels, and keys wait in the model's dtype until their group is full: for each list as many bytes as the fifth bits of 512 entries
(docs/results.md, "Eviction and bits").

Shapes: D head dim, g = group_size(D).
"""

import torch
from torch import Tensor

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
"""What `kv_dtype` may say, and the dtype of its pages."""
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LARGEST_HALF = 65504.0
KEY_LEVELS, VALUE_LEVELS = 31, 15
"""The largest code of a component in int4."""


def group_size(head_dim: int) -> int:
    """Components that share a scale in int4.

    Raises:
        ValueError: heads of this size have no groups.
    """
    if head_dim % 16:
        raise ValueError(f"pages of int4 need heads whose size is a multiple of 16, and this model's have {head_dim}; choose kv_dtype int8")
    return 32 if head_dim % 32 == 0 else 16


def stored_width(head_dim: int, dtype: torch.dtype) -> int:
    """Components of a page's row that hold a key or a value."""
    return head_dim // 2 if dtype == torch.uint8 else head_dim


def scales_of_pages(shape: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of the scales beside rows of `shape` [...]; None: these pages have none."""
    if dtype == torch.uint8:
        return (*shape, 3, head_dim // group_size(head_dim)), torch.int16
    return (shape, torch.float32) if dtype in _LARGEST else None


def quantize(kv: Tensor, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor]:
    """Entries [..., D] of any floating dtype -> what pages of `dtype` hold of them, and their scales. kv[..., 0, ...] at `dim` are keys, and
    kv[..., 1, ...] the values of the same entries.

    int8, float8_e4m3fn: [..., D] and [...] float32; the largest component becomes the dtype's largest. uint8, which is int4: [..., D / 2], the
    low four bits of components 2 j in the low and of 2 j + 1 in the high bits of byte j, and [..., 3, D / g] int16: of each group the scale and the
    least component, both bits of a float16, and fifth bits of the key's components: beside the key those of the group's even ones, beside the value
    those of its odd ones, the first in the lowest bit.
    """
    kv = kv.float()
    if dtype == torch.uint8:
        dim %= kv.dim()
        (k, k_scale, k_least), (v, v_scale, v_least) = (
            _codes(x, levels) for x, levels in zip(kv.unbind(dim), (KEY_LEVELS, VALUE_LEVELS), strict=True)
        )
        high = k >> 4
        scales = torch.stack([torch.stack([k_scale, k_least], -2), torch.stack([v_scale, v_least], -2)], dim).view(torch.int16)
        fifth = torch.stack([_as_word(high[..., ::2]), _as_word(high[..., 1::2])], dim)
        codes = torch.stack([k & 15, v], dim).flatten(-2).to(torch.uint8)
        return codes[..., ::2] | (codes[..., 1::2] << 4), torch.cat([scales, fifth[..., None, :]], -2)
    most = _LARGEST[dtype]
    scale = kv.abs().amax(-1) / most
    kv = kv * (1.0 / torch.where(scale > 0, scale, 1.0))[..., None]
    if dtype == torch.int8:
        kv = torch.floor(kv + 0.5)
    return kv.clamp(-most, most).to(dtype), scale


def dequantize(stored: Tensor, scales: Tensor, dim: int) -> Tensor:
    """What `quantize` gave, keys and values at the same dim -> [..., D] float32."""
    if stored.dtype != torch.uint8:
        return stored.float() * scales[..., None]
    dim %= stored.dim()
    codes = torch.stack([stored & 15, stored >> 4], -1)
    # One bit of a word for every second component of its group.
    bit = (1 << torch.arange(stored.shape[-1] // scales.shape[-1], dtype=torch.int32, device=stored.device)).to(torch.int16)
    fifth = torch.stack([word[..., None] & bit != 0 for word in scales[..., 2, :].unbind(dim)], -1).flatten(-3, -2)
    codes.select(dim, 0).add_(fifth, alpha=16)
    scale, least = scales[..., :2, :].contiguous().view(torch.float16).float().unbind(-2)
    return _values(codes.flatten(-2).unflatten(-1, (scales.shape[-1], -1)), scale, least)


def fake_quantize(x: Tensor, dtype: torch.dtype, is_key: bool) -> Tensor:
    """Keys or values x [..., D] as they would be read from pages of `dtype`, in x's dtype."""
    if dtype != torch.uint8:
        return dequantize(*quantize(x, dtype, 0), 0).to(x.dtype)
    codes, scale, least = _codes(x.float(), KEY_LEVELS if is_key else VALUE_LEVELS)
    return _values(codes, scale.float(), least.float()).to(x.dtype)


def _codes(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] float32 -> codes [..., D / g, g] int32 from 0 to levels, scale and least component [..., D / g] float16."""
    groups = x.unflatten(-1, (-1, group_size(x.shape[-1])))
    least = groups.amin(-1).clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
    # Not divided by levels: on a GPU PyTorch multiplies by the reciprocal instead, which is not always the same number.
    scale = ((groups.amax(-1) - groups.amin(-1)) * (1.0 / levels)).clamp(max=_LARGEST_HALF).half()
    step = torch.where(scale > 0, scale, 1.0).float()[..., None]
    return torch.floor((groups - least.float()[..., None]) * (1.0 / step) + 0.5).clamp(0, levels).int(), scale, least


def _values(codes: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """What codes [..., D / g, g] stand for beside scale and least component [..., D / g] float32: [..., D] float32."""
    return torch.addcmul(least[..., None], codes.float(), scale[..., None]).flatten(-2)


def _as_word(bits: Tensor) -> Tensor:
    """[..., n] int32 of 0 and 1, n up to 16 -> [...] int16, the first in the lowest bit."""
    word = (bits << torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device)).sum(-1, dtype=torch.int32)
    return torch.where(word < 2**15, word, word - 2**16).to(torch.int16)

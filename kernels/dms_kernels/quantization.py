"""How entries of pages are stored in fewer bits. Every key and every value is quantised by itself, when it comes, so that a page never has to be
written again.

int8 and fp8 (e4m3): a number a component, and one float32 scale. int4: two components a byte, and for each group of them a scale and the group's
least component in float16. Keys grouped along their tokens (KIVI, arXiv 2402.02750) lose less in as many bits, but their page must stay in the
model's dtype until it is full. On a model of 1 M parameters the two differ little; on SmolLM2-135M groups of channels cost three
times the KL (docs/results.md, "Eviction and bits").

Shapes: D head dim, g = group_size(D).
"""

import torch
from torch import Tensor

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
"""What `kv_dtype` may say, and the dtype of its pages."""
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LARGEST_HALF = 65504.0


def group_size(head_dim: int) -> int:
    """Components that share a scale in int4.

    Raises:
        ValueError: heads of this size have no groups.
    """
    if head_dim % 16:
        raise ValueError(f"pages of int4 need heads whose size is a multiple of 16, and this model's have {head_dim}; choose kv_dtype int8")
    return 32 if head_dim % 32 == 0 else 16


def stored_width(head_dim: int, dtype: torch.dtype) -> int:
    """Components of a page's row that hold a key."""
    return head_dim // 2 if dtype == torch.uint8 else head_dim


def scales_of_pages(shape: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of the scales beside keys of `shape` [...]; None: these pages have none."""
    if dtype == torch.uint8:
        return (*shape, head_dim // group_size(head_dim), 2), torch.float16
    return (shape, torch.float32) if dtype in _LARGEST else None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys or values [..., D] of any floating dtype -> what pages of `dtype` hold of them, and their scales.

    int8, float8_e4m3fn: [..., D] and [...] float32; the largest component becomes the dtype's largest. uint8, which is int4: [..., D / 2], the
    components 2 j in the low and 2 j + 1 in the high bits of byte j, and [..., D / g, 2] float16: of each group the scale and the least component.
    """
    x = x.float()
    if dtype == torch.uint8:
        groups = x.unflatten(-1, (-1, group_size(x.shape[-1])))
        least = groups.amin(-1).clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
        # Not divided by 15: on a GPU PyTorch multiplies by the reciprocal instead, which is not always the same number.
        scale = ((groups.amax(-1) - groups.amin(-1)) * (1.0 / 15.0)).clamp(max=_LARGEST_HALF).half()
        step = torch.where(scale > 0, scale, 1.0).float()[..., None]
        codes = torch.floor((groups - least.float()[..., None]) * (1.0 / step) + 0.5).clamp(0, 15).to(torch.uint8).flatten(-2)
        return codes[..., ::2] | (codes[..., 1::2] << 4), torch.stack([scale, least], -1)
    most = _LARGEST[dtype]
    scale = x.abs().amax(-1) / most
    x = x * (1.0 / torch.where(scale > 0, scale, 1.0))[..., None]
    if dtype == torch.int8:
        x = torch.floor(x + 0.5)
    return x.clamp(-most, most).to(dtype), scale


def dequantize(stored: Tensor, scales: Tensor) -> Tensor:
    """What `quantize` gave -> [..., D] float32."""
    if stored.dtype != torch.uint8:
        return stored.float() * scales[..., None]
    codes = torch.stack([stored & 15, stored >> 4], -1).flatten(-2).float()
    scale, least = scales.float().unbind(-1)
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None] + least[..., None]).flatten(-2)


def fake_quantize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., D] as it would be read from pages of `dtype`, in x's dtype."""
    return dequantize(*quantize(x, dtype)).to(x.dtype)

"""Prefill of a prompt whose decisions are known: forward alone."""

import torch
from torch import Tensor

from bench import dense
from bench.inputs import evicted_tokens, normal, num_pairs, relative_error
from bench.measuring import Competitor, Parity
from bench.shapes import Shape
from dms_kernels.sparse_prefill import sparse_prefill


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as models hand them over, transposed from [B, T, heads, D], and the evicted tokens."""
    generator = torch.Generator(device).manual_seed(0)
    evicted = evicted_tokens(shape, generator)
    sizes = (shape.Hq, shape.H, shape.H)
    return *(normal(generator, shape.batch, shape.tokens, heads, shape.D, dtype=dtype).transpose(1, 2) for heads in sizes), evicted


def _ours(shape: Shape, q: Tensor, k: Tensor, v: Tensor, evicted: Tensor) -> Tensor:
    return sparse_prefill(q, k, v, evicted, None, None, window=shape.window, scale=shape.scale)


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    x = _inputs(shape, device, dtype)
    exact = dense.visible_attention(*x, shape.window, shape.scale)
    return Parity(relative_error(_ours(shape, *x), exact), 1e-2 if dtype.itemsize == 2 else 1e-5)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    B, T, Hq, H, D = shape.batch, shape.tokens, shape.Hq, shape.H, shape.D
    evicted = evicted_tokens(shape, torch.Generator(device).manual_seed(0))
    needed, causal = num_pairs(evicted, shape.windows) * (Hq // H), B * Hq * T * (T + 1) // 2
    num_bytes = dtype.itemsize * B * T * D * (2 * Hq + 2 * H)

    def ours():
        x = _inputs(shape, device, dtype)
        return [lambda: _ours(shape, *x)]

    def other(make):
        def prepare():
            q, k, v, evicted = _inputs(shape, device, dtype)
            attend = make(torch.where(evicted, -1e4, 0.0))
            return [lambda: attend(q, k, v).transpose(1, 2)]

        return prepare

    found = [Competitor("ours", ours, flops=4 * D * needed, bytes=num_bytes)]
    for name, backend in dense.DENSE.items():
        prepare = other(lambda log_keep, backend=backend: dense.sdpa(backend, shape.scale))
        found.append(Competitor(name, prepare, flops=4 * D * causal, bytes=num_bytes, needs_gpu=True))
    for name, blocks in dense.FLEX.items():
        prepare = other(lambda log_keep, blocks=blocks: dense.flex(log_keep, shape.windows, shape.scale, Hq // H, blocks=blocks))
        found.append(Competitor(name, prepare, flops=4 * D * causal, bytes=num_bytes, needs_gpu=True, same=True))
    return found

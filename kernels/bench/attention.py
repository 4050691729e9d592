"""Training attention, forward and backward with the gate's gradient."""

import torch
from torch import Tensor

from bench import dense
from bench.inputs import evicted_tokens, normal, num_pairs, relative_error
from bench.measuring import Competitor, Parity
from bench.shapes import Shape
from dms_kernels import gated_attention
from dms_kernels.gated_attention.reference import gated_attention_reference

# Two products in the forward, five in the backward.
_PRODUCTS = 7


def _log_keep(evicted_BHT: Tensor, generator: torch.Generator) -> Tensor:
    """[B, T, H] float32, nearly binary, as a low temperature makes it."""
    noise = torch.rand(evicted_BHT.shape, generator=generator, device=generator.device)
    return torch.where(evicted_BHT, -80.0 - 40.0 * noise, -0.02 * noise).transpose(1, 2).contiguous()


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    B, T, D = shape.batch, shape.tokens, shape.D
    q, k, v = (normal(generator, B, T, heads, D, dtype=dtype).requires_grad_() for heads in (shape.Hq, shape.H, shape.H))
    log_keep = _log_keep(evicted_tokens(shape, generator), generator).requires_grad_()
    return {"q": q, "k": k, "v": v, "log_keep": log_keep, "grad": normal(generator, B, T, shape.Hq, D, dtype=dtype)}


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    x = _inputs(shape, device, dtype)
    options = {"window": shape.window, "scale": shape.scale, "segment_ids": None}

    def run(function, tensors, grad):
        out = function(*tensors, **options)
        return out, *torch.autograd.grad(out, tensors, grad)

    leaves = [x[name] for name in ("q", "k", "v", "log_keep")]
    ours = run(gated_attention, leaves, x["grad"])
    exact = run(gated_attention_reference, [leaf.detach().double().requires_grad_() for leaf in leaves], x["grad"].double())
    return Parity(max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)), 3e-2 if dtype.itemsize == 2 else 1e-4)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    B, T, Hq, H, D = shape.batch, shape.tokens, shape.Hq, shape.H, shape.D
    evicted = evicted_tokens(shape, torch.Generator(device).manual_seed(0))
    needed = num_pairs(evicted, shape.window) * (Hq // H)
    causal = B * Hq * T * (T + 1) // 2
    # Forward: q, k, v in, out out; backward: those and the gradient in, three gradients out.
    num_bytes = dtype.itemsize * B * T * D * (6 * Hq + 6 * H)

    def ours():
        x = _inputs(shape, device, dtype)
        leaves = [x[name] for name in ("q", "k", "v", "log_keep")]

        def call():
            out = gated_attention(*leaves, window=shape.window, scale=shape.scale, segment_ids=None)
            torch.autograd.grad(out, leaves, x["grad"])
            return out.detach()

        return [call]

    def other(make, gated):
        def prepare():
            x = _inputs(shape, device, dtype)
            q, k, v = (x[name].detach().transpose(1, 2).requires_grad_() for name in ("q", "k", "v"))
            log_keep = x["log_keep"].detach().transpose(1, 2).contiguous().requires_grad_()
            attend, grad = make(log_keep), x["grad"].transpose(1, 2)
            leaves = [q, k, v, log_keep] if gated else [q, k, v]

            def call():
                out = attend(q, k, v)
                torch.autograd.grad(out, leaves, grad)
                return out.detach().transpose(1, 2)

            return [call]

        return prepare

    flops = 2 * D * _PRODUCTS
    found = [Competitor("ours", ours, flops=flops * needed, bytes=num_bytes)]
    for name, backend in dense.DENSE.items():
        prepare = other(lambda log_keep, backend=backend: dense.sdpa(backend, shape.scale), gated=False)
        found.append(Competitor(name, prepare, flops=flops * causal, bytes=num_bytes, needs_gpu=True))
    for name, blocks in dense.FLEX.items():
        prepare = other(lambda log_keep, blocks=blocks: dense.flex(log_keep, shape.window, shape.scale, Hq // H, blocks=blocks), gated=True)
        found.append(Competitor(name, prepare, flops=flops * causal, bytes=num_bytes, needs_gpu=True, same=True))
    return found

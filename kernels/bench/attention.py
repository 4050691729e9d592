"""Training attention, forward and backward with the gate's gradient."""

import torch
from torch import Tensor

from bench import dense
from bench.inputs import normal, num_pairs, relative_error, segment_ids, token_classes
from bench.measuring import Competitor, Parity
from bench.shapes import Shape
from dms_kernels import gated_attention
from dms_kernels.gated_attention.reference import gated_attention_reference

# Two products in the forward, five in the backward.
_PRODUCTS = 7


def _log_keep(class_BHT: Tensor, num_windows: int, generator: torch.Generator) -> Tensor:
    """[B, T, H] float32, nearly binary, as a low temperature makes it; of several windows [B, T, H, K]."""
    by_window = []
    for number in range(1, num_windows + 1):
        noise = torch.rand(class_BHT.shape, generator=generator, device=generator.device)
        by_window.append(torch.where(class_BHT == number, -80.0 - 40.0 * noise, -0.02 * noise).transpose(1, 2))
    return (by_window[0] if num_windows == 1 else torch.stack(by_window, -1)).contiguous()


def _options(shape: Shape, device: str) -> dict:
    window = shape.windows if shape.longer else shape.window
    return {"window": window, "scale": shape.scale, "segment_ids": segment_ids(shape, device)}


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    B, T, D = shape.batch, shape.tokens, shape.D
    q, k, v = (normal(generator, B, T, heads, D, dtype=dtype).requires_grad_() for heads in (shape.Hq, shape.H, shape.H))
    log_keep = _log_keep(token_classes(shape, generator), len(shape.windows), generator).requires_grad_()
    return {"q": q, "k": k, "v": v, "log_keep": log_keep, "grad": normal(generator, B, T, shape.Hq, D, dtype=dtype)}


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    x = _inputs(shape, device, dtype)
    options = _options(shape, device)

    def run(function, tensors, grad):
        out = function(*tensors, **options)
        return out, *torch.autograd.grad(out, tensors, grad)

    leaves = [x[name] for name in ("q", "k", "v", "log_keep")]
    ours = run(gated_attention, leaves, x["grad"])
    exact = run(gated_attention_reference, [leaf.detach().double().requires_grad_() for leaf in leaves], x["grad"].double())
    return Parity(max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)), 3e-2 if dtype.itemsize == 2 else 1e-4)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    B, T, Hq, H, D = shape.batch, shape.tokens, shape.Hq, shape.H, shape.D
    classes = token_classes(shape, torch.Generator(device).manual_seed(0))
    needed = num_pairs(classes, shape.windows, shape.document_lengths()) * (Hq // H)
    causal = B * Hq * shape.causal_pairs()
    # Forward: q, k, v in, out out; backward: those and the gradient in, three gradients out.
    num_bytes = dtype.itemsize * B * T * D * (6 * Hq + 6 * H)

    def ours():
        x = _inputs(shape, device, dtype)
        leaves = [x[name] for name in ("q", "k", "v", "log_keep")]
        options = _options(shape, device)

        def call():
            out = gated_attention(*leaves, **options)
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
    # PyTorch's dense kernels know no documents.
    for name, backend in dense.DENSE.items() if shape.documents == 1 else ():
        prepare = other(lambda log_keep, backend=backend: dense.sdpa(backend, shape.scale), gated=False)
        found.append(Competitor(name, prepare, flops=flops * causal, bytes=num_bytes, needs_gpu=True))
    for name, blocks in dense.FLEX.items():
        segments = segment_ids(shape, device)
        prepare = other(
            lambda log_keep, blocks=blocks, segments=segments: dense.flex(
                log_keep, shape.windows, shape.scale, Hq // H, blocks=blocks, segment_ids_BT=segments
            ),
            gated=True,
        )
        found.append(Competitor(name, prepare, flops=flops * causal, bytes=num_bytes, needs_gpu=True, same=True))
    return found

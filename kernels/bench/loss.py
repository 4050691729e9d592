"""The distillation loss and its gradient by the student's hidden states, the head being frozen and shared."""

import torch
from torch import Tensor

from bench.inputs import normal, relative_error
from bench.measuring import Competitor, Parity
from bench.shapes import Shape
from dms_kernels import distill_loss
from dms_kernels.distill_loss.chunked import distill_loss_chunked
from dms_kernels.distill_loss.reference import distill_loss_reference


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden_s = normal(generator, shape.tokens, shape.M, dtype=dtype)
    # A student near its teacher, and logits of a few units.
    hidden_t = (hidden_s + 0.3 * normal(generator, shape.tokens, shape.M, dtype=dtype)).detach()
    weight = normal(generator, shape.V, shape.M, dtype=dtype).mul_(2 * shape.M**-0.5)
    return hidden_s.requires_grad_(), hidden_t, weight, torch.ones(shape.tokens, dtype=torch.bool, device=device)


def _run(function, shape: Shape, hidden_s: Tensor, hidden_t: Tensor, weight: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    total, _ = function(hidden_s, hidden_t, weight, beta=shape.beta, valid=valid, chunk=shape.chunk)
    return total.detach(), torch.autograd.grad(total, hidden_s)[0]


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    """The gradient's error may be twice that of PyTorch in the same precision; the sum's, at most as much."""
    hidden_s, hidden_t, weight, valid = _inputs(shape, device, dtype)
    exact = hidden_s.detach().double().requires_grad_(), hidden_t.double(), weight.double(), valid
    want = _run(distill_loss_reference, shape, *exact)
    plain = _run(distill_loss_reference, shape, hidden_s, hidden_t, weight, valid)
    ours = _run(distill_loss, shape, hidden_s, hidden_t, weight, valid)
    bound = max(2 * relative_error(plain[1], want[1]), 1e-5)
    return Parity(max(relative_error(a, b) for a, b in zip(ours, want, strict=True)), bound)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    N, M, V = shape.tokens, shape.M, shape.V
    # Two products for logits and one for the gradient; hidden states in, a gradient out, the head thrice.
    flops, num_bytes = 3 * 2 * N * M * V, dtype.itemsize * M * (3 * N + 3 * V)

    def of(function):
        def prepare():
            x = _inputs(shape, device, dtype)
            return [lambda: _run(function, shape, *x)[1]]

        return prepare

    def liger():
        from liger_kernel.transformers import LigerFusedLinearJSD

        hidden_s, hidden_t, weight, _ = _inputs(shape, device, dtype)
        loss = LigerFusedLinearJSD(jsd_beta=shape.beta)

        def call():
            # A mean, where ours is a sum.
            return torch.autograd.grad(loss(hidden_s, weight, hidden_t, weight), hidden_s)[0] * N

        return [call]

    return [
        Competitor("ours", of(distill_loss), flops=flops, bytes=num_bytes),
        Competitor("plain torch, chunked", of(distill_loss_chunked), flops=flops, bytes=num_bytes, same=True),
        Competitor("Liger", liger, flops=flops, bytes=num_bytes),
    ]

"""Packed linear layers without their work: they compute nothing, and save and allocate what the real ones would.

Not in here: what depends on numbers, such as the columns of outliers that bitsandbytes' int8 multiplies apart.

Shapes: T tokens (all of a batch), K inputs, N outputs.
"""

from typing import Any

import torch
from torch import nn

from dms.costs import torch_compat
from dms.costs.packed_weights import Packing, packed_linears, sides


class StandInPackedLinear(nn.Module):
    """In place of a linear layer whose matrix is packed.

    held: the dtype that the matrix had when it was packed. kernels: as on a GPU, else as on a CPU. inputs: where it notes, by storage,
    bytes of the inputs that it keeps for the backward past autograd, so that activation checkpointing neither frees nor offloads them.
    """

    def __init__(self, linear: nn.Module, packing: Packing, held: torch.dtype, kernels: bool, inputs: dict[int, int]):
        super().__init__()
        self.packing, self.held, self.kernels, self.inputs = packing, held, kernels, inputs
        self.out_features, self.in_features = sides(linear)
        codes = torch.empty(packing.bytes_of(*sides(linear)), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        bias = linear.bias
        self.bias = bias if isinstance(bias, nn.Parameter) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packing.product == "cast":
            y = self._cast(x)
        elif self.packing.product == "int8":
            if torch.is_grad_enabled() and x.requires_grad:
                self.inputs[torch_compat.storage_key(x)] = x.untyped_storage().nbytes()
            y = _Int8.apply(x, self.weight, self)
        else:
            given = x.dtype
            y = _Whole.apply(x.to(self.packing.computes or self.held), self.weight, self).to(given)
        return y

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        """torchao: plain operators, so that autocast and autograd do with them as they do in a run."""
        whole_KN = x.new_empty(self.in_features, self.out_features)
        y_TN = torch.mm(x.reshape(-1, self.in_features), whole_KN)
        y_TN = y_TN * y_TN.new_empty(self.out_features)
        y = y_TN.reshape(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, codes: torch.Tensor, layer: StandInPackedLinear) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        scales = _scales(x, layer)
        whole_NK = x.new_empty(layer.out_features, layer.in_features)
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        del scales, whole_NK
        return y

    @staticmethod
    def backward(ctx, *grads: Any):
        (grad,) = grads
        layer = ctx.layer
        scales = _scales(grad, layer)
        whole_NK = grad.new_empty(layer.out_features, layer.in_features, dtype=layer.held)
        del scales
        cast_NK = whole_NK.to(grad.dtype)
        grad_x = grad.new_empty(ctx.shape)
        del whole_NK, cast_NK
        return grad_x, None, None


def _scales(x: torch.Tensor, layer: StandInPackedLinear) -> torch.Tensor:
    """In float32; where scales are packed themselves, their products and sums."""
    num = layer.packing.num_blocks(layer.out_features, layer.in_features)
    scales = x.new_empty(num, dtype=torch.float32)
    return scales + 0.0 if layer.packing.block_bytes < 2 else scales


class _Int8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, codes: torch.Tensor, layer: StandInPackedLinear) -> torch.Tensor:
        ctx.layer, ctx.x = layer, x
        N, K = layer.out_features, layer.in_features
        T = x.numel() // K
        # On a CPU bitsandbytes dequantises while a module trains, and multiplies bytes (in float32) when it does not.
        if not layer.kernels and layer.training:
            whole_NK = x.new_empty(N, K)
            if torch.is_autocast_enabled("cpu"):
                casts = [part.to(torch.get_autocast_dtype("cpu")) for part in (x, whole_NK)]
                y = casts[0].new_empty(*x.shape[:-1], N)
                del casts
            else:
                y = x.new_empty(*x.shape[:-1], N)
            del whole_NK
            return y
        half_TK = x.reshape(T, K).to(torch.float16)
        looked_at = [torch.empty_like(half_TK), torch.empty_like(half_TK, dtype=torch.bool)]
        codes_TK = torch.empty_like(half_TK, dtype=torch.int8)
        del half_TK, looked_at
        floats = [] if layer.kernels else [x.new_empty(T, K, dtype=torch.float32), x.new_empty(N, K, dtype=torch.float32)]
        sums_TN = x.new_empty(T, N, dtype=torch.int32)
        del floats
        y = x.new_empty(T, N, dtype=torch.float16).to(x.dtype)
        del sums_TN, codes_TK
        return y.reshape(*x.shape[:-1], N)

    @staticmethod
    def backward(ctx, *grads: Any):
        (grad,) = grads
        layer, x = ctx.layer, ctx.x
        whole_NK = x.new_empty(layer.out_features, layer.in_features)
        cast = grad.contiguous().to(x.dtype)
        grad_x = torch.empty_like(x)
        del whole_NK, cast
        return grad_x, None, None


def replace_packed(model: Any, packing: Packing, held: torch.dtype, kernels: bool) -> dict[int, int]:
    """Put stand-ins where a kind packs, on the meta device; adapters stay around them -> where they note their inputs."""
    inputs: dict[int, int] = {}
    for name, module in packed_linears(model, packing).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, StandInPackedLinear(module, packing, held, kernels, inputs))
    return inputs

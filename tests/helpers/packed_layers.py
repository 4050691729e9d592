"""Packed linear layers in plain PyTorch: stand-ins for other packages' kinds, right and wrong ones."""

import torch
from torch import nn


class PackedLinear(nn.Module):
    """int8 codes, and a scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.codes = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class RoundsActivations(PackedLinear):
    """As kernels of int8 products do; the gradient is that of the layer without rounding."""

    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return super().forward(x + ((x / scale).round() * scale - x).detach())


class WithoutGradient(PackedLinear):
    def forward(self, x):
        return super().forward(x.detach())


class WrongGradient(PackedLinear):
    """Its backward forgets the scales."""

    def forward(self, x):
        exact = super().forward(x)
        wrong = nn.functional.linear(x, self.codes.to(x.dtype), self.bias)
        return wrong + (exact - wrong).detach()


class NoKernel(PackedLinear):
    def forward(self, x):
        raise RuntimeError("no kernel for this device\nand more lines")


def pack(model: nn.Module, kind: type = PackedLinear, method: str = "stand-in") -> nn.Module:
    """Replace a model's linear layers, all but its head, and say in its configuration that it is packed."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, kind(module))
    model.config.quantization_config = {"quant_method": method}
    return model

"""What a forward pass multiplies and which weights it touches, operator by operator; on tensors without storage as well."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

# Operators that take some rows of a weight, and leave the others where they are.
_GATHERS = {torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather}
GROUPED = torch.ops.aten._grouped_mm


def grouped_flops(rows_shape, experts_shape, *_, **__) -> int:
    """Of rows [R, K] through one each of experts [E, K, N]: PyTorch's own counter does not know this product."""
    return 2 * rows_shape[0] * rows_shape[1] * experts_shape[2]


@dataclass
class Weight:
    """A parameter and what one pass did with it. use: "product" (read whole), "experts" (each row of the product reads one of
    `num_experts`; those of a "product" are all multiplied), "rows" (so many of its numbers were gathered), "other" (norms, biases), or "none".

    rows: of "experts", the product's rows; of "rows", the numbers that were gathered; over the tokens of the pass.
    """

    numel: int
    use: str = "none"
    num_experts: int = 0
    rows: int = 0


# A weight that is used in several ways is read as the first of these says: a tied embedding is a head too.
_ORDER = ("none", "rows", "other", "experts", "product")


class Counting(TorchDispatchMode):
    """Within it: `flops` of products, `activations`: numbers that products read beside weights and write, `weights` by parameter.

    What stands between products (norms, activation functions, rotations) is taken as fused into them and moves nothing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.flops = self.activations = 0
        # Views and transposes of a parameter have its storage.
        self.weights = {p.untyped_storage()._cdata: Weight(p.numel()) for p in model.parameters()}
        self._parameters = list(model.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_product = packet is GROUPED or packet in flop_registry
        if is_product:
            shapes = [x.shape for x in inputs]
            self.flops += grouped_flops(*shapes) if packet is GROUPED else flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.activations += out.numel() + sum(x.numel() for x in inputs if self._weight(x) is None and x.is_floating_point())
        for x in inputs:
            weight = self._weight(x)
            if weight is not None:
                self._touch(weight, x, packet, is_product, inputs, out)
        return out

    def _weight(self, tensor: torch.Tensor) -> Weight | None:
        return self.weights.get(tensor.untyped_storage()._cdata)

    def _touch(self, weight: Weight, x: torch.Tensor, packet, is_product: bool, inputs: list[torch.Tensor], out) -> None:
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata == x.untyped_storage()._cdata:
            # A view reads nothing.
            return
        use = "experts" if packet is GROUPED else "rows" if packet in _GATHERS else "product" if is_product and x.dim() > 1 else "other"
        if use == "experts":
            weight.num_experts, weight.rows = x.shape[0], inputs[0].shape[0]
        elif use == "product" and packet is torch.ops.aten.bmm:
            # Some models run every token through all experts, and mask what the router did not pick.
            weight.num_experts = x.shape[0]
        elif use == "rows":
            weight.rows += out.numel()
        weight.use = max(weight.use, use, key=_ORDER.index)

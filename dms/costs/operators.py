"""What runs, seen operator by operator: which weights are multiplied, and which bytes live at once; on tensors without storage as well."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dms.costs import torch_compat


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from tensors_in(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from tensors_in(child)


_W = TypeVar("_W", bound="_Watch")


class _Watch:
    """A context within which `_see` is called for every operator; it can be entered again."""

    def __init__(self) -> None:
        self._entered = ExitStack()

    def __enter__(self: _W) -> _W:
        self._entered.enter_context(torch_compat.watch_operators(self._see))
        return self

    def __exit__(self, *error) -> None:
        self._entered.__exit__(*error)

    def _see(self, operator: Any, args: tuple, kwargs: dict, result: Any) -> None:
        raise NotImplementedError


class LiveBytes(_Watch):
    """Within it, every operator's results are counted once for each storage, from its making to its death.

    What autograd saves, what a custom function makes inside, gradients and optimizer state are all results of operators. What
    an operator allocates and frees within itself is not seen.
    """

    now: int
    """Bytes alive."""
    peak: int
    """The most since `reset_peak`."""

    def __init__(self, *held: torch.Tensor):
        """held: tensors from before, to be counted too."""
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in held:
            self._meet(tensor)

    def reset_peak(self) -> None:
        self.peak = self.now

    def _see(self, operator: Any, args: tuple, kwargs: dict, result: Any) -> None:
        for tensor in tensors_in(result):
            self._meet(tensor)

    def _meet(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            # A subclass around other tensors (torchao's): its own storage is as large as what it stands for, and not there.
            for name in tensor.__tensor_flatten__()[0]:
                self._meet(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def grouped_flops(rows_shape, experts_shape, *_, **__) -> int:
    """FLOPs of rows [R, K] through one each of experts [E, K, N]: PyTorch's own counter does not know this product."""
    return 2 * rows_shape[0] * rows_shape[1] * experts_shape[2]


# A weight that is used in several ways is read as the last of these says: a tied embedding is a head too.
Use = Literal["none", "rows", "other", "experts", "product"]
_ORDER: tuple[Use, ...] = get_args(Use)
# Operators that take some rows of a weight, and leave the others where they are.
_GATHERS = {torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather}


@dataclass
class Weight:
    """A parameter, and what one pass did with it."""

    numel: int
    use: Use = "none"
    """"product": read whole; "experts": each row of the product reads one of `num_experts`; "rows": some of its numbers were gathered;
    "other": norms and biases."""
    num_experts: int = 0
    """Matrices in it, where it is a stack of them; those of a "product" are all multiplied."""
    rows: int = 0
    """Over the tokens of the pass: of "experts" the product's rows, of "rows" the numbers that were gathered."""
    flops: int = 0
    """Of the products with it, over the tokens of the pass."""
    packed: int | None = None
    """Bytes of its codes and scales, where it is quantised; None: it is whole."""


class ProductCounter(_Watch):
    """Within it, products and the weights that they touch are counted.

    What stands between products (norms, activation functions, rotations) is taken as fused into them and moves nothing.
    """

    flops: int
    """Of all products."""
    activations: int
    """Numbers that products read beside weights, and write."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.flops = self.activations = 0
        self._parameters = list(model.parameters())
        # Views and transposes of a parameter have its storage.
        self._weights = {torch_compat.storage_key(p): Weight(p.numel()) for p in self._parameters}
        self._grouped, self._products = torch_compat.grouped_product(), torch_compat.product_flops()

    @property
    def weights(self) -> list[Weight]:
        """In the order of the model's parameters."""
        return list(self._weights.values())

    def weight_of(self, tensor: torch.Tensor) -> Weight | None:
        """The weight that a tensor is, or is a view of."""
        return self._weights.get(torch_compat.storage_key(tensor))

    def _see(self, operator: Any, args: tuple, kwargs: dict, result: Any) -> None:
        packet = operator.overloadpacket
        inputs = [x for value in (args, kwargs) for x in tensors_in(value)]
        flops = None
        if packet is self._grouped:
            flops = grouped_flops(*(x.shape for x in inputs))
        elif packet in self._products:
            flops = self._products[packet](*args, **kwargs, out_val=result)
        if flops is not None:
            self.flops += flops
            self.activations += result.numel() + sum(x.numel() for x in inputs if self.weight_of(x) is None and x.is_floating_point())
        for x in inputs:
            weight = self.weight_of(x)
            # A view reads nothing.
            if weight is not None and not (
                isinstance(result, torch.Tensor) and torch_compat.storage_key(result) == torch_compat.storage_key(x)
            ):
                self._touch(weight, x, packet, flops, inputs, result)

    def _touch(self, weight: Weight, x: torch.Tensor, packet: Any, flops: int | None, inputs: list[torch.Tensor], result: Any) -> None:
        use: Use = "other"
        if packet is self._grouped:
            use = "experts"
            weight.num_experts, weight.rows = x.shape[0], inputs[0].shape[0]
        elif packet in _GATHERS:
            use = "rows"
            weight.rows += result.numel()
        elif flops is not None and x.dim() > 1:
            use = "product"
            if packet is torch.ops.aten.bmm:
                # Some models run every token through all experts, and mask what the router did not pick.
                weight.num_experts = x.shape[0]
        if use in ("experts", "product"):
            weight.flops += flops or 0
        weight.use = max(weight.use, use, key=_ORDER.index)

"""Every touch of what torch does not promise, as far as the costs of a model are measured by running it.

One function a touch, as in `dms.hf_compat`. docs/upstream.md lists them, and tests/dms/costs/test_torch_compat.py holds each against
the installed version.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dms.upstream import changed


@contextmanager
def watch_operators(see: Callable[[Any, tuple, dict, Any], None]) -> Iterator[None]:
    """Within it `see(operator, args, kwargs, result)` is called after every operator that PyTorch runs, those of autograd too.

    operator: such as `torch.ops.aten.mm.default`.

    Assumes: torch.utils._python_dispatch.TorchDispatchMode, in whose `__torch_dispatch__` every operator arrives.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        raise changed("torch_compat.watch_operators", "torch", "utils._python_dispatch.TorchDispatchMode") from error

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            see(func, args, kwargs or {}, result)
            return result

    with Watch():
        yield


def fake_tensors() -> AbstractContextManager:
    """Within it tensors are made without storage, and operators on them give shapes, dtypes and devices alone.

    Assumes: torch._subclasses.fake_tensor.FakeTensorMode.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise changed("torch_compat.fake_tensors", "torch", "_subclasses.fake_tensor.FakeTensorMode") from error
    return FakeTensorMode()


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share a storage have in common, tensors without storage too, for as long as one of them lives.

    Assumes: UntypedStorage._cdata is the address of the storage's C++ object.
    """
    try:
        return tensor.untyped_storage()._cdata
    except AttributeError as error:
        raise changed("torch_compat.storage_key", "torch", "UntypedStorage._cdata") from error


def grouped_product() -> Any:
    """The operator that multiplies rows [R, K] by one each of several matrices [E, K, N], as transformers runs experts.

    Assumes: it is torch.ops.aten._grouped_mm.
    """
    try:
        return torch.ops.aten._grouped_mm
    except AttributeError as error:
        raise changed("torch_compat.grouped_product", "torch", "ops.aten._grouped_mm") from error


def product_flops() -> dict[Any, Callable[..., int]]:
    """Matrix products -> what counts the FLOPs of a call, given its arguments and `out_val`, its result.

    Assumes: torch.utils.flop_counter.flop_registry, which has at least aten.mm and aten.bmm.
    """
    try:
        from torch.utils.flop_counter import flop_registry
    except ImportError as error:
        raise changed("torch_compat.product_flops", "torch", "utils.flop_counter.flop_registry") from error
    if not {torch.ops.aten.mm, torch.ops.aten.bmm} <= flop_registry.keys():
        raise changed("torch_compat.product_flops", "torch", "aten.mm and aten.bmm in utils.flop_counter.flop_registry")
    return flop_registry

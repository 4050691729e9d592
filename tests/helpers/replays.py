"""A CUDA graph's stand-in on a CPU: the operators of a step, noted as they run, run again on the same tensors. What the host did in between is
frozen, as in a graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from dms_kernels.launching import through_operators

# The host would have to wait for what these find, which a graph cannot record.
_READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
}


class _Notes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, Any, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert name not in _READS and not by_mask, f"a step reads {name} from the device"
        out = func(*args, **(kwargs or {}))
        # Kept as they were found, so that no tensor's number comes twice.
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorders:
    """Stands in for `dms.cache.capture.recorders["cpu"]`."""

    def __init__(self):
        self.watched: Callable[[], list[torch.Tensor]] = list
        """Tensors that a step has made, beside its logits, and that are to be right after each replay."""
        self.num_recorded = self.num_replayed = self.num_operators = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor, bool]:
        self.num_recorded += 1
        with through_operators(), _Notes() as notes:
            logits = step()
        results = [logits, *self.watched()]
        self.num_operators = len(notes.calls)

        def replay() -> None:
            self.num_replayed += 1
            made: dict[int, torch.Tensor] = {}
            for func, args, kwargs, before in notes.calls:
                args, kwargs = tree_map_only(torch.Tensor, lambda x: made.get(id(x), x), (args, kwargs))
                for old, new in zip(tree_flatten(before)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
                    if isinstance(old, torch.Tensor):
                        made[id(old)] = new
            for result in results:
                if id(result) in made:
                    result.data = made[id(result)]

        return replay, logits, True

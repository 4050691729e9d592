"""Weights that DeepSpeed's ZeRO-3 has divided among processes, made whole for a moment. Without ZeRO-3 these functions change nothing."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dms.upstream import changed

# Attributes that DeepSpeed gives a divided parameter: a number, the number of its elements, and this process's part.
_MARKS = ("ds_id", "ds_numel", "ds_tensor")


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is divided among processes.

    Assumes: DeepSpeed marks it with all of _MARKS, and others with none.
    """
    marked = [name for name in _MARKS if hasattr(parameter, name)]
    if marked and len(marked) < len(_MARKS):
        raise changed(
            "sharding.is_sharded", "deepspeed", f"{' and '.join(_MARKS)} of a divided parameter, which has {' and '.join(marked)}"
        )
    return bool(marked)


def num_elements(parameter: Any) -> int:
    """Elements of the whole parameter, however little of it this process holds."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


def gathered(parameters: Iterable[torch.Tensor], modify: bool = False) -> AbstractContextManager:
    """Make `parameters` whole on every process; all processes must enter together.

    modify: what rank 0 writes into them is handed to the others at the end.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this process holds: its shards and whatever is gathered now."""
    total = 0
    parameter: Any
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        if is_sharded(parameter):
            total += parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()
    return total

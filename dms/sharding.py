"""Weights that DeepSpeed's ZeRO-3 has divided among processes, seen whole for a moment. Without ZeRO-3 nothing happens here."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def num_elements(parameter: torch.Tensor) -> int:
    """Elements of the whole parameter, however little of it lies here."""
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
    for parameter in model.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        total += parameter.numel() * parameter.element_size()
        if shard is not None:
            total += shard.numel() * shard.element_size()
    return total

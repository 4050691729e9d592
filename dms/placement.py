"""Where a model's weights are and where it computes: accelerate may keep weights in host memory or on disk between their uses (`device_map`)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dms import hf_compat


def compute_device(module: nn.Module) -> torch.device:
    """Where a module computes and a model takes its inputs. transformers' `model.device` is "meta" where embeddings are on disk."""
    device = hf_compat.execution_device(module)
    return next(module.parameters()).device if device is None else torch.device(device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are elsewhere between their uses."""
    return hf_compat.execution_device(model) is not None and any(weight.is_meta for weight in model.parameters())


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Within it a module's own weights are where it computes, for those who read them instead of calling it."""
    align = _aligner(module)
    if align is None:
        yield
    else:
        with align(module):
            yield


def value_of(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a model's state with its values, read to the CPU if accelerate keeps them elsewhere.

    Raises:
        ValueError: a tensor without values (on the meta device), and nothing that says where they are.
    """
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    align = _aligner(module)
    if align is None:
        raise ValueError(f"{name} has no values here (it is on the meta device); load the model's weights before it is saved")
    with align(module, "cpu"):
        return getattr(module, leaf).detach().clone()


def onloaded(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model's state by name, all with their values, as `value_of` gives them.

    Raises:
        ValueError: as `value_of`.
    """
    # Weights that the model ties are one object here, as they were before accelerate made two of them.
    ties = hf_compat.tied_weights(model)
    values: dict[str, torch.Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            source = ties.get(name, name)
            if source not in values:
                values[source] = value_of(model, source, tensor)
            tensor = values[source]
        result[name] = tensor
    return result


def _aligner(module: nn.Module) -> Any:
    """accelerate's context manager that brings a module's own weights, where it keeps them elsewhere; else None."""
    if not any(weight.is_meta for weight in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return None
    try:
        from accelerate.utils import align_module_device, has_offloaded_params
    except ImportError:
        return None
    return align_module_device if has_offloaded_params(module) else None

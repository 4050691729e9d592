"""What the distillation losses check of their arguments."""

import math

import torch
from torch import Tensor


def check_hidden(name: str, hidden: Tensor) -> None:
    """Raises ValueError unless this is [N, M] of floating point."""
    if hidden.ndim != 2:
        raise ValueError(f"{name} must be [N, M], got {tuple(hidden.shape)}; flatten batch and tokens first")
    if not hidden.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {hidden.dtype}")


def check_head(hidden: Tensor, tensors: dict[str, Tensor | None], logit_scale: float, softcap: float | None) -> None:
    """Raises ValueError unless `tensors`, first head_weight [V, M], then by name what has its shape or [V], go with hidden [N, M]."""
    M, weight = hidden.shape[1], tensors["head_weight"]
    if weight.ndim != 2 or weight.shape[1] != M or weight.shape[0] == 0:
        raise ValueError(f"head_weight must be [V, M={M}], got {tuple(weight.shape)}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = weight.shape if name.endswith("weight") else weight.shape[:1]
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        check_like(hidden, name, tensor)
    if not isinstance(logit_scale, (int, float)) or not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be a finite number other than 0, got {logit_scale!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a finite number above 0, got {softcap!r}")


def check_like(hidden_s: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless a tensor has the student's dtype and device."""
    if tensor.dtype != hidden_s.dtype:
        raise ValueError(f"{name} must have the dtype of hidden_s, {hidden_s.dtype}, got {tensor.dtype}")
    if tensor.device != hidden_s.device:
        raise ValueError(f"{name} is on {tensor.device} but hidden_s is on {hidden_s.device}")


def check_valid(hidden_s: Tensor, valid: Tensor) -> None:
    """Raises ValueError unless `valid` is bool [N]."""
    N = hidden_s.shape[0]
    if valid.shape != (N,) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool [N={N}], got {valid.dtype} {list(valid.shape)}")
    if valid.device != hidden_s.device:
        raise ValueError(f"valid is on {valid.device} but hidden_s is on {hidden_s.device}")


def check_chunk(chunk: int | None) -> None:
    """Raises ValueError unless this is a number of rows, or None."""
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be None or an integer of 1 or more, got {chunk!r}")

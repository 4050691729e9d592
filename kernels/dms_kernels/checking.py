"""What the operations that a cache calls check of their arguments."""

import torch


def expect(name: str, tensor: torch.Tensor | None, shape: tuple, *dtypes: torch.dtype) -> None:
    """Raises ValueError unless there is a tensor of this shape (None in it: any size) and of one of these dtypes (none: any)."""
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if len(tensor.shape) != len(shape) or any(want not in (None, have) for have, want in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} is {tuple(tensor.shape)} and should be {tuple('any' if n is None else n for n in shape)}")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype} and should be {' or '.join(map(str, dtypes))}")

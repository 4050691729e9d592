"""Tensors of caches that are idle, elsewhere than on their device: in host memory, or in a file."""

import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from dms.io.weights import save_tensors


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same shape, dtype and device, and of one element: for whoever asks these of a tensor that is elsewhere."""
    return tensor.new_empty(1).expand(tensor.shape)


class Offloaded:
    """Tensors by name, until `take` brings them back to their devices, bit by bit. folder: None: they wait in host memory, pinned where they
    come from a GPU; else in a file there, which goes with this object."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path | None):
        self._devices = {name: tensor.device for name, tensor in tensors.items()}
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.on_disk = folder is not None
        self._tensors: dict[str, torch.Tensor] | None = None
        if folder is None:
            self._tensors = {name: _to_host(tensor) for name, tensor in tensors.items()}
            return
        self._file = folder / f"{uuid.uuid4().hex}.safetensors"
        self._remove = weakref.finalize(self, self._file.unlink, missing_ok=True)
        save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, self._file, {})

    def take(self) -> dict[str, torch.Tensor]:
        """The tensors on their devices; to be called once.

        Raises:
            OSError: its file is gone.
        """
        if self._tensors is None:
            tensors = load_file(self._file)
            self._remove()
        else:
            tensors, self._tensors = self._tensors, {}
        return {name: tensor.to(self._devices[name]) for name, tensor in tensors.items()}


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.detach().cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach())

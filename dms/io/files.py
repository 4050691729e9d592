"""Safetensors files that follow the umask, as all other files do: the library's own are their owner's alone."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write tensors, contiguous ones of any device, as safetensors. metadata: as safetensors' own."""
    path = Path(path)
    save_file(dict(tensors), path, metadata)
    follow_umask(path)
    return path


def follow_umask(*paths: Path) -> None:
    """Give files the mode that `open` gives there: safetensors renames a temporary file, which has mode 0600 whatever the umask."""
    for path in paths:
        # A file of its own knows the umask and the folder's rules; reading the umask would change it for all threads.
        sample = path.with_name(f".{path.name}.{os.getpid()}.mode")
        sample.touch()
        try:
            mode = stat.S_IMODE(sample.stat().st_mode)
        finally:
            sample.unlink()
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)

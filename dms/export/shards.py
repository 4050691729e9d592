"""Copy weights from one folder to another, unchanged, with at most one shard in memory."""

import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from dms.io.weights import INDEX_FILE, save_tensors, tensor_spans, weight_files, write_index

_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", start=1)}}
_UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", start=1)}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" ...

    Raises:
        ValueError: anything else, and 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"a shard's size is {text!r}; give a number above 0 with a unit, such as 5GB, 500MB or 2GiB")
    return size


def copy_weights(source: Path, target: Path, max_bytes: int) -> list[Path]:
    """Copy a folder's weights, in files of at most `max_bytes` of tensors; a larger tensor has a file of its own.

    Files that are small enough already are copied as they are.
    """
    files = weight_files(source)
    if all(file.stat().st_size <= max_bytes for file in files):
        if (source / INDEX_FILE).is_file():
            shutil.copyfile(source / INDEX_FILE, target / INDEX_FILE)
        copied = [Path(shutil.copyfile(file, target / file.name)) for file in files]
        return [*copied, write_index(target)]
    # Files of packed weights say there how they are packed, by the weights' names.
    metadata: dict[str, str] = {"format": "pt"}
    for file in files:
        with safe_open(str(file), framework="pt") as f:
            metadata |= f.metadata() or {}
    shards = _divide(files, max_bytes)
    written = []
    for number, shard in enumerate(shards, start=1):
        tensors = _read(shard)
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        written.append(save_tensors(tensors, target / name, metadata))
    return [*written, write_index(target)]


def _divide(files: list[Path], max_bytes: int) -> list[list[tuple[Path, str]]]:
    shards: list[list[tuple[Path, str]]] = []
    size = 0
    for file in files:
        for name, (begin, end) in tensor_spans(file).items():
            if not shards or size + end - begin > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append((file, name))
            size += end - begin
    return shards


def _read(shard: list[tuple[Path, str]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(file for file, _ in shard):
        with safe_open(str(file), framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for of, name in shard if of == file}
    return tensors

"""Weights on disk: which files hold them, and the hash that ties gates to the base that they were trained on."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

GATES_FILE = "gates.safetensors"


def weight_files(folder: str | Path) -> list[Path]:
    return sorted(p for p in Path(folder).glob("*.safetensors") if p.name != GATES_FILE)


def base_hash(folder: str | Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and a sample of its rows; the same for any sharding of the same weights.

    Raises:
        ValueError: no safetensors files, or a damaged one.
    """
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no safetensors weights; save the model with save_pretrained")
    tensors: dict[str, bytes] = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                    part = f.get_slice(name)
                    shape = part.get_shape()
                    digest = hashlib.sha256(f"{name} {part.get_dtype()} {list(shape)}".encode())
                    rows = shape[0] if shape else 0
                    for index in sorted({rows * i // 8 for i in range(8)}) if rows else []:
                        digest.update(_raw_bytes(part[index : index + 1]))
                    tensors[name] = digest.digest()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name])
    return whole.hexdigest()[:32]


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

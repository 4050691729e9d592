"""Weights on disk: how safetensors files are written, which of them hold weights, their index, and the hash that ties gates to a base."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

GATES_FILE = "gates.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def save_tensors(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write tensors, contiguous ones of any device, as safetensors, with the mode that other files get. metadata: safetensors' own."""
    path = Path(path)
    save_file(dict(tensors), path, metadata)
    follow_umask(path)
    return path


def follow_umask(*paths: Path) -> None:
    """Give files the mode that `open` gives in their folder: safetensors renames a temporary file, which has mode 0600 whatever the umask."""
    for path in paths:
        # A file made here shows the umask and the folder's rules; reading the umask would change it for all threads.
        sample = path.with_name(f".{path.name}.{os.getpid()}.mode")
        sample.touch()
        try:
            mode = stat.S_IMODE(sample.stat().st_mode)
        finally:
            sample.unlink()
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def weight_files(folder: str | Path) -> list[Path]:
    return sorted(p for p in Path(folder).glob("*.safetensors") if p.name != GATES_FILE)


def write_index(folder: str | Path) -> Path:
    """Write the index of a folder's weights, of a single file too, unless it is there and right.

    Servers read every `*.safetensors` file of a folder but those that an index leaves out, and this one leaves out the gates.
    """
    path, size = Path(folder, INDEX_FILE), 0
    weight_map: dict[str, str] = {}
    for file in weight_files(folder):
        spans = tensor_spans(file)
        weight_map |= dict.fromkeys(spans, file.name)
        size += sum(end - begin for begin, end in spans.values())
    if _indexed(path) != weight_map:
        # A link into another folder is replaced, not followed.
        path.unlink(missing_ok=True)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _indexed(path: Path) -> dict[str, str] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tensor_spans(file: Path) -> dict[str, tuple[int, int]]:
    """The first byte and the end of each tensor, from a file's header; in the order of the data."""
    with open(file, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    return dict(sorted(spans.items(), key=lambda item: (item[1], item[0])))


def base_hash(weights: str | Path) -> str:
    """Of a folder, SHA-256 over every tensor's name, dtype, shape and a sample of its rows, the same for any sharding of the same weights;
    of a GGUF file, the file's. Its first 32 digits.

    Raises:
        ValueError: no safetensors files, or a damaged one.
    """
    if Path(weights).is_file():
        return sha256(weights)[:32]
    files = weight_files(weights)
    if not files:
        raise ValueError(f"{weights} holds no safetensors weights; save the model with save_pretrained")
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


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file; kept for as long as neither its size nor its time changes."""
    stat = Path(path).stat()
    return _sha256(Path(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _sha256(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

"""Weights on disk: how safetensors files are written, which of them hold weights, their index, and what ties gates to a base: a hash of its
weights, and its structure."""

import copy
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dms import hf_compat

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


@dataclass(frozen=True)
class Structure:
    """What all forms of a model share, whatever their dtype, quantisation or kind of file: its parameters' names and shapes."""

    model_type: str
    num_layers: int | None
    """None: the configuration does not say."""
    num_tensors: int
    """Parameters of the dense model, tied ones once."""
    num_parameters: int
    digest: str
    """SHA-256 over their names and shapes."""

    @classmethod
    def of(cls, build: Callable[[Any], Any], config: Any) -> "Structure":
        """The structure that a configuration gives. build: makes the model from it, such as its class; here without storage."""
        config = copy.deepcopy(config)
        for part in (config, config.get_text_config()):
            # It says how files hold the weights. The model itself is the same without.
            if hasattr(part, "quantization_config"):
                del part.quantization_config
            # Some modelling files (apertus) need a dtype, and saving leaves its name in its place.
            part.dtype = torch.get_default_dtype()
        with torch.device("meta"):
            model = build(config)
        ties = hf_compat.tied_weights(model)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters() if name not in ties}
        digest = hashlib.sha256("\n".join(f"{name} {shapes[name]}" for name in sorted(shapes)).encode()).hexdigest()[:32]
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        return cls(config.model_type, num_layers, len(shapes), sum(map(math.prod, shapes.values())), digest)

    @classmethod
    def from_saved(cls, text: str) -> "Structure":
        """Raises ValueError for text that `to_saved` did not write."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"base_structure in the gates' metadata cannot be read: {text!r}") from error

    def to_saved(self) -> str:
        return json.dumps(asdict(self))

    def difference(self, other: "Structure") -> str | None:
        """The first thing in which `other` differs, in words; None: nothing."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                return "names or shapes of parameters" if field.name == "digest" else f"{field.name}, {ours} against {theirs}"
        return None

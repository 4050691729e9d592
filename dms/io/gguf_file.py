"""What a GGUF file says before its weights: metadata, the table of its tensors, and its hash.

The package `gguf` reads a header too, but takes seconds for a vocabulary; this takes a tenth of one. Shapes are in torch's order.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

GGUF = ".gguf"
"""How the names of GGUF files end."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A model on the hub, as one writes it before the name of a GGUF file: OWNER/NAME."""
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Formats of metadata values by their type; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFError(ValueError):
    """A GGUF file that cannot be read, or not as the model that it is. Its message names the file."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """ggml's number of the type: 0 float32, 1 float16, 30 bfloat16, others quantised."""
    offset: int
    """From the start of the data."""
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """A GGUF file without its weights."""

    path: Path
    values: Mapping[str, Any]
    """Metadata by key; arrays are lists."""
    spans: Mapping[str, tuple[int, int]]
    """First byte and end of each metadata entry in the file, its key included."""
    tensors: Mapping[str, TensorInfo]
    table: tuple[int, int]
    """First byte and end of the table of tensors."""
    data_start: int

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    def of_model(self, key: str) -> Any:
        """A value of the architecture's own, such as "rope.freq_base"; None where there is none."""
        return self.values.get(f"{self.architecture}.{key}")

    @property
    def license(self) -> str | None:
        """The licence where the file names one by an identifier, such as "apache-2.0"."""
        name = str(self.values.get("general.license", "")).lower()
        return name if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) else None


def read_header(path: str | Path) -> GGUFHeader:
    """Raises ValueError for a file that is none, is damaged or truncated, or is one part of several."""
    path = Path(path)
    stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_header(path: Path, size: int, changed: int) -> GGUFHeader:
    with path.open("rb") as file:
        begin = file.read(24)
        if begin[:4] != _MAGIC:
            raise GGUFError(f"{path} is no GGUF file: it begins with {begin[:8]!r}, not with {_MAGIC!r}; fetch it again, or name another")
        if len(begin) < 24:
            raise _truncated(path, size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(path, data).header()
    _check(header, size)
    return header


def _check(header: GGUFHeader, size: int) -> None:
    path = header.path
    if "general.architecture" not in header.values:
        raise GGUFError(f"{path} does not say its architecture (general.architecture); name another file")
    if (parts := header.values.get("split.count", 0)) > 1:
        raise GGUFError(f"{path} is one of {parts} parts; join them into one file (llama-gguf-split --merge), and name that")
    if not header.tensors:
        raise GGUFError(f"{path} holds no tensors, such as a vocabulary alone; name a file with weights")
    end = header.data_start + max(tensor.offset + tensor.num_bytes for tensor in header.tensors.values())
    if end > size:
        raise _truncated(path, size, end)


def _truncated(path: Path, size: int, needed: int | None = None) -> GGUFError:
    where = f"its weights need {needed:,}" if needed is not None else "that is within its header"
    return GGUFError(f"{path} is truncated: it ends after {size:,} bytes, and {where}; fetch it again")


def _damaged(path: Path, what: str) -> GGUFError:
    return GGUFError(f"{path} is damaged: {what}; fetch it again")


class _Reader:
    """Goes through the bytes of a header once."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4

    def header(self) -> GGUFHeader:
        (version,) = self.take("I")
        if version not in _VERSIONS:
            raise GGUFError(
                f"{self.path} is a GGUF file of version {version}, and versions {' and '.join(map(str, _VERSIONS))} are read; "
                "convert it again with a newer llama.cpp"
            )
        num_tensors, num_values = self.take("QQ")
        values, spans = {}, {}
        for _ in range(num_values):
            begin, key = self.at, self.string()
            values[key] = self.value(self.take("I")[0])
            spans[key] = (begin, self.at)
        begin = self.at
        tensors = {tensor.name: tensor for tensor in (self.tensor() for _ in range(num_tensors))}
        if len(tensors) != num_tensors:
            raise _damaged(self.path, "two of its tensors have the same name")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _damaged(self.path, f"its alignment is {alignment!r}")
        return GGUFHeader(self.path, values, spans, tensors, (begin, self.at), -(-self.at // alignment) * alignment)

    def need(self, num_bytes: int) -> None:
        if self.at + num_bytes > len(self.data):
            raise _truncated(self.path, len(self.data))

    def take(self, formats: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{formats}")
        self.need(layout.size)
        found = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return found

    def string(self) -> str:
        (length,) = self.take("Q")
        self.need(length)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self.path, f"a text of its header, at byte {self.at - length:,}, is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _damaged(self.path, f"its header has a value of the unknown type {kind} before byte {self.at:,}")
        element, count = self.take("IQ")
        if element in _SCALARS:
            self.need(count)
            return list(self.take(f"{count}{_SCALARS[element]}"))
        # One byte an element at least, so that a damaged count ends here.
        self.need(count)
        return [self.value(element) for _ in range(count)]

    def tensor(self) -> TensorInfo:
        from gguf import GGML_QUANT_SIZES

        name = self.string()
        (num_dims,) = self.take("I")
        if num_dims > 8:
            raise _damaged(self.path, f"its tensor {name!r} has {num_dims} dimensions")
        shape = tuple(reversed(self.take(f"{num_dims}Q")))
        kind, offset = self.take("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise GGUFError(
                f"{self.path}: its tensor {name!r} is of type {kind}, which the installed gguf does not know; pip install -U gguf"
            )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if prod(shape) % block:
            raise _damaged(self.path, f"its tensor {name!r} of shape {shape} is not in blocks of {block}")
        return TensorInfo(name, shape, kind, offset, prod(shape) // block * block_bytes)

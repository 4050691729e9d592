"""The GPUs of hardware.yaml, typed: what plans, analyses and benchmarks know of a machine.

In dataclasses, so that it can be read where pydantic is not installed.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dms.config import nearest


@dataclass(frozen=True, kw_only=True)
class FlopRates:
    """Dense FLOP/s by dtype; None: the GPU does not have it."""

    fp32: float
    """Without tensor cores."""
    tf32: float
    """With tensor cores."""
    bf16: float
    fp16: float
    fp8: float | None = None
    int8: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: bytes, bytes per second, FLOP per second."""

    name: str
    device_names: list[str]
    """What `torch.cuda.get_device_name()` says of this very card, in whole: "NVIDIA H200 NVL" is another than "NVIDIA H200"."""
    memory: float
    bandwidth: float
    flops: FlopRates
    nvlink: float | None
    """To the other GPUs of its node, per direction; None: over PCIe."""
    pcie: float
    """To its host, per direction."""
    network: float
    """To other nodes."""
    gpus_per_node: int
    sources: list[str]

    def link(self, num_gpus: int) -> float:
        """Bytes per second between `num_gpus` GPUs: the slowest that they have to go over."""
        return self.network if num_gpus > self.gpus_per_node else self.nvlink or self.pcie


@dataclass(frozen=True, kw_only=True)
class Drive:
    """An NVMe drive: bytes, bytes per second."""

    name: str
    capacity: float
    read: float
    write: float


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one GPU has of its node."""

    memory: float
    """Bytes of main memory."""
    drive: Drive
    sources: list[str]


@dataclass(frozen=True, kw_only=True)
class Attainable:
    """Shares of the datasheet's figures that a training step is taken to reach."""

    compute: float
    memory: float
    links: float


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The whole file."""

    attainable: Attainable
    host_memory: float
    """Bytes per second of a node's main memory."""
    node: Node
    gpus: dict[str, Gpu]

    def gpu(self, name: str) -> Gpu:
        """Raises ValueError for a GPU that the file does not have."""
        if name not in self.gpus:
            # `h100` means h100-80, and is nearer to h200 by its letters.
            longer = [known for known in self.gpus if known.startswith(name.lower())]
            raise ValueError(f"unknown GPU {name!r}{nearest(name.lower(), longer[:1] or self.gpus)}; there are {', '.join(self.gpus)}")
        return self.gpus[name]

    def gpu_of_device(self, device_name: str) -> Gpu | None:
        """The GPU that PyTorch knows by this name; None: the file does not have it."""
        return next((gpu for gpu in self.gpus.values() if device_name in gpu.device_names), None)


@cache
def load() -> Hardware:
    return read(yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8")))


def read(values: dict[str, Any]) -> Hardware:
    """The file's contents, checked.

    Raises:
        ValueError: an unknown key, one that is missing, or a value of another kind than its field.
    """
    return _record(Hardware, values, "hardware")


def _record(kind: type, values: Any, where: str) -> Any:
    """A dataclass of these values."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; give a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ValueError(f"{where}: unknown key {name!r}{nearest(str(name), fields)}; allowed: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}: key {name!r} is missing")
    kinds = typing.get_type_hints(kind)
    return kind(**{name: _value(kinds[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of a field's type: numbers are above zero."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    if isinstance(kind, types.UnionType):
        return None if value is None else _value(typing.get_args(kind)[0], value, where)
    if kind == dict[str, Gpu] and isinstance(value, dict):
        return {name: _record(Gpu, gpu, f"{where}.{name}") for name, gpu in value.items()}
    if kind == list[str] and isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and value > 0:
        return value
    if kind is float:
        # YAML 1.1 takes 80e9 for a word.
        number = _number(value)
        if number is not None and number > 0:
            return number
    raise ValueError(f"{where} is {value!r}; give {'a number above 0' if kind in (int, float) else 'text'}")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None

"""The GPUs of hardware.yaml, typed. Used where a plan or an analysis needs to know what a machine can do."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from dms.config import nearest
from dms.strict_config import Strict


class FlopRates(Strict):
    """Dense FLOP/s by dtype; None: the GPU does not have it. fp32 without tensor cores, tf32 with."""

    fp32: float = Field(gt=0)
    tf32: float = Field(gt=0)
    bf16: float = Field(gt=0)
    fp16: float = Field(gt=0)
    fp8: float | None = Field(default=None, gt=0)
    int8: float | None = Field(default=None, gt=0)


class Gpu(Strict):
    """One GPU: bytes, bytes per second, FLOP per second."""

    name: str
    device_names: list[str] = Field(min_length=1)
    """What `torch.cuda.get_device_name()` says of this very card, in whole: "NVIDIA H200 NVL" is another than "NVIDIA H200"."""
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    flops: FlopRates
    nvlink: float | None = Field(gt=0)
    """To the other GPUs of its node, per direction; None: over PCIe."""
    pcie: float = Field(gt=0)
    """To its host, per direction."""
    network: float = Field(gt=0)
    """To other nodes."""
    gpus_per_node: int = Field(ge=1)
    sources: list[str] = Field(min_length=1)

    def link(self, num_gpus: int) -> float:
        """Bytes per second between `num_gpus` GPUs: the slowest that they have to go over."""
        return self.network if num_gpus > self.gpus_per_node else self.nvlink or self.pcie


class Attainable(Strict):
    """Shares of the datasheet's figures that a training step is taken to reach."""

    compute: float = Field(gt=0, le=1)
    memory: float = Field(gt=0, le=1)
    links: float = Field(gt=0, le=1)


class Hardware(Strict):
    """The whole file. host_memory: bytes per second of a node's main memory."""

    attainable: Attainable
    host_memory: float = Field(gt=0)
    gpus: dict[str, Gpu]

    def gpu(self, name: str) -> Gpu:
        """Raises ValueError for a GPU that the file does not have."""
        if name not in self.gpus:
            # `h100` means h100-80, and is nearer to h200 by its letters.
            longer = [known for known in self.gpus if known.startswith(name.lower())]
            raise ValueError(f"unknown GPU {name!r}{nearest(name.lower(), longer[:1] or self.gpus)}; there are {', '.join(self.gpus)}")
        return self.gpus[name]


@cache
def load() -> Hardware:
    path = Path(__file__).with_name("hardware.yaml")
    return Hardware(**_numbers(yaml.safe_load(path.read_text(encoding="utf-8"))))


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes 80e9 for a word."""
    if isinstance(value, dict):
        return {key: _numbers(child) for key, child in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

"""Exact fingerprints of weights, cheap on any device: did anything that was frozen change?"""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from dms.training.sharding import gathered

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """Two position-weighted sums of every tensor's bits, by name."""

    sums: dict[str, tuple[int, int]]

    @property
    def digest(self) -> str:
        """The same for the same weights, however they are divided among processes."""
        return hashlib.sha256(json.dumps(sorted(self.sums.items())).encode()).hexdigest()[:32]

    def differing(self, other: "Fingerprint") -> list[str]:
        return sorted(name for name in self.sums.keys() | other.sums.keys() if self.sums.get(name) != other.sums.get(name))


@torch.no_grad()
def fingerprint(model: nn.Module, skip: set[int] = frozenset()) -> Fingerprint:
    """Fingerprint all parameters but those whose id() is in `skip`. Under ZeRO-3 every process calls it."""
    sums = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in skip:
            continue
        with gathered([parameter]):
            sums[name] = _sums(parameter.detach())
    return Fingerprint(sums)


def _sums(tensor: torch.Tensor) -> tuple[int, int]:
    bits = tensor.contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    # Integer sums wrap and are exact in any order.
    weighted = sum(int((part.long() * (torch.arange(part.numel(), device=part.device) % 65_521 + 1)).sum()) for part in bits.split(1 << 24))
    return int(bits.sum(dtype=torch.int64)), weighted

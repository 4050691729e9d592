"""Exact fingerprints of weights, cheap on any device: did anything that was frozen change?"""

from dataclasses import dataclass

import torch
from torch import nn

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """Two position-weighted sums of every tensor's bits, by name."""

    sums: dict[str, tuple[int, int]]

    def differing(self, other: "Fingerprint") -> list[str]:
        return sorted(name for name in self.sums.keys() | other.sums.keys() if self.sums.get(name) != other.sums.get(name))


@torch.no_grad()
def fingerprint(model: nn.Module, skip: set[int] = frozenset()) -> Fingerprint:
    """Fingerprint all parameters but those whose id() is in `skip`."""
    sums = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in skip:
            continue
        bits = parameter.detach().contiguous().view(-1).view(_INTEGER[parameter.element_size()])
        # Integer sums wrap and are exact in any order.
        plain = int(bits.sum(dtype=torch.int64))
        weighted = sum(
            int((part.long() * (torch.arange(part.numel(), device=part.device) % 65_521 + 1)).sum()) for part in bits.split(1 << 24)
        )
        sums[name] = (plain, weighted)
    return Fingerprint(sums)

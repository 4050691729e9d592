"""Tokens on their way into a layer's cache, and what gates say of them.

Shapes: B batch, H KV heads, N new tokens, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dms.masks import Tokens


@dataclass(frozen=True)
class PendingGate:
    """A gate that the append kernel runs by itself: it reads hidden [B, 1, M]; bias is added to its logits."""

    gate: nn.Module
    hidden: torch.Tensor
    bias: float

    def arguments(self) -> dict:
        """Of `dms_kernels.append`."""
        gate = self.gate
        return {
            "hidden": self.hidden[:, 0],
            "gate_weight": gate.weight,
            "gate_bias": gate.bias,
            "gate_scale": gate.scale,
            "gate_offset": gate.offset,
            "gate_normalize": gate.normalize,
            "evict_bias": self.bias,
        }


@dataclass
class Incoming:
    """Tokens that are not in the ring yet. k, v [B, H, N, D]; decision [B, N, H] bool as their gates made it, or None beside a
    gate that is still to run, for one token a row."""

    decision: torch.Tensor | None
    tokens: Tokens
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    gate: PendingGate | None = None

    def cat(self, other: "Incoming") -> "Incoming":
        k, v = torch.cat([self.k, other.k], 2), torch.cat([self.v, other.v], 2)
        return Incoming(torch.cat([self.decision, other.decision], 1), self.tokens.cat(other.tokens), k, v)

    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        return bool((self.tokens.segment_BT > 1).any())

    def last_documents(self) -> "Incoming":
        """Everything before a row's last document turned into padding."""
        segment = self.tokens.segment_BT
        here = segment == segment.amax(1, keepdim=True)
        return Incoming(self.decision, Tokens(torch.where(here, segment, 0).clamp(max=1), self.tokens.position_BT), self.k, self.v)

    def map(self, fn) -> "Incoming":
        """fn on each tensor; all have the batch first."""
        return Incoming(fn(self.decision), self.tokens.map(fn), fn(self.k), fn(self.v))

    def columns(self, part: slice) -> "Incoming":
        return Incoming(self.decision[:, part], self.tokens.map(lambda x: x[:, part]), self.k[:, :, part], self.v[:, :, part])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "decision": self.decision,
            "segment": self.tokens.segment_BT,
            "position": self.tokens.position_BT,
            "k": self.k,
            "v": self.v,
        }


@dataclass
class Decisions:
    """What gates say of new tokens. state [B, H, N] uint8; evicted, decided: counts [B, H] and [B] int64 of what the gates
    decide now; last [B, H] uint8: the state of the ring's last token from now on (UNDECIDED: as it is), None under `own`."""

    state: torch.Tensor
    evicted: torch.Tensor
    decided: torch.Tensor
    last: torch.Tensor | None = None

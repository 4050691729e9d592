"""Tokens on their way into a layer's cache, and what is decided for them.

Shapes: B batch, H KV heads, N new tokens, M model dim, D head dim.
"""

from dataclasses import dataclass

import torch

from dms.gates import Gate
from dms.masks import Tokens
from dms_kernels.arguments import GateInputs

# States of a token in the ring. Evicted by decision j = 2, 3, 4 of several windows, and none before: j + 1.
KEEP, EVICT, UNDECIDED = 0, 1, 2


@dataclass(frozen=True)
class PendingGate:
    """A gate that the append kernel runs by itself: it reads hidden [B, 1, M]; bias is added to its logits."""

    gate: Gate
    hidden: torch.Tensor
    bias: float

    def kernel_gate(self) -> GateInputs:
        gate = self.gate
        return GateInputs(self.hidden[:, 0], gate.weight, gate.bias, gate.scale, gate.offset, gate.normalize, self.bias)


@dataclass(frozen=True)
class PendingTokens:
    """Tokens whose keys and values are known and not in the ring yet."""

    decided: torch.Tensor | PendingGate
    """[B, N, H] bool as the gates made it, True to evict, with several windows [B, N, H, number of windows]; or, for one token a row, the
    gate that the append kernel runs."""
    tokens: Tokens
    k: torch.Tensor
    """[B, H, N, D]"""
    v: torch.Tensor
    """[B, H, N, D]"""

    @property
    def decision(self) -> torch.Tensor:
        """[B, N, H] bool (of several windows [B, N, H, number of windows]), of tokens whose gates have run."""
        assert isinstance(self.decided, torch.Tensor), "the append kernel runs this token's gate"
        return self.decided

    @property
    def num_tokens(self) -> int:
        """Tokens a row, padding included."""
        return self.k.shape[2]

    def cat(self, other: "PendingTokens") -> "PendingTokens":
        k, v = torch.cat([self.k, other.k], 2), torch.cat([self.v, other.v], 2)
        return PendingTokens(torch.cat([self.decision, other.decision], 1), self.tokens.cat(other.tokens), k, v)

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.num_tokens > 1 and self.tokens.packed

    def last_documents(self) -> "PendingTokens":
        """Everything before a row's last document turned into padding."""
        segment = self.tokens.segment_BT
        is_last = segment == segment.amax(1, keepdim=True)
        tokens = Tokens(torch.where(is_last, segment, 0).clamp(max=1), self.tokens.position_BT)
        return PendingTokens(self.decided, tokens, self.k, self.v)

    def select(self, rows: torch.Tensor) -> "PendingTokens":
        def chosen(x: torch.Tensor) -> torch.Tensor:
            return x.index_select(0, rows)

        return PendingTokens(chosen(self.decision), self.tokens.map(chosen), chosen(self.k), chosen(self.v))

    def first(self, num_tokens: int) -> "PendingTokens":
        part = slice(0, num_tokens)
        return PendingTokens(self.decision[:, part], self.tokens.map(lambda x: x[:, part]), self.k[:, :, part], self.v[:, :, part])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "decision": self.decision,
            "segment": self.tokens.segment_BT,
            "position": self.tokens.position_BT,
            "k": self.k,
            "v": self.v,
        }


@dataclass(frozen=True)
class Decisions:
    """What the gates of new tokens decide."""

    state: torch.Tensor
    """[B, H, N] uint8: KEEP, EVICT or UNDECIDED for each new token, or one of several windows' states."""
    evicted: torch.Tensor
    """[B, H] int64: how many of the decisions made now are to evict."""
    decided: torch.Tensor
    """[B] int64: how many decisions are made now, a head."""
    last: torch.Tensor | None = None
    """[B, H] uint8: the state of the ring's last token from now on (UNDECIDED: as it is); None under alignment `own`."""


def fates(decision: torch.Tensor) -> torch.Tensor:
    """What decisions mean for their tokens, [..., H]: evicted or not, bool, as it is; of several windows [..., H, number of windows] states,
    uint8."""
    if decision.dim() < 4:
        return decision
    state = torch.full(decision.shape[:-1], KEEP, dtype=torch.uint8, device=decision.device)
    for j, evicts in reversed(list(enumerate(decision.unbind(-1), 1))):
        state.masked_fill_(evicts, EVICT if j == 1 else j + 1)
    return state


def list_of(state: torch.Tensor) -> torch.Tensor:
    """Which of a head's lists tokens go to that leave the ring in such a state and are not gone, int64."""
    return (state.long() - UNDECIDED).clamp(min=0)

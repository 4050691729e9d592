"""Per-head budgets for policies that score (AdaKV, arXiv 2407.11550): a layer's entries are divided among its heads by their scores.

Shapes: B batch, H KV heads, S entries alive.
"""

from typing import Any

import torch

from dms.evaluation.policies.rules import Policy

# Of the budget, for each head whatever its scores are: the paper's safeguard, and that of kvpress.
SAFEGUARD = 0.2


class PerHead(Policy):
    """Keeps the entries of the highest scores over all heads of a layer, as many as its heads have budgets for together. A head keeps its own
    best fifth of the budget in any case."""

    def choose(self, score_BHS: torch.Tensor, alive_BHS: torch.Tensor, surplus: int) -> torch.Tensor:
        num_safe = int(SAFEGUARD * self.budget)
        # From a head's best: its newest and other protected entries are among them.
        rank_BHS = score_BHS.masked_fill(~alive_BHS, float("-inf")).flip(2).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        stays_BHS = (rank_BHS.flip(2) < num_safe) | ~alive_BHS
        order_Bn = score_BHS.masked_fill(stays_BHS, float("inf")).flatten(1).argsort(dim=1, stable=True)[:, :surplus]
        return torch.zeros_like(alive_BHS).flatten(1).scatter_(1, order_Bn, True).view_as(alive_BHS)


def per_head(policy: type[Policy]) -> type[Policy]:
    """The policy with per-head budgets."""
    made: Any = type(f"Ada{policy.__name__}", (PerHead, policy), {"__doc__": f"{policy.__name__} with per-head budgets (AdaKV)."})
    return made

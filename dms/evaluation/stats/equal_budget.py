"""Dense with k sampled chains beside dms with as many chains as the same KV budget allows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dms.evaluation.stats.bootstrap import Sample, compare
from dms.evaluation.stats.rows import Comparison, Verdict, comparison_to_dict

# What a budget counts, by the name of its row field.
BUDGETS = {"entries_read": "entries read", "peak_entries": "entries held"}


@dataclass(frozen=True)
class Curve:
    """Accuracy and cost of 1 .. K chains, of one policy at one operating point, over N problems; k chains stand at index k - 1.

    Costs are means over the KV heads of the layers with gates, as counted in the cache at every step, and expectations over which
    k of the sampled chains they are.
    """

    policy: str
    evict_bias: float | None
    accuracy_NK: dict[str, np.ndarray]
    """By metric."""
    reads_NK: np.ndarray
    """Entries that are read, summed over the decoding steps of k chains. Each step of each chain reads all that is alive for it, the
    prompt's entries too, however many chains share them. The prompt is read once for all chains and in every policy, which is not
    counted."""
    peak_NK: np.ndarray
    """The most entries alive at one step of k chains that are decoded side by side. What chains can share of the prompt counts once in
    every policy, as an engine that serves them shares it (`Sampled.shared`)."""

    def sample(self, metric: str, k: int) -> Sample:
        value_N = self.accuracy_NK[metric][:, k - 1]
        return Sample(value_N, np.ones_like(value_N))

    def cost_K(self, budget: str) -> np.ndarray:
        """Mean over problems."""
        return (self.reads_NK if budget == "entries_read" else self.peak_NK).mean(0)


@dataclass(frozen=True, kw_only=True)
class EqualBudget:
    """Dense with `dense_k` chains beside the most chains of dms that take no more of a budget."""

    evict_bias: float | None
    metric: str
    budget: str
    dense_k: int
    dense_value: float
    dense_cost: float
    dms_k: int | None
    """None: a single chain takes more."""
    dms_value: float | None
    dms_cost: float | None
    capped: bool
    """All chains that were sampled take so much less that one more would not take more."""
    vs_dense: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "vs_dense": comparison_to_dict(self.vs_dense)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EqualBudget":
        versus = values["vs_dense"]
        return cls(**{**values, "vs_dense": versus and Comparison(**{**versus, "verdict": Verdict(versus["verdict"])})})


def equal_budgets(dense: Curve, others: Sequence[Curve], ks: Sequence[int], draws_RN: np.ndarray) -> list[EqualBudget]:
    """For each k of dense, metric and budget: the largest number of dms chains that takes no more, and the paired difference, resampled
    by `draws_RN` (`bootstrap.make_draws` of the N problems)."""
    return [
        _at_budget(dense, curve, metric, budget, k, draws_RN)
        for curve in others
        for metric in dense.accuracy_NK
        for budget in BUDGETS
        for k in ks
    ]


def _at_budget(dense: Curve, curve: Curve, metric: str, budget: str, k: int, draws_RN: np.ndarray) -> EqualBudget:
    dense_cost, cost_K = float(dense.cost_K(budget)[k - 1]), curve.cost_K(budget)
    # Of the first chain the prompt is a part, which others may share.
    one_more = cost_K[-1] - cost_K[-2] if len(cost_K) > 1 else cost_K[0]
    # Costs grow with k.
    most = int(np.searchsorted(cost_K, dense_cost, side="right"))
    dense_sample = dense.sample(metric, k)
    sample = curve.sample(metric, most) if most else None
    return EqualBudget(
        evict_bias=curve.evict_bias,
        metric=metric,
        budget=budget,
        dense_k=k,
        dense_value=dense_sample.value,
        dense_cost=dense_cost,
        dms_k=most or None,
        dms_value=sample.value if sample is not None else None,
        dms_cost=float(cost_K[most - 1]) if most else None,
        capped=bool(cost_K[-1] < dense_cost and cost_K[-1] + one_more <= dense_cost),
        vs_dense=None if sample is None else compare(sample, dense_sample, draws_RN, higher_is_better=True),
    )

"""Dense with k chains beside dms with as many as the same KV budget allows, in figures and in words."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dms.evaluation.stats.bootstrap import compare

if TYPE_CHECKING:
    from dms.evaluation.engine.scaling import Curve

# What each budget is called in words.
_BUDGETS = {"entries_read": "entries read", "peak_entries": "entries held"}


def equal_budgets(dense: "Curve", others: list["Curve"], ks: list[int], draws_RN: np.ndarray) -> list[dict[str, Any]]:
    """For each k of dense, metric and budget: the largest number of dms chains that takes no more, and the paired difference, resampled
    by `draws_RN` (`bootstrap.make_draws` of the N problems).

    `capped`: all chains that were sampled take so much less that one more would not take more. dms_k is None where a single chain takes more.
    """
    found = []
    for curve in others:
        for metric in dense.accuracy_NK:
            for budget in _BUDGETS:
                found += [_at_budget(dense, curve, metric, budget, k, draws_RN) for k in ks]
    return found


def _at_budget(dense: "Curve", curve: "Curve", metric: str, budget: str, k: int, draws_RN: np.ndarray) -> dict[str, Any]:
    dense_cost_K, cost_K = ((c.reads_NK if budget == "entries_read" else c.peak_NK).mean(0) for c in (dense, curve))
    dense_cost = float(dense_cost_K[k - 1])
    # Of the first chain the prompt is a part, which others may share.
    one_more = cost_K[-1] - cost_K[-2] if len(cost_K) > 1 else cost_K[0]
    # Costs grow with k.
    most = int(np.searchsorted(cost_K, dense_cost, side="right"))
    dense_sample = dense.sample(metric, k)
    row = {
        "evict_bias": curve.evict_bias,
        "metric": metric,
        "budget": budget,
        "dense_k": k,
        "dense_value": dense_sample.value,
        "dense_cost": dense_cost,
        "dms_k": most or None,
        "dms_value": None,
        "dms_cost": None,
        "capped": bool(cost_K[-1] < dense_cost and cost_K[-1] + one_more <= dense_cost),
        "vs_dense": None,
    }
    if most:
        sample = curve.sample(metric, most)
        versus = compare(sample, dense_sample, draws_RN, higher_is_better=True)
        row |= {"dms_value": sample.value, "dms_cost": float(cost_K[most - 1]), "vs_dense": versus.to_dict()}
    return row


def sentences(equal: list[dict[str, Any]], task: str) -> list[str]:
    """One sentence for each operating point, metric and budget; budgets that come to the same number of chains share one."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in equal:
        groups.setdefault((row["evict_bias"], row["metric"]), {}).setdefault(row["budget"], []).append(row)
    found = []
    for (bias, metric), budgets in groups.items():
        said: dict[str, list[str]] = {}
        for budget, rows in budgets.items():
            said.setdefault("; ".join(map(_comparison, rows)), []).append(_BUDGETS[budget])
        found += [
            f"{task}, {metric}@k with no more {' and '.join(names)} than dense, at evict_bias {bias:g}: {words}."
            for words, names in said.items()
        ]
    return found


def _comparison(row: dict[str, Any]) -> str:
    dense = f"dense with {_chains(row['dense_k'])} {row['dense_value']:.3f}"
    if row["dms_k"] is None:
        return f"{dense}, and a single chain of dms takes more"
    versus = row["vs_dense"]
    chains = f"all {row['dms_k']}, which take less," if row["capped"] else row["dms_k"]
    return (
        f"{dense}, dms with {chains} {row['dms_value']:.3f}, {versus['verdict']} "
        f"({versus['difference']:+.3f}, {versus['ci_low']:+.3f} to {versus['ci_high']:+.3f})"
    )


def _chains(num: int) -> str:
    return "1 chain" if num == 1 else f"{num} chains"

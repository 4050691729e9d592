"""From finished units to result rows: values with intervals, paired differences, and marks on what must not be trusted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dms.evaluation.engine.settings import Settings
from dms.evaluation.engine.units import point_name
from dms.evaluation.stats.bootstrap import HIGHER_IS_BETTER, Sample, compare, interval, make_draws
from dms.evaluation.suites import CHANCE

# A measured budget may be off by so much before it is marked.
BUDGET_TOLERANCE = 0.03
# Questions, or windows of text; and documents that ask, for questions of one document are not independent.
MIN_SAMPLES, MIN_DOCUMENTS = 50, 25
# Where an answer cannot be guessed, a model that finds less than this does not do the task.
_LEAST_ACCURACY = 0.05

EVICTED_NOTHING, BUDGET_MISSED, DENSE_AT_CHANCE, FEW_SAMPLES = "evicted_nothing", "budget_missed", "dense_at_chance", "few_samples"
BEYOND_TRAINING = "beyond_training"
# What `--strict` does not let pass; the other is for information.
FATAL = (EVICTED_NOTHING, BUDGET_MISSED, DENSE_AT_CHANCE, FEW_SAMPLES)


@dataclass
class Collected:
    """One policy on all documents of a suite at a length. metrics: (task, metric) -> its sample, documents in the same order for every policy."""

    metrics: dict[tuple[str, str], Sample]
    entries_D: np.ndarray
    reads_D: np.ndarray
    peak_D: np.ndarray
    budget: float | None
    num_seen: int
    bytes: int
    evicted: int
    decided: int
    step_ms: float
    seconds: float
    batch_size: int
    marks: list[str] = field(default_factory=list)

    @property
    def entries(self) -> float:
        return float(self.entries_D.mean())

    @property
    def cr(self) -> float:
        return self.num_seen / self.entries


def collect(results: Iterable[Mapping[str, Any]]) -> Collected:
    """Join the units of one policy, suite and length."""
    results = list(results)
    sizes = [len(result["entries"]) for result in results]
    names = dict.fromkeys(name for result in results for name in result["metrics"])

    def joined(name: str, part: int) -> list[float]:
        return [x for result, size in zip(results, sizes, strict=True) for x in result["metrics"].get(name, [[0.0] * size] * 2)[part]]

    def mean(name: str) -> float:
        return float(np.average([result[name] for result in results], weights=sizes))

    per_document = {f"{name}_D": np.concatenate([result[name] for result in results]) for name in ("entries", "reads", "peak")}
    return Collected(
        metrics={tuple(name.split("|")): Sample(joined(name, 0), joined(name, 1)) for name in names},
        **per_document,
        budget=None if results[0]["budget"] is None else mean("budget"),
        num_seen=results[0]["num_seen"],
        bytes=round(mean("bytes")),
        evicted=sum(result["evicted"] for result in results),
        decided=sum(result["decided"] for result in results),
        step_ms=float(np.median([result["step_ms"] for result in results])),
        seconds=sum(result["seconds"] for result in results),
        batch_size=max(sizes),
    )


def make_rows(
    units: Mapping[tuple[str, int], list[Mapping[str, Any]]],
    settings: Settings,
    *,
    common: Mapping[str, Any],
    trained_length: int | None,
) -> list[dict[str, Any]]:
    """units: (suite, length) -> what its units' files hold; points that are missing from one of them are left out. common: the fields that
    all rows share."""
    rows = []
    for (suite, length), results in units.items():
        points = [point for point in settings.points() if all(point_name(*point) in result for result in results)]
        by_point = {point: collect(result[point_name(*point)] for result in results) for point in points}
        if ("dense", None) not in by_point:
            continue
        draws = make_draws(len(by_point["dense", None].entries_D), suite, length, settings.seed)
        # The other policies were not trained.
        beyond = [BEYOND_TRAINING] * (trained_length is not None and length > trained_length)
        for point, found in by_point.items():
            found.marks = [*_marks(point[0], found), *(beyond if point[0] == "dms" else [])]
            for name in sorted(found.metrics, key=_place):
                limit = {"limit": settings.num_greedy} if name[1] == "divergence_length" else {}
                rows.append(_row(suite, length, point, name, by_point, draws, common) | limit)
    return rows


def _place(name: tuple[str, str]) -> int:
    """Of a figure in tables: retrieval as a whole, then task by task; running text comes last."""
    task, _ = name
    return -1 if task.startswith("recall") else list(CHANCE).index(task) if task in CHANCE else len(CHANCE)


def _marks(policy: str, found: Collected) -> list[str]:
    if policy == "dense":
        return []
    marks = [EVICTED_NOTHING] if found.entries >= found.num_seen else []
    if found.budget is not None and abs(found.entries / min(found.budget, found.num_seen) - 1) > BUDGET_TOLERANCE:
        marks.append(BUDGET_MISSED)
    return marks


def _row(suite: str, length: int, point, name: tuple[str, str], by_point: Mapping, draws: np.ndarray, common: Mapping) -> dict[str, Any]:
    (task, metric), (policy, bias), found = name, point, by_point[point]
    sample, is_share, chance = found.metrics[name], metric == "accuracy", CHANCE.get(task, 0.0)
    low, high = interval(sample, draws, is_share)
    count, dense, dms = sample.count(is_share), by_point["dense", None], by_point.get(("dms", bias))
    marks = list(found.marks)
    if is_share and is_at_chance(dense.metrics[name], draws, chance):
        marks.append(DENSE_AT_CHANCE)
    if count < MIN_SAMPLES or sample.num_documents < MIN_DOCUMENTS:
        marks.append(FEW_SAMPLES)

    def against(other: Collected | None) -> dict | None:
        if other is None or other is found or name not in other.metrics:
            return None
        return compare(sample, other.metrics[name], draws, higher_is_better=HIGHER_IS_BETTER[metric]).to_dict()

    kept = found.decided - found.evicted
    return {
        **common,
        "suite": suite,
        "policy": policy,
        "evict_bias": bias,
        "task": task,
        "length": length,
        "metric": metric,
        "value": sample.value,
        "ci_low": low,
        "ci_high": high,
        "num_samples": count,
        "num_documents": sample.num_documents,
        "cr_decided": 1.0 if policy == "dense" else found.decided / kept if policy == "dms" and kept else None,
        "cr": found.cr,
        "bytes": found.bytes,
        "memory": None if policy == "dense" else "compacted",
        "budget": found.budget,
        "entries": found.entries,
        "peak_entries": float(found.peak_D.max()),
        "reads": float(found.reads_D.mean()),
        "step_ms": found.step_ms,
        "batch_size": found.batch_size,
        "chance": chance if is_share else None,
        "marks": marks,
        "vs_dense": against(dense) if policy != "dense" else None,
        "vs_dms": against(dms) if policy not in ("dense", "dms") else None,
        "seconds": found.seconds,
    }


def is_at_chance(dense: Sample, draws: np.ndarray, chance: float) -> bool:
    """Whether the dense model does no better than guessing: then nothing can be lost, and nothing is shown. Of few samples only
    where it is so by their own count: their interval says no more than that they are few."""
    floor = max(chance, _LEAST_ACCURACY)
    return dense.value <= floor or (dense.count(True) >= MIN_SAMPLES and interval(dense, draws, True)[0] <= floor)

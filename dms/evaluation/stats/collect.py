"""From finished units to result rows: values with intervals, paired differences, and marks on what must not be trusted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dms.evaluation.stats.bootstrap import HIGHER_IS_BETTER, Sample, compare, interval, make_draws
from dms.evaluation.stats.results import DMS_POLICIES, OperatingPoint, PolicyResult, Sums, UnitResults
from dms.evaluation.stats.rows import Comparison, Mark, ResultRow, RowContext
from dms.evaluation.suites import CHANCE

# A measured budget may be off by so much before it is marked.
BUDGET_TOLERANCE = 0.03
# Questions, or windows of text; and documents that ask, for questions of one document are not independent.
MIN_SAMPLES, MIN_DOCUMENTS = 50, 25
# Questions by their distance from the record that answers them: q1 nearest, q4 farthest.
NUM_QUARTILES = 4
# Where an answer cannot be guessed, a model that finds less than this does not do the task.
_LEAST_ACCURACY = 0.05


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One policy on all documents of a suite at a length; documents stand in the same order for every policy."""

    metrics: dict[tuple[str, str], Sample]
    """By task and metric."""
    entries: float
    """Entries a head alive at the end, mean over documents."""
    entries_mean: float | None
    """Entries a head alive in the mean over positions, mean over documents; None: not counted, as in results of earlier versions."""
    peak_entries: float | None
    reads: float | None
    budget: float | None
    num_seen: int
    cr: float
    cr_mean: float | None
    bytes: int | None
    memory: str | None
    evicted: int
    decided: int
    step_ms: float | None
    seconds: float
    num_documents: int
    batch_size: int

    def cr_decided(self, policy: str) -> float | None:
        """None where the policy decides nothing."""
        kept = self.decided - self.evicted
        if policy == "dense":
            return 1.0
        return self.decided / kept if policy in DMS_POLICIES and kept else None


def collect(results: Iterable[PolicyResult]) -> Collected:
    """Join the units of one policy, suite and length."""
    results = list(results)
    first, sizes = results[0], [result.num_documents for result in results]
    names = dict.fromkeys(name for result in results for name in result.metrics)

    def sample(name: tuple[str, str]) -> Sample:
        parts = [result.metrics.get(name) or Sums.zeros(size) for result, size in zip(results, sizes, strict=True)]
        return Sample([x for part in parts for x in part.numerators], [x for part in parts for x in part.denominators])

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=sizes))

    entries = float(np.concatenate([result.entries for result in results]).mean())
    reads = [result.reads for result in results if result.reads is not None]
    means = [result.entries_mean for result in results if result.entries_mean is not None]
    entries_mean = float(np.concatenate(means).mean()) if len(means) == len(results) else None
    peak = [result.peak for result in results if result.peak is not None]
    budgets = [result.budget for result in results if result.budget is not None]
    held = [result.bytes for result in results if result.bytes is not None]
    step_ms = [result.step_ms for result in results if result.step_ms is not None]
    # As whole numbers where they were counted so: a ratio of sums.
    seen = [result.seen for result in results if result.seen is not None]
    alive = [result.alive for result in results if result.alive is not None]
    return Collected(
        metrics={name: sample(name) for name in names},
        entries=entries,
        entries_mean=entries_mean,
        peak_entries=float(np.concatenate(peak).max()) if peak else None,
        reads=float(np.concatenate(reads).mean()) if reads else None,
        budget=mean(budgets) if budgets else None,
        num_seen=first.num_seen,
        cr=sum(seen) / max(1, sum(alive)) if alive else first.num_seen / entries,
        cr_mean=(first.num_seen + 1) / 2 / entries_mean if entries_mean else None,
        bytes=round(mean(held)) if held else None,
        memory=next((result.memory for result in results if result.memory is not None), None),
        evicted=sum(result.evicted for result in results),
        decided=sum(result.decided for result in results),
        step_ms=float(np.median(step_ms)) if step_ms else None,
        seconds=sum(result.seconds for result in results),
        num_documents=sum(sizes),
        batch_size=max(result.batch_size for result in results),
    )


def make_rows(
    units: Mapping[tuple[str, int], Sequence[UnitResults]],
    points: Sequence[OperatingPoint],
    *,
    context: RowContext,
    trained_length: int | None,
    num_greedy: Callable[[int], int],
) -> list[ResultRow]:
    """Rows of every suite and length in `units`, which holds its units' results; points that one of them lacks are left out.

    trained_length: tokens that the gates were trained at; None: not known, and nothing is marked as beyond it. num_greedy: the bound
    of `divergence_length`, by length.
    """
    rows = []
    for (suite, length), results in units.items():
        there = [point for point in points if all(point.name in result for result in results)]
        by_point = {point: collect(result[point.name] for result in results) for point in there}
        dense = by_point.get(OperatingPoint("dense", None))
        if dense is None:
            continue
        # The same draws for every policy: comparisons are paired.
        draws_RD = make_draws(dense.num_documents, suite, length, context.seed)
        beyond = trained_length is not None and length > trained_length
        for point, found in by_point.items():
            marks = _marks(point.policy, found, beyond)
            for name in sorted(found.metrics, key=_place):
                limit = num_greedy(length) if name[1] == "divergence_length" else None
                rows.append(_row(suite, length, point, name, by_point, draws_RD, marks, context, limit))
    return rows


def _place(name: tuple[str, str]) -> int:
    """A figure's place in tables: retrieval as a whole, then task by task; running text comes last."""
    task, _ = name
    return -1 if task.startswith("recall") else list(CHANCE).index(task) if task in CHANCE else len(CHANCE)


def _marks(policy: str, found: Collected, beyond: bool) -> list[Mark]:
    """Marks that all rows of a policy bear. beyond: the documents are longer than those that the gates were trained on."""
    if policy == "dense":
        return []
    marks = [Mark.EVICTED_NOTHING] if found.entries >= found.num_seen else []
    if found.budget is not None and abs(found.entries / min(found.budget, found.num_seen) - 1) > BUDGET_TOLERANCE:
        marks.append(Mark.BUDGET_MISSED)
    # The other policies were not trained.
    if beyond and policy in DMS_POLICIES:
        marks.append(Mark.BEYOND_TRAINING)
    return marks


def _row(
    suite: str,
    length: int,
    point: OperatingPoint,
    name: tuple[str, str],
    by_point: Mapping[OperatingPoint, Collected],
    draws_RD: np.ndarray,
    marks: Sequence[Mark],
    context: RowContext,
    limit: int | None,
) -> ResultRow:
    (task, metric), (policy, bias), found = name, point, by_point[point]
    sample, is_share, chance = found.metrics[name], metric == "accuracy", CHANCE.get(task, 0.0)
    low, high = interval(sample, draws_RD, is_share)
    count, dense, dms = sample.count(is_share), by_point[OperatingPoint("dense", None)], by_point.get(OperatingPoint("dms", bias))
    own_marks = list(marks)
    if is_share and is_at_chance(dense.metrics[name], draws_RD, chance):
        own_marks.append(Mark.DENSE_AT_CHANCE)
    if count < MIN_SAMPLES or sample.num_documents < MIN_DOCUMENTS:
        own_marks.append(Mark.FEW_SAMPLES)

    def against(other: Collected | None) -> Comparison | None:
        if other is None or other is found or name not in other.metrics:
            return None
        return compare(sample, other.metrics[name], draws_RD, higher_is_better=HIGHER_IS_BETTER[metric])

    return ResultRow(
        **vars(context),
        suite=suite,
        policy=policy,
        evict_bias=bias,
        task=task,
        length=length,
        metric=metric,
        value=sample.value,
        ci_low=low,
        ci_high=high,
        num_samples=count,
        num_documents=sample.num_documents,
        cr_decided=found.cr_decided(policy),
        cr=found.cr,
        bytes=found.bytes,
        memory=memory_of(policy, found.memory),
        budget=found.budget,
        entries=found.entries,
        entries_mean=found.entries_mean,
        cr_mean=found.cr_mean,
        peak_entries=found.peak_entries,
        reads=found.reads,
        step_ms=found.step_ms,
        batch_size=found.batch_size,
        chance=chance if is_share else None,
        marks=tuple(own_marks),
        vs_dense=against(dense) if policy != "dense" else None,
        vs_dms=against(dms) if policy not in ("dense", "dms") else None,
        limit=limit,
        seconds=found.seconds,
    )


def memory_of(policy: str, measured: str | None) -> str | None:
    """How a policy's cache holds what is alive; None: dense. measured: None: by an earlier version, whose caches were compacted."""
    return None if policy == "dense" else measured or "compacted"


def is_at_chance(dense: Sample, draws_RD: np.ndarray, chance: float) -> bool:
    """Whether the dense model does no better than guessing: then nothing can be lost, and nothing is shown. Of few samples only
    where it is so by their own count: their interval says no more than that they are few."""
    floor = max(chance, _LEAST_ACCURACY)
    return dense.value <= floor or (dense.count(True) >= MIN_SAMPLES and interval(dense, draws_RD, True)[0] <= floor)


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One policy at a run's end, as `policies` of result.json has it and as the run's table shows it."""

    bits_per_byte: float
    recall: float | None
    recall_by_distance: list[float | None]
    """By distance quartile of what is asked for, nearest first; None: no such question."""
    recall_questions: int
    by_task: dict[str, float]
    cr_decided: float | None
    cr: float
    bytes: int | None
    memory: str | None
    seconds: float
    entries: float | None = None
    """A head's, at the document's end."""
    entries_mean: float | None = None
    """A head's, in the mean over positions."""
    cr_mean: float | None = None

    @classmethod
    def of(cls, policy: str, found: Collected) -> "RunFigures":
        accuracy = {task: sample.value for (task, metric), sample in found.metrics.items() if metric == "accuracy"}
        recall = found.metrics.get(("recall", "accuracy"))
        return cls(
            bits_per_byte=found.metrics["text", "bits_per_byte"].value,
            recall=accuracy.get("recall"),
            recall_by_distance=[accuracy.get(f"recall_q{number}") for number in range(1, NUM_QUARTILES + 1)],
            recall_questions=0 if recall is None else recall.count(True),
            by_task={task: accuracy[task] for task in sorted(accuracy) if not task.startswith("recall")},
            cr_decided=found.cr_decided(policy),
            cr=found.cr,
            bytes=found.bytes,
            memory=memory_of(policy, found.memory),
            seconds=found.seconds,
            entries=found.entries,
            entries_mean=found.entries_mean,
            cr_mean=found.cr_mean,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

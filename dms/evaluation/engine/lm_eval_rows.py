"""Results of lm-evaluation-harness as rows like all others, dms beside dense on the same documents."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dms.evaluation.engine.lm_eval_compat import read_results, read_samples
from dms.evaluation.stats.bootstrap import Sample, compare, interval, make_draws
from dms.evaluation.stats.collect import MIN_SAMPLES, is_at_chance
from dms.evaluation.stats.rows import Comparison, Mark, ResultRow, RowContext

# Standard errors to either side: 95 %.
_STDERRS = 1.96
# Metrics that are shares of right answers, without their filter: acc_norm, prompt_level_strict_acc, exact_match, pass@1.
_ACCURACY = re.compile(r"(.*_)?(acc|accuracy|exact_match|em)(_.*)?|pass@\d+")


@dataclass
class HarnessCounts:
    """KV entries over all sequences and `num_heads` heads of layers with gates, at the end of each forward pass or generation. A sequence
    that ends before its batch goes on being padded, and the padding counts."""

    num_heads: int
    num_rows: int = 0
    """Sequences."""
    alive: int = 0
    seen: int = 0
    evicted: int = 0
    decided: int = 0
    longest: int = 0
    """Tokens of a sequence."""
    memory: set[str] = field(default_factory=set)
    """`compacted` where a cache held what is alive, `masked` where a pass ran without one."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"memory": sorted(self.memory)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HarnessCounts":
        return cls(**{**values, "memory": set(values["memory"])})

    def add(self, counts_4B: torch.Tensor, length: int, memory: str) -> None:
        """counts_4B: as of `entries.count_entries`."""
        alive, seen, evicted, decided = counts_4B.sum(1).tolist()
        self.num_rows += counts_4B.shape[1]
        self.alive += alive
        self.seen += seen
        self.evicted += evicted
        self.decided += decided
        self.longest = max(self.longest, length)
        self.memory.add(memory)


@dataclass(frozen=True)
class HarnessRun:
    """One task under a policy at an operating point, as the harness returned it and as lm_eval.json has it."""

    task: str
    policy: str
    evict_bias: float | None
    results: Mapping[str, Mapping[str, Any]]
    """Task or group -> METRIC,FILTER -> figure."""
    group_subtasks: Mapping[str, Sequence[str]]
    num_fewshot: Mapping[str, int]
    """By task; a group whose parts differ in it has none."""
    num_documents: Mapping[str, int]
    """By task."""
    higher_is_better: Mapping[str, Mapping[str, bool]]
    values: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Task -> METRIC,FILTER -> number of a document -> its value."""
    chance: Mapping[str, float]
    """How often a guess is right, of tasks whose answers are chosen."""
    counted: HarnessCounts
    seconds: float
    stored: Mapping[str, Any]
    """All of it, as JSON."""

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "HarnessRun":
        same = ("task", "policy", "evict_bias", "results", "group_subtasks", "higher_is_better", "values", "chance", "seconds")
        return cls(
            **{name: stored[name] for name in same},
            num_fewshot=stored["n-shot"],
            num_documents={task: number["effective"] for task, number in stored["n-samples"].items()},
            counted=HarnessCounts.from_dict(stored["counted"]),
            stored=stored,
        )

    @property
    def evicts(self) -> bool:
        return self.policy != "dense"

    def parts(self, task: str) -> list[str]:
        """The tasks that a group comes down to; of a task, itself."""
        return [part for child in self.group_subtasks.get(task, []) for part in self.parts(child)] or [task]

    def values_N(self, task: str, name: str) -> np.ndarray | None:
        """Of each document, by its number; None where the harness's figure is not their mean (groups, perplexities)."""
        by_document = self.values.get(task, {}).get(name, {})
        value_N = np.array([by_document[number] for number in sorted(by_document, key=int)])
        return value_N if len(value_N) and np.isclose(value_N.mean(), self.results[task][name]) else None


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """All of the harness's results but the samples' texts, with values and chance as of `HarnessRun`."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    guesses: dict[str, list[float]] = {}
    for answered in read_samples(found):
        if answered.num_answers is not None:
            guesses.setdefault(answered.task, []).append(1.0 / answered.num_answers)
        for metric, value in answered.metrics.items():
            if isinstance(value, int | float):
                by_document = values.setdefault(answered.task, {}).setdefault(f"{metric},{answered.filter}", {})
                by_document[answered.document] = float(value)
    summary: dict[str, Any] = read_results(found)
    summary |= {"values": values, "chance": {task: float(np.mean(shares)) for task, shares in guesses.items()}}
    # Configurations may hold functions and paths.
    return json.loads(json.dumps(summary, default=str))


def make_rows(runs: Sequence[HarnessRun], context: RowContext, batch_size: int, trained_length: int | None) -> list[ResultRow]:
    """A row for each run's tasks (a group's parts and the group) and their metrics."""
    dense = {run.task: run for run in runs if not run.evicts}
    return [
        _row(run, dense.get(run.task), task, name, context, batch_size, trained_length)
        for run in runs
        for task, figures in run.results.items()
        for name, value in figures.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    ]


def _row(
    run: HarnessRun,
    dense: HarnessRun | None,
    task: str,
    name: str,
    context: RowContext,
    batch_size: int,
    trained_length: int | None,
) -> ResultRow:
    counted = run.counted
    low, high = _interval(run, task, name)
    # A group has it by metric.
    num_samples = run.num_documents.get(task) or run.results[task].get("sample_count", {}).get(name)
    kept = counted.decided - counted.evicted
    chance = _chance(run, task, name) if _is_accuracy(name) else 0.0
    return ResultRow(
        **vars(context),
        suite="lm_eval",
        policy=run.policy,
        evict_bias=run.evict_bias,
        task=f"lm_eval:{task}",
        length=None,
        metric=name,
        value=run.results[task][name],
        ci_low=low,
        ci_high=high,
        num_samples=num_samples,
        num_documents=num_samples,
        num_fewshot=run.num_fewshot.get(task),
        batch_size=batch_size,
        chance=chance,
        cr=counted.seen / counted.alive,
        cr_decided=counted.decided / kept if kept else None,
        entries=counted.alive / counted.num_rows / counted.num_heads,
        bytes=None,
        memory=None if not run.evicts else "masked" if "masked" in counted.memory else "compacted",
        seconds=run.seconds,
        marks=_marks(run, dense, task, name, num_samples, chance, trained_length),
        vs_dense=_versus(run, dense, task, name) if run.evicts and dense else None,
    )


def _interval(run: HarnessRun, task: str, name: str) -> tuple[float, float] | tuple[None, None]:
    """Bootstrapped like all others; where the figure is no mean over documents, from the harness's standard error, if it has one."""
    value_N = run.values_N(task, name)
    if value_N is not None:
        return interval(_sample(value_N), make_draws(len(value_N), task), set(value_N) <= {0.0, 1.0})
    metric, _, of_filter = name.partition(",")
    value, stderr = run.results[task][name], run.results[task].get(f"{metric}_stderr,{of_filter}")
    if not isinstance(stderr, int | float):
        return None, None
    return value - _STDERRS * stderr, value + _STDERRS * stderr


def _sample(value_N: np.ndarray) -> Sample:
    return Sample(value_N, np.ones_like(value_N))


def _is_accuracy(name: str) -> bool:
    return _ACCURACY.fullmatch(name.partition(",")[0]) is not None


def _chance(run: HarnessRun, task: str, name: str) -> float:
    """Of a group the mean over the documents of its parts."""
    parts = [part for part in run.parts(task) if name in run.results.get(part, {})]
    sizes = [run.num_documents[part] for part in parts]
    return float(np.average([run.chance.get(part, 0.0) for part in parts], weights=sizes)) if parts else 0.0


def _at_chance(dense: HarnessRun, task: str, name: str, chance: float) -> bool:
    """Of a group by the documents of its parts; without any, by the figure alone."""
    by_part = [found for part in dense.parts(task) if (found := dense.values.get(part, {}).get(name))]
    value_N = np.array([value for values in by_part for value in values.values()] or [dense.results[task][name]])
    return is_at_chance(_sample(value_N), make_draws(len(value_N), task), chance)


def _marks(
    run: HarnessRun,
    dense: HarnessRun | None,
    task: str,
    name: str,
    num_samples: int | None,
    chance: float,
    trained_length: int | None,
) -> tuple[Mark, ...]:
    holds = {
        Mark.EVICTED_NOTHING: run.evicts and run.counted.alive == run.counted.seen,
        Mark.DENSE_AT_CHANCE: dense is not None and _is_accuracy(name) and _at_chance(dense, task, name, chance),
        Mark.FEW_SAMPLES: num_samples is not None and num_samples < MIN_SAMPLES,
        Mark.BEYOND_TRAINING: run.evicts and trained_length is not None and run.counted.longest > trained_length,
    }
    return tuple(mark for mark, is_so in holds.items() if is_so)


def _versus(run: HarnessRun, dense: HarnessRun, task: str, name: str) -> Comparison | None:
    """The paired difference; None where the figure is no mean over documents, or has no direction."""
    ours_N, theirs_N = run.values_N(task, name), dense.values_N(task, name)
    better = run.higher_is_better.get(task, {}).get(name.partition(",")[0])
    if ours_N is None or theirs_N is None or better is None:
        return None
    return compare(_sample(ours_N), _sample(theirs_N), make_draws(len(ours_N), task), higher_is_better=better)

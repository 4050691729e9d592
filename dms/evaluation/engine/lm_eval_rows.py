"""Results of lm-evaluation-harness as rows like all others, dms beside dense on the same documents."""

import json
import re
from typing import Any

import numpy as np

from dms.evaluation.engine.lm_eval_compat import read_results, read_samples
from dms.evaluation.stats.bootstrap import Sample, compare, interval, make_draws
from dms.evaluation.stats.collect import BEYOND_TRAINING, DENSE_AT_CHANCE, EVICTED_NOTHING, FEW_SAMPLES, MIN_SAMPLES, is_at_chance

# Standard errors to either side: 95 %.
_STDERRS = 1.96
# Metrics that are shares of right answers, without their filter: acc_norm, prompt_level_strict_acc, exact_match, pass@1.
_ACCURACY = re.compile(r"(.*_)?(acc|accuracy|exact_match|em)(_.*)?|pass@\d+")


def summarize(found: dict) -> dict:
    """What of the harness's results is kept: all but the samples' texts. values: task -> metric -> document -> value; chance: of tasks
    whose answers are chosen, how often a guess is right."""
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


def make_rows(runs: list[dict], common: dict, trained_length: int | None) -> list[dict]:
    """A row for each run's tasks (a group's parts and the group) and their metrics. runs: `summarize`'s, with task, policy, evict_bias, counted and seconds."""
    dense = {run["task"]: run for run in runs if run["policy"] == "dense"}
    return [
        {**common, **_row(run, dense.get(run["task"]), task, name, trained_length)}
        for run in runs
        for task, figures in run["results"].items()
        for name, value in figures.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    ]


def _row(run: dict, dense: dict | None, task: str, name: str, trained_length: int | None) -> dict:
    counted, evicts = run["counted"], run["policy"] != "dense"
    low, high = _interval(run, task, name)
    # Of a group, by metric.
    num_samples = run["n-samples"].get(task, {}).get("effective") or run["results"][task].get("sample_count", {}).get(name)
    kept = counted["decided"] - counted["evicted"]
    chance = _chance(run, task, name) if _is_accuracy(name) else 0.0
    return {
        "suite": "lm_eval",
        "policy": run["policy"],
        "evict_bias": run["evict_bias"],
        "task": f"lm_eval:{task}",
        "length": None,
        "metric": name,
        "value": run["results"][task][name],
        "ci_low": low,
        "ci_high": high,
        "num_samples": num_samples,
        "num_documents": num_samples,
        # None: of a group whose parts differ in it.
        "num_fewshot": run["n-shot"].get(task),
        "chance": chance,
        "cr": counted["seen"] / counted["alive"],
        "cr_decided": counted["decided"] / kept if kept else None,
        "budget": None,
        "entries": counted["alive"] / counted["num_rows"] / counted["num_heads"],
        "peak_entries": None,
        "reads": None,
        "step_ms": None,
        "bytes": None,
        "memory": None if not evicts else "masked" if "masked" in counted["memory"] else "compacted",
        "seconds": run["seconds"],
        "marks": _marks(run, dense, task, name, num_samples, chance, trained_length),
        "vs_dense": _versus(run, dense, task, name) if evicts and dense else None,
        "vs_dms": None,
    }


def _interval(run: dict, task: str, name: str) -> tuple[float, float] | tuple[None, None]:
    """Bootstrapped like all others; where the figure is no mean over documents, from the harness's standard error, if it has one."""
    value_N = _values(run, task, name)
    if value_N is not None:
        return interval(Sample(value_N, np.ones_like(value_N)), make_draws(len(value_N), task), set(value_N) <= {0.0, 1.0})
    metric, _, of_filter = name.partition(",")
    value, stderr = run["results"][task][name], run["results"][task].get(f"{metric}_stderr,{of_filter}")
    if not isinstance(stderr, int | float):
        return None, None
    return value - _STDERRS * stderr, value + _STDERRS * stderr


def _values(run: dict, task: str, name: str) -> np.ndarray | None:
    """Of each document, by its number; None where the harness's figure is not their mean (groups, perplexities)."""
    by_document = run["values"].get(task, {}).get(name, {})
    value_N = np.array([by_document[number] for number in sorted(by_document, key=int)])
    return value_N if len(value_N) and np.isclose(value_N.mean(), run["results"][task][name]) else None


def _is_accuracy(name: str) -> bool:
    return _ACCURACY.fullmatch(name.partition(",")[0]) is not None


def _parts(run: dict, task: str) -> list[str]:
    """Of a group the tasks that it comes down to; else the task."""
    return [part for child in run["group_subtasks"].get(task, []) for part in _parts(run, child)] or [task]


def _chance(run: dict, task: str, name: str) -> float:
    """Of a group the mean over the documents of its parts."""
    parts = [part for part in _parts(run, task) if name in run["results"].get(part, {})]
    sizes = [run["n-samples"][part]["effective"] for part in parts]
    return float(np.average([run["chance"].get(part, 0.0) for part in parts], weights=sizes)) if parts else 0.0


def _at_chance(dense: dict, task: str, name: str, chance: float) -> bool:
    """Of a group by the documents of its parts; without any, by the figure alone."""
    by_part = [found for part in _parts(dense, task) if (found := dense["values"].get(part, {}).get(name))]
    value_N = np.array([value for values in by_part for value in values.values()] or [dense["results"][task][name]])
    return is_at_chance(Sample(value_N, np.ones_like(value_N)), make_draws(len(value_N), task), chance)


def _marks(
    run: dict, dense: dict | None, task: str, name: str, num_samples: int | None, chance: float, trained_length: int | None
) -> list[str]:
    counted, evicts = run["counted"], run["policy"] != "dense"
    holds = {
        EVICTED_NOTHING: evicts and counted["alive"] == counted["seen"],
        DENSE_AT_CHANCE: dense is not None and _is_accuracy(name) and _at_chance(dense, task, name, chance),
        FEW_SAMPLES: num_samples is not None and num_samples < MIN_SAMPLES,
        BEYOND_TRAINING: evicts and trained_length is not None and counted["longest"] > trained_length,
    }
    return [mark for mark, is_so in holds.items() if is_so]


def _versus(run: dict, dense: dict, task: str, name: str) -> dict | None:
    """The paired difference; None where the figure is no mean over documents, or has no direction."""
    ours_N, theirs_N = _values(run, task, name), _values(dense, task, name)
    better = run["higher_is_better"].get(task, {}).get(name.partition(",")[0])
    if ours_N is None or theirs_N is None or better is None:
        return None
    ours, theirs = (Sample(value_N, np.ones_like(value_N)) for value_N in (ours_N, theirs_N))
    return compare(ours, theirs, make_draws(len(ours_N), task), higher_is_better=better).to_dict()

"""lm-evaluation-harness on a retrofitted model, dense and at each operating point, merged into rows.

Eviction acts in likelihood tasks, too: their one forward pass drops what generation would have dropped by then, so that tokens of the
continuation do not see what was evicted of the prompt.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dms.config import nearest
from dms.evaluation.kept import Kept, describe_model
from dms.evaluation.paired import compare
from dms.retrofitting import set_mode
from dms.state import state_of

POLICIES = ("dense", "dms")
FEW_SAMPLES = 50
_STDERRS = 1.96
# Files of a task folder larger than this are known by size and time.
_HASHED_BYTES = 2**26


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    *,
    tasks: list[str],
    policies: tuple[str, ...] = POLICIES,
    points: list[float],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    include_path: str | None = None,
    common: dict,
    out: Path | None,
    trained_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Rows of the suite "lm_eval" for each task (groups and their parts included), metric and policy; dms at each of `points`.

    num_fewshot, limit (the first so many documents), apply_chat_template, include_path (a folder of own tasks): as the harness has them; None: as the
    task says, all documents, none. common: fields that all rows share. out: where finished runs are kept (`done/lm_eval-*.json`), from which a
    second call goes on, and `lm_eval.json` with what the harness returned; None: nowhere. progress: called with 1 for each task, policy and point.

    Raises:
        RuntimeError: the harness is not installed.
        ValueError: an unknown task, another policy, or a request longer than the model's context, before any task runs.
    """
    _check(policies, points, limit, num_fewshot, batch_size)
    simple_evaluate, manager = _load_harness(tasks, include_path)
    from dms.evaluation.harness import Counted, Harness

    if apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("apply_chat_template: the tokenizer has no chat template; leave it out")
    tasks, points = list(dict.fromkeys(tasks)), list(dict.fromkeys(map(float, points)))
    options = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template, "batch_size": batch_size}
    kept = Kept(None if out is None else out / "done", "lm_eval")
    operated = [
        pair
        for policy in POLICIES
        if policy in policies
        for pair in ([(policy, None)] if policy == "dense" else [(policy, p) for p in points])
    ]
    with _as_before(model):
        described = {"model": describe_model(model), "versions": {**common.get("versions", {}), "lm_eval": _version()}}
        described |= {"task_files": None if include_path is None else _hash_folder(Path(include_path)), **options}

        def settings(task: str, policy: str, point: float | None) -> dict:
            return {**described, "task": task, "policy": policy, "evict_bias": point}

        missing = [task for task in tasks if any(kept.read(settings(task, *pair)) is None for pair in operated)]
        harness = Harness(model, tokenizer, batch_size)

        def run(task: str, **more) -> dict:
            return simple_evaluate(harness, tasks=[task], task_manager=manager, **options, **more)

        harness.only_checks = True
        for task in missing:
            _build(run, task)
        harness.only_checks = False
        runs = []
        for task in tasks:
            for policy, point in operated:
                found = kept.read(settings(task, policy, point))
                if found is None:
                    set_mode(model, "dense" if policy == "dense" else "evict")
                    state_of(model).evict_bias = point or 0.0
                    harness.counted, start = Counted(), time.perf_counter()
                    found = _summarize(run(task, log_samples=True, bootstrap_iters=1000))
                    found |= {"counted": asdict(harness.counted) | {"memory": sorted(harness.counted.memory)}}
                    found |= {"seconds": time.perf_counter() - start}
                    kept.write(settings(task, policy, point), found)
                runs.append({"policy": policy, "evict_bias": point, "asked": task, **found})
                if progress:
                    progress(1)
    num_heads = sum(layer.num_heads for layer in state_of(model).layers)
    if out is not None:
        content = {"settings": {**options, "include_path": include_path, "tasks": tasks}, "runs": runs}
        (out / "lm_eval.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return _rows(runs, common, num_heads, batch_size, trained_length)


def _check(policies: tuple[str, ...], points: list[float], limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    others = [policy for policy in policies if policy not in POLICIES]
    if others or not policies:
        raise ValueError(
            f"lm-eval runs under the policies dense and dms, not {', '.join(others) or 'none'}: a likelihood task is one forward pass over prompt and "
            "continuation together, in which a policy that evicts between them has no place; leave them out"
        )
    if "dms" in policies and not (points and all(map(math.isfinite, points))):
        raise ValueError(f"lm-eval: evict_bias is {points}; give at least one number for dms")
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"lm-eval: {name} is {value!r}; it is a whole number from {least} on")


def _load_harness(tasks: list[str], include_path: str | None) -> tuple[Callable, Any]:
    """(simple_evaluate, the manager that knows the tasks); the harness's own thousands are read only where they are asked for."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(f"lm-eval tasks need lm-evaluation-harness ({error}): pip install 'dms-retrofit[lmeval]'") from error
    if not tasks:
        raise ValueError("lm-eval: no tasks were named; name some, such as gsm8k")
    manager = None
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"lm-eval: include_path {include_path} is no folder; name one with the YAML files of tasks")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ValueError(f"lm-eval knows no task {task!r}{nearest(task, manager.all_tasks)}; `lm-eval ls tasks` lists them")
    return simple_evaluate, manager


def _build(run: Callable, task: str) -> None:
    """Load a task's documents and measure its requests.

    Raises:
        ValueError: documents that are not there, or a request that is too long.
    """
    try:
        run(task, predict_only=True, bootstrap_iters=0)
    except ValueError:
        raise
    except Exception as error:
        # Hub, network, datasets and task code have no common base class.
        said = str(error).strip().splitlines() or ["no message"]
        raise ValueError(f"lm-eval task {task!r} cannot be built: {type(error).__name__}: {said[0]}") from error


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Also quietens the harness: what it would warn of is refused here, or said in rows."""
    state, logger = state_of(model), logging.getLogger("lm_eval")
    mode, bias, level = state.mode, state.evict_bias, logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        state.evict_bias = bias
        set_mode(model, mode)


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size}".encode())
        digest.update(path.read_bytes() if stat.st_size <= _HASHED_BYTES else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]


def _summarize(found: dict) -> dict:
    """What of the harness's results is kept: all but the samples' texts. values: task -> metric -> document -> value."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    num_choices: dict[str, list[int]] = {}
    for task, samples in found["samples"].items():
        is_choice = found["configs"][task].get("output_type") == "multiple_choice"
        for sample in samples:
            if is_choice:
                num_choices.setdefault(task, []).append(len(sample["filtered_resps"]))
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    by_document = values.setdefault(task, {}).setdefault(f"{metric},{sample['filter']}", {})
                    by_document[str(sample["doc_id"])] = float(sample[metric])
    names = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")
    summary = {name: found[name] for name in names if name in found}
    summary |= {"values": values, "chance": {task: float(np.mean(1.0 / np.array(counts))) for task, counts in num_choices.items()}}
    # Configurations may hold functions and paths.
    return json.loads(json.dumps(summary, default=str))


def _rows(runs: list[dict], common: dict, num_heads: int, batch_size: int, trained_length: int | None) -> list[dict]:
    dense = {run["asked"]: run for run in runs if run["policy"] == "dense"}
    rows = []
    for run in runs:
        for task, figures in run["results"].items():
            for name in (key for key, value in figures.items() if "," in key and "_stderr," not in key and isinstance(value, int | float)):
                rows.append(
                    {**common, **_row(run, dense.get(run["asked"]), task, name, num_heads, trained_length), "batch_size": batch_size}
                )
    return rows


def _row(run: dict, dense: dict | None, task: str, name: str, num_heads: int, trained_length: int | None) -> dict:
    metric, _, filter_name = name.partition(",")
    figures, counted = run["results"][task], run["counted"]
    value, stderr = figures[name], figures.get(f"{metric}_stderr,{filter_name}")
    low, high = (value - _STDERRS * stderr, value + _STDERRS * stderr) if isinstance(stderr, int | float) else (None, None)
    # Of a group, by metric.
    num_samples = run["n-samples"].get(task, {}).get("effective") or figures.get("sample_count", {}).get(name)
    chance = run["chance"].get(task, 0.0) if metric in ("acc", "acc_norm") else 0.0
    evicts = run["policy"] != "dense"
    kept = counted["decided"] - counted["evicted"]
    return {
        "suite": "lm_eval",
        "policy": run["policy"],
        "evict_bias": run["evict_bias"],
        "task": f"lm_eval:{task}",
        "length": None,
        "metric": name,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "num_samples": num_samples,
        "num_documents": num_samples,
        "chance": chance,
        "cr": counted["seen"] / max(1, counted["alive"]),
        "cr_decided": counted["decided"] / kept if kept else None,
        "budget": None,
        "entries": counted["alive"] / max(1, counted["num_rows"] * num_heads),
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


def _marks(
    run: dict, dense: dict | None, task: str, name: str, num_samples: int | None, chance: float, trained_length: int | None
) -> list[str]:
    counted, evicts = run["counted"], run["policy"] != "dense"
    metric, _, filter_name = name.partition(",")
    marks = []
    if evicts and counted["alive"] == counted["seen"]:
        marks.append("evicted_nothing")
    figures = (dense or run)["results"].get(task, {}) if dense or not evicts else {}
    stderr = figures.get(f"{metric}_stderr,{filter_name}")
    if chance > 0 and isinstance(stderr, int | float) and figures[name] - _STDERRS * stderr <= chance:
        marks.append("dense_at_chance")
    if num_samples is not None and num_samples < FEW_SAMPLES:
        marks.append("few_samples")
    if evicts and trained_length is not None and counted["longest"] > trained_length:
        marks.append("beyond_training")
    return marks


def _versus(run: dict, dense: dict, task: str, name: str) -> dict | None:
    """The paired difference; None where the harness's figure is no mean over documents (groups, perplexities), or has no direction."""
    ours, theirs = (found["values"].get(task, {}).get(name, {}) for found in (run, dense))
    better = run["higher_is_better"].get(task, {}).get(name.partition(",")[0])
    if not ours or ours.keys() != theirs.keys() or better is None:
        return None
    means = [np.mean(list(values.values())) for values in (ours, theirs)]
    if not np.allclose(means, [run["results"][task][name], dense["results"][task][name]], rtol=1e-6, atol=1e-9):
        return None
    return compare(np.array([ours[key] for key in ours]), np.array([theirs[key] for key in ours]), higher_is_better=better)

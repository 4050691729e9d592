"""lm-evaluation-harness on a retrofitted model, dense and at each operating point, merged into rows.

Eviction acts in likelihood tasks, too: their one forward pass drops what generation would have dropped by then, so that tokens of the
continuation do not see what was evicted of the prompt.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms.config import nearest
from dms.evaluation.engine.lm_eval_compat import num_fewshot as fewshot_of
from dms.evaluation.engine.lm_eval_compat import quiet
from dms.evaluation.engine.lm_eval_rows import HarnessRun, make_rows, summarize
from dms.evaluation.engine.resume import ResultStore, as_before, describe_model, hash_of, locked, operate, read_json, write_json
from dms.evaluation.engine.settings import LmEvalSettings
from dms.evaluation.stats.results import OperatingPoint
from dms.evaluation.stats.rows import ResultRow, RowContext
from dms.requirements import EXTRAS
from dms.upstream import UpstreamChanged

if TYPE_CHECKING:
    # It imports the harness.
    from dms.evaluation.engine.lm_eval_model import Harness

POLICIES = ("dense", "dms")
# For the standard errors of what is no mean.
_BOOTSTRAPS = 1000
# Files of a task folder larger than this are known by size and time.
_HASHED_BYTES = 2**26


@dataclass(frozen=True)
class PreparedLmEval:
    """Runs of the harness of which everything is checked and nothing is measured."""

    harness: "Harness"
    simple_evaluate: Callable[..., dict[str, Any]]
    units: list[dict[str, Any]]
    """What each run depends on, as its file has it: one for each task, policy and operating point."""
    store: ResultStore
    options: dict[str, Any]
    """As the harness takes them."""
    include_path: str | None
    settings_hash: str
    """A hash of all that decides what is measured, apart from task, policy and operating point."""

    @property
    def num_runs(self) -> int:
        """How often `run` calls its `progress`."""
        return len(self.units)

    def run(
        self, *, context: RowContext, out: Path | None, trained_length: int | None = None, progress: Callable[[int], None] | None = None
    ) -> list[ResultRow]:
        """Run what is not finished. Rows of the suite "lm_eval" for each task (groups and their parts included), metric and policy.

        out: gets `lm_eval.json` with what the harness returned, beside what it has of other tasks, and of the same ones at other operating points under
        the same settings; None: nothing is written. progress: called with 1 for each run.
        """
        runs = []
        with as_before(self.harness.model), quiet():
            for unit in self.units:
                found = self.store.read(unit)
                if found is None:
                    found = _measure(self.harness, self.simple_evaluate, unit)
                    self.store.write(unit, found)
                runs.append(HarnessRun.from_dict({name: unit[name] for name in ("task", "policy", "evict_bias")} | found))
                if progress:
                    progress(1)
        if out is not None:
            settings = {**self.options, "include_path": self.include_path, "lm_eval": version("lm_eval")}
            with locked(out):
                path = out / "lm_eval.json"
                stored = _with_earlier(
                    (read_json(path) or {}).get("runs", []), [{**run.stored, "settings_hash": self.settings_hash} for run in runs]
                )
                write_json(path, {"settings": settings, "runs": stored}, indent=1)
        return [
            replace(row, settings_hash=self.settings_hash) for row in make_rows(runs, context, self.options["batch_size"], trained_length)
        ]


def prepare_lm_eval(
    model: Any,
    tokenizer: Any,
    wanted: LmEvalSettings,
    *,
    policies: Sequence[str] = POLICIES,
    points: Sequence[float],
    batch_size: int = 8,
    chat: bool = False,
    versions: Mapping[str, str],
    out: Path | None,
) -> PreparedLmEval:
    """Load the harness, and build and measure the requests of all tasks that are not finished in `out`, without a forward pass.

    policies: dense, dms or both. points: evict_bias of dms. chat: through the tokenizer's chat template. versions: of the rows. out: where
    finished runs are stored (`done/lm_eval-*.json`), from which a second call goes on; None: nowhere.

    Raises:
        RuntimeError: the harness is not installed.
        ValueError: an unknown task, another policy, a task that sets another num_fewshot, or a request longer than the model's context.
    """
    _check(policies, points)
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat is true, and the tokenizer has no chat template; leave it out")
    simple_evaluate, manager = _load_harness(wanted.tasks, wanted.include_path)
    from dms.evaluation.engine.lm_eval_model import Harness

    # These, and the units below, are what finished runs are found by: other names or values, and earlier runs are not found again.
    options = {"num_fewshot": wanted.num_fewshot, "limit": wanted.limit, "apply_chat_template": chat, "batch_size": batch_size}
    settings = {
        "model": describe_model(model),
        "versions": {**versions, "lm_eval": version("lm_eval")},
        "task_files": None if wanted.include_path is None else _hash_folder(Path(wanted.include_path)),
        **options,
    }
    operated = [OperatingPoint("dense", None)] if "dense" in policies else []
    operated += [OperatingPoint("dms", float(bias)) for bias in dict.fromkeys(points)] if "dms" in policies else []
    units = [
        {**settings, "task": task, "policy": point.policy, "evict_bias": point.evict_bias}
        for task in dict.fromkeys(wanted.tasks)
        for point in operated
    ]
    store = ResultStore(None if out is None else out / "done", "lm_eval")
    with quiet():
        harness = Harness(model, tokenizer, batch_size)
        run = functools.partial(simple_evaluate, harness, task_manager=manager, **options)
        unfinished = [str(unit["task"]) for unit in units if store.read(unit) is None]
        _build(harness, run, dict.fromkeys(unfinished), wanted.num_fewshot)
    # How many requests are run at once decides nothing.
    settings_hash = hash_of({name: value for name, value in settings.items() if name != "batch_size"})
    return PreparedLmEval(harness, run, units, store, options, wanted.include_path, settings_hash)


def _with_earlier(earlier: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    hashes, known = ({run["task"]: run["settings_hash"] for run in new}, {(run["task"], run["policy"], run["evict_bias"]) for run in new})

    def stays(run: Mapping[str, Any]) -> bool:
        own = run.get("settings_hash")
        return hashes.get(run["task"], own) == own and (run["task"], run["policy"], run["evict_bias"]) not in known

    return [*filter(stays, earlier), *new]


def _check(policies: Sequence[str], points: Sequence[float]) -> None:
    others = [policy for policy in policies if policy not in POLICIES]
    if others or not policies:
        raise ValueError(
            f"lm-eval runs under the policies dense and dms, not {', '.join(others) or 'none'}: a likelihood task is one forward pass over prompt and "
            "continuation together, in which a policy that evicts between them has no place; leave them out"
        )
    if "dms" in policies and not (points and all(map(math.isfinite, points))):
        raise ValueError(f"lm-eval: evict_bias is {list(points)}; give at least one number for dms")


def _load_harness(tasks: Sequence[str], include_path: str | None) -> tuple[Callable[..., dict[str, Any]], Any]:
    """(simple_evaluate, the manager that knows the tasks); the harness's own thousands are read only where they are asked for."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(
            f"lm-eval tasks need lm-evaluation-harness ({error}): pip install 'dms-retrofit[{EXTRAS['lm_eval']}]'"
        ) from error
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


def _build(harness: "Harness", run: Callable[..., dict[str, Any]], tasks: Iterable[str], num_fewshot: int | None) -> None:
    """Load the documents of all tasks and measure their requests, before any runs.

    Raises:
        ValueError: documents that are not there, a request that is too long, or a task that is not given `num_fewshot` examples.
    """
    harness.only_checks = True
    for task in tasks:
        try:
            found = run(tasks=[task], predict_only=True, bootstrap_iters=0)
        except (ValueError, UpstreamChanged):
            raise
        except Exception as error:
            # Hub, network, datasets and task code have no common base class.
            said = str(error).strip().splitlines() or ["no message"]
            raise ValueError(f"lm-eval task {task!r} cannot be built: {type(error).__name__}: {said[0]}") from error
        for part, given in fewshot_of(found).items():
            if num_fewshot is not None and given != num_fewshot:
                raise ValueError(
                    f"lm-eval task {part!r} sets num_fewshot to {given} itself, and the harness would ignore the {num_fewshot} that were asked for; "
                    "leave num_fewshot out, or the task"
                )
    harness.only_checks = False


def _measure(harness: "Harness", run: Callable[..., dict[str, Any]], unit: Mapping[str, Any]) -> dict[str, Any]:
    """Run a task under a policy: what of the harness's results is kept, what it took, and what was evicted."""
    operate(harness.model, unit["policy"], unit["evict_bias"])
    harness.restart()
    start = time.perf_counter()
    found = summarize(run(tasks=[unit["task"]], log_samples=True, bootstrap_iters=_BOOTSTRAPS))
    return {**found, "counted": harness.counted.to_dict(), "seconds": time.perf_counter() - start}


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size}".encode())
        digest.update(path.read_bytes() if stat.st_size <= _HASHED_BYTES else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]

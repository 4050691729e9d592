"""What there is to report on: the files of an evaluation folder or of a run, read strictly, and what is missing, in words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dms.report import charts
from dms.report.curves import read_metrics
from dms.report.document_trace import FORMAT_VERSION, DocumentTrace

Row = dict[str, Any]
_NEEDED = ("policy", "task", "metric", "value")
_OWN_SUITE = "the run's own"


@dataclass(kw_only=True)
class Evidence:
    """All that a report is made of; what is not there is None or empty, and `missing` says how to get it.

    settings: settings.json, or what a run's result.json says of the same. words, scaling_words: sentences. traces: documents for the viewer,
    at `trace_bias`. metrics: rows of metrics.jsonl. run: result.json.
    """

    folder: Path
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    scaling: list[Row] = field(default_factory=list)
    scaling_words: list[str] = field(default_factory=list)
    lm_eval: dict[str, Any] | None = None
    profile: dict[str, Any] | None = None
    traces: list[DocumentTrace] = field(default_factory=list)
    trace_bias: float | None = None
    metrics: list[Row] = field(default_factory=list)
    run: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)


def read_evidence(folder: str | Path) -> Evidence:
    """Read an evaluation's folder (rows.json), or a run's folder with or without an evaluation in it.

    Raises:
        ValueError: a folder that is neither, an evaluation that has not ended, several to choose from, or a file that is damaged or
            of another format version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name what `dms evaluate --out` wrote, or a run's folder")
    evaluation, run_dir = _places(folder)
    run = _run_result(run_dir)
    if evaluation is None:
        evidence = Evidence(folder=folder, settings=_settings_of_run(run_dir, run), run=run)
        evidence.rows = _in_order([_own_row(row) for row in (run or {}).get("rows", [])])
    else:
        evidence = _evaluated(folder, evaluation)
        run_dir = run_dir or _named_run(evaluation, evidence.settings)
        evidence.run = run or _run_result(run_dir)
    if not evidence.traces and run_dir is not None:
        evidence.traces, evidence.trace_bias = _traces(run_dir / "report" / "traces.json")
    if run_dir is not None and (run_dir / "metrics.jsonl").is_file():
        evidence.metrics = read_metrics(run_dir / "metrics.jsonl")
    evidence.missing = _missing(evidence, evaluation)
    return evidence


def _places(folder: Path) -> tuple[Path | None, Path | None]:
    """The evaluation's folder and the run's, of which one is `folder`."""
    if (folder / "rows.json").is_file():
        return folder, None
    if (folder / "settings.json").is_file():
        raise ValueError(f"{folder} has settings.json and no rows.json: the evaluation has not ended; repeat its command, it goes on")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "result.json")):
        raise ValueError(f"{folder} has neither rows.json (an evaluation) nor metrics.jsonl (a run); nothing there can be reported")
    found = sorted(path.parent for path in folder.glob("*/rows.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} has several evaluations: {', '.join(path.name for path in found)}; name one of them")
    return (found[0] if found else None), folder


def _evaluated(folder: Path, evaluation: Path) -> Evidence:
    settings = _json(evaluation / "settings.json", versioned=True) or {}
    saved = _json(evaluation / "rows.json")
    evidence = Evidence(
        folder=folder,
        settings=settings,
        rows=_checked(saved.get("rows"), evaluation / "rows.json"),
        words=list(saved.get("words") or []),
        lm_eval=_json(evaluation / "lm_eval.json"),
        profile=_json(evaluation / "profile.json", versioned=True),
    )
    evidence.traces, evidence.trace_bias = _traces(evaluation / "traces.json")
    scaling = _json(evaluation / "scaling.json")
    if scaling is not None:
        evidence.scaling = _checked(scaling.get("rows"), evaluation / "scaling.json")
        evidence.scaling_words = list(scaling.get("words") or [])
    return evidence


def _named_run(evaluation: Path, settings: Mapping[str, Any]) -> Path | None:
    """The run that the evaluation names, or the folder around it: a run may have moved with what lies in it."""
    named = settings.get("run_dir")
    places = ([Path(named)] if named else []) + [evaluation.resolve().parent]
    return next((place for place in places if (place / "metrics.jsonl").is_file()), None)


def _json(path: Path, *, versioned: bool = False) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); evaluate again to write it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; evaluate again to write it anew")
    version = content.get("format_version", None if versioned else FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, this version of dms reads {FORMAT_VERSION}; evaluate again")
    return content


def _checked(rows: Any, path: Path) -> list[Row]:
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no list of rows; evaluate again to write it anew")
    for number, row in enumerate(rows):
        lacks = [key for key in _NEEDED if not isinstance(row, dict) or key not in row]
        if lacks:
            raise ValueError(f"{path}, row {number}: no {', '.join(lacks)}; evaluate again to write it anew")
    return _in_order([{**row, "suite": row.get("suite") or row["task"]} for row in rows])


def _in_order(rows: list[Row]) -> list[Row]:
    """Suites as they come, in each its headline first, then tasks by name; what a task's rows are among themselves stays."""
    chosen = charts.headlines(rows)
    suites = list(chosen)
    return sorted(rows, key=lambda row: (suites.index(row["suite"]), (row["task"], row["metric"]) != chosen[row["suite"]], row["task"]))


def _traces(path: Path) -> tuple[list[DocumentTrace], float | None]:
    saved = _json(path, versioned=True)
    if saved is None:
        return [], None
    try:
        return [DocumentTrace.from_dict(document) for document in saved["documents"]], saved.get("evict_bias")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _run_result(run_dir: Path | None) -> dict[str, Any] | None:
    return None if run_dir is None else _json(run_dir / "result.json")


def _own_row(row: Row) -> Row:
    """A row of result.json in the form of an evaluation's: the run measures one point, as trained."""
    bias = None if row["policy"] == "dense" else 0.0
    return {**row, "suite": row.get("suite") or _OWN_SUITE, "evict_bias": row.get("evict_bias", bias)}


def _settings_of_run(run_dir: Path, run: Mapping[str, Any] | None) -> dict[str, Any]:
    if run is None:
        return {"run_dir": str(run_dir)}
    known = {key: run.get(key) for key in ("target_cr", "window", "granularity", "alignment", "device", "versions")}
    row = next(iter(run.get("rows") or []), {})
    return {**known, "model": run.get("model"), "run_dir": str(run_dir), "model_hash": row.get("model_hash"), "seed": row.get("seed")}


def _missing(evidence: Evidence, evaluation: Path | None) -> list[str]:
    """What this report could show and cannot, with the command that measures it."""
    model = evidence.settings.get("model") or "MODEL"
    if evaluation is None:
        folder = evidence.folder
        model, again = f"{folder}/model", f"dms evaluate {folder}/model --out {folder}/evaluation"
    else:
        again = f"dms evaluate {model} --out {evaluation}"
    found = []
    if not evidence.rows:
        found.append(f"No rows: nothing was measured yet. {again}")
    elif evaluation is None:
        found.append(f"Only the run's own figures: no other policies, lengths or operating points. {again}")
    if evidence.profile is None:
        found.append(f"No profile: eviction by layer, head and position is not shown. {again}")
    if not evidence.traces:
        found.append(f"No traces: there is no document to look into. {again}")
    if not evidence.scaling:
        found.append(f"No hyper-scaling was run. {again} --scaling")
    if evidence.lm_eval is None:
        found.append(f"No task of lm-evaluation-harness was run. {again} --lm-eval TASK")
    if not evidence.metrics:
        found.append("No training curves: the run's folder with metrics.jsonl was not at hand.")
    return found

"""What a report is made of: the files of an evaluation folder and of a run folder, read strictly into types, and a list of what is missing."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dms.evaluation.present.findings import Finding
from dms.evaluation.stats.rows import Mark, ResultRow
from dms.report import charts
from dms.report.decisions import FORMAT_VERSION, DocumentTrace, GateProfile
from dms.report.run_metrics import LoggedStep, read_metrics

# Rows of result.json name no suite.
_RUN_SUITE = "the run's own"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What was evaluated and how: settings.json of an evaluation, or what a run's result.json says of the same. None: not known."""

    model: str | None = None
    model_hash: str | None = None
    """Of the base's weights."""
    gates_hash: str | None = None
    other_base: str | None = None
    """As in ResultRow."""
    base_name: str | None = None
    run_dir: str | None = None
    """The run that trained the gates."""
    target_cr: float | None = None
    window: int | list[int] | None = None
    sinks: int | None = None
    granularity: str | None = None
    alignment: str | None = None
    trained_length: int | None = None
    """Tokens of a document that the gates were trained on."""
    context: int | None = None
    """The base's `max_position_embeddings`."""
    lengths: Sequence[int] = ()
    evict_bias: Sequence[float] = ()
    """Operating points."""
    num_samples: int | None = None
    """Documents of each suite and length."""
    seed: int | None = None
    chat_template: bool | None = None
    dtype: str | None = None
    device: str | None = None
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """How a retrofit was trained, as its result.json says. None: not known."""

    target_cr: float | None = None
    steps: int | None = None
    tokens: int | None = None
    training_seconds: float | None = None
    device: str | None = None
    versions: Mapping[str, str] | None = None
    trainable: str | None = None
    quantize: str | None = None
    """What the base was packed into for the training."""
    beta: float | None = None
    alignment: str | None = None
    window: int | list[int] | None = None
    granularity: str | None = None

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> "TrainingFacts":
        """result: what result.json holds; its other fields are left."""
        return cls(**_known(cls, result))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a report is made of. What was not measured is empty or None."""

    folder: Path
    """The folder that was named: of an evaluation or of a run."""
    conditions: Conditions
    rows: Sequence[ResultRow] = ()
    """By suite, in each the headline first."""
    findings: Sequence[Finding] = ()
    """Those of hyper-scaling are in `scaling_sentences`."""
    scaling: Sequence[ResultRow] = ()
    """Hyper-scaling; `rows` has these too."""
    scaling_sentences: Sequence[str] = ()
    has_lm_eval: bool = False
    profile: GateProfile | None = None
    traces: Sequence[DocumentTrace] = ()
    trace_bias: float | None = None
    """The operating point of `traces`."""
    metrics: Sequence[LoggedStep] = ()
    training: TrainingFacts | None = None
    missing: Sequence[str] = ()
    """What the report could show and cannot, a sentence each, with the command that measures it."""

    def usual_findings(self) -> list[Finding]:
        """Those of what was trained: `evict_bias` 0, or the operating point nearest to it; and those that have no operating point."""
        usual = min((finding.evict_bias for finding in self.findings if finding.evict_bias is not None), key=abs, default=None)
        return [finding for finding in self.findings if finding.evict_bias in (None, usual)]


def read_evidence(folder: str | Path) -> Evidence:
    """Read an evaluation folder (which has rows.json), or a run folder with or without an evaluation in it.

    Raises:
        ValueError: a folder that is neither, an evaluation that has not ended, several to choose from, or a file that is damaged or
            of another format version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name what `dms evaluate --out` wrote, or a run's folder")
    evaluation, run_dir = _locate(folder)
    if evaluation is None:
        assert run_dir is not None  # `_locate` finds one of the two.
        result = _read_json(run_dir / "result.json")
        evidence = Evidence(folder=folder, conditions=_run_conditions(run_dir, result), rows=_run_rows(run_dir, result))
    else:
        evidence = _read_evaluation(folder, evaluation)
        run_dir = run_dir or _run_of(evaluation, evidence.conditions)
        result = None if run_dir is None else _read_json(run_dir / "result.json")
    if run_dir is not None:
        if not evidence.traces:
            traces, bias = _read_traces(run_dir / "report" / "traces.json")
            evidence = replace(evidence, traces=traces, trace_bias=bias)
        if (run_dir / "metrics.jsonl").is_file():
            evidence = replace(evidence, metrics=read_metrics(run_dir / "metrics.jsonl"))
    evidence = replace(evidence, training=None if result is None else TrainingFacts.from_result(result))
    return replace(evidence, missing=_missing(evidence, evaluation))


def describe_marks(rows: Sequence[ResultRow]) -> list[str]:
    """A sentence for each mark that rows bear, the severe ones first: how many rows, of which policies, tasks and lengths."""
    counts = Counter(mark for row in rows for mark in row.marks)
    order = sorted(counts, key=lambda mark: not mark.is_severe)
    return [f"{_marked_places(rows, mark)} ({counts[mark]} of {len(rows)} figures): {mark.meaning}." for mark in order]


def _marked_places(rows: Sequence[ResultRow], mark: Mark) -> str:
    """The lengths where a mark belongs to whole lengths, else tasks and policies."""
    bearing = [row for row in rows if mark in row.marks]
    lengths = sorted({row.length for row in bearing if row.length is not None})
    if mark is Mark.BEYOND_TRAINING and lengths:
        return " and ".join(f"{length:,} tokens" for length in lengths)
    policies = list(dict.fromkeys(row.policy for row in bearing))
    tasks = list(dict.fromkeys(row.task for row in bearing))
    who = "all policies" if len(policies) > 3 else ", ".join(policies)
    what = f"{len(tasks)} tasks" if len(tasks) > 4 else ", ".join(tasks)
    return f"{what}, {who}"


def _locate(folder: Path) -> tuple[Path | None, Path | None]:
    """The evaluation folder and the run folder, one of which is `folder`."""
    if (folder / "rows.json").is_file():
        return folder, None
    if (folder / "settings.json").is_file():
        raise ValueError(f"{folder} has settings.json and no rows.json: the evaluation has not ended; repeat its command to go on")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "result.json")):
        raise ValueError(f"{folder} has neither rows.json (an evaluation) nor metrics.jsonl (a run); there is nothing to report")
    found = sorted(path.parent for path in folder.glob("*/rows.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} has several evaluations: {', '.join(path.name for path in found)}; name one of them")
    return (found[0] if found else None), folder


def _read_evaluation(folder: Path, evaluation: Path) -> Evidence:
    saved = _read_json(evaluation / "rows.json") or {}
    scaling = _read_json(evaluation / "scaling.json") or {"rows": []}
    scaling_sentences = list(scaling.get("words") or [])
    profile = _read_json(evaluation / "profile.json", versioned=True)
    traces, bias = _read_traces(evaluation / "traces.json")
    return Evidence(
        folder=folder,
        conditions=Conditions(**_known(Conditions, _read_json(evaluation / "settings.json", versioned=True) or {})),
        rows=_read_rows(saved.get("rows"), evaluation / "rows.json"),
        findings=_read_findings(saved, scaling_sentences),
        scaling=_read_rows(scaling.get("rows"), evaluation / "scaling.json"),
        scaling_sentences=scaling_sentences,
        has_lm_eval=_read_json(evaluation / "lm_eval.json") is not None,
        profile=None if profile is None else _parse(GateProfile.from_dict, profile, evaluation / "profile.json"),
        traces=traces,
        trace_bias=bias,
    )


def _run_of(evaluation: Path, conditions: Conditions) -> Path | None:
    """The run that the evaluation names, or the folder around it: a run may have been moved with the evaluation in it."""
    places = ([Path(conditions.run_dir)] if conditions.run_dir else []) + [evaluation.resolve().parent]
    return next((place for place in places if (place / "metrics.jsonl").is_file()), None)


def _read_json(path: Path, *, versioned: bool = False) -> dict[str, Any] | None:
    """None where there is no such file. versioned: `format_version` may not be absent."""
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


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that a dataclass has fields for."""
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _parse(parse: Callable[[Mapping[str, Any]], _T], values: Mapping[str, Any], place: object) -> _T:
    try:
        return parse(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{place}: {what}; evaluate again to write it anew") from None


def _read_rows(rows: Any, path: Path) -> list[ResultRow]:
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no list of rows; evaluate again to write it anew")
    return _in_order([_parse(ResultRow.from_dict, row, f"{path}, row {number}") for number, row in enumerate(rows)])


def _read_findings(saved: Mapping[str, Any], scaling_sentences: Sequence[str]) -> list[Finding]:
    """Without those of hyper-scaling, which belong to its figures. Folders of earlier versions have sentences alone: one finding."""
    if "findings" in saved:
        found = [Finding.from_dict(finding) for finding in saved["findings"]]
        return [finding for finding in found if not finding.sentences or not set(finding.sentences) <= set(scaling_sentences)]
    sentences = [sentence for sentence in saved.get("words") or [] if sentence not in scaling_sentences]
    return [Finding(None, None, "", tuple(sentences))] if sentences else []


def _in_order(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Suites as they come, in each its headline first, then tasks by name; what a task's rows are among themselves stays."""
    chosen = charts.headlines(rows)
    suites = list(chosen)
    return sorted(rows, key=lambda row: (suites.index(row.suite), (row.task, row.metric) != chosen[row.suite], row.task))


def _read_traces(path: Path) -> tuple[list[DocumentTrace], float | None]:
    saved = _read_json(path, versioned=True)
    if saved is None:
        return [], None
    return [_parse(DocumentTrace.from_dict, document, path) for document in saved.get("documents", [])], saved.get("evict_bias")


def _run_rows(run_dir: Path, result: Mapping[str, Any] | None) -> list[ResultRow]:
    """Rows of result.json as an evaluation has them: a run measures one operating point, as trained."""
    rows = [] if result is None else _read_rows(result.get("rows", []), run_dir / "result.json")
    return [
        replace(row, suite=row.suite or _RUN_SUITE, evict_bias=None if row.policy == "dense" else row.evict_bias or 0.0) for row in rows
    ]


def _run_conditions(run_dir: Path, result: Mapping[str, Any] | None) -> Conditions:
    result = result or {}
    row: Mapping[str, Any] = next(iter(result.get("rows") or []), {})
    known = {name: row.get(name) for name in ("model_hash", "seed")}
    known |= {name: result.get(name) for name in ("model", "target_cr", "window", "granularity", "alignment", "device", "versions")}
    return Conditions(**_known(Conditions, {**known, "run_dir": str(run_dir)}))


def _missing(evidence: Evidence, evaluation: Path | None) -> list[str]:
    if evaluation is None:
        again = f"dms evaluate {evidence.folder}/model --out {evidence.folder}/evaluation"
    else:
        again = f"dms evaluate {evidence.conditions.model or 'MODEL'} --out {evaluation}"
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
    if not evidence.has_lm_eval:
        found.append(f"No task of lm-evaluation-harness was run. {again} --lm-eval TASK")
    if not evidence.metrics:
        found.append("No training curves: the run folder with metrics.jsonl was not found.")
    return found

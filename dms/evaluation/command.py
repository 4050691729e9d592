"""`dms evaluate`: a retrofit beside dense, and beside training-free policies at the same measured budget.

settings (engine/settings.py) -> documents (suites/) -> units, read under every policy (engine/units.py) -> result rows
(stats/collect.py) -> findings and tables (present/) -> OUT/rows.json
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dms.console import make_console, make_progress
from dms.evaluation.engine.gate_profile import num_passes, write_profile
from dms.evaluation.engine.lm_eval import PreparedLmEval, prepare_lm_eval
from dms.evaluation.engine.resume import locked, read_json, write_json
from dms.evaluation.engine.scaling import PreparedScaling, prepare_scaling
from dms.evaluation.engine.settings import EvaluatedModel, EvaluationSettings, open_folder
from dms.evaluation.engine.units import Progress, Unit, UnitFile, make_units, run_unit
from dms.evaluation.policies import TRAINING_FREE, check_second_reading
from dms.evaluation.present.findings import Finding, make_findings
from dms.evaluation.present.tables import comparison_table, scaling_table
from dms.evaluation.stats.collect import make_rows
from dms.evaluation.stats.results import UnitResults
from dms.evaluation.stats.rows import Mark, ResultRow, describe_device, versions
from dms.io import base_models, checkpoint
from dms.io.device_map import DeviceMap
from dms.io.quantization import quant_method
from dms.io.vocabulary import check_documents, check_tokenizer, num_embeddings
from dms.io.weights import GATES_FILE
from dms.modes import state_of
from dms.placement import compute_device
from dms.report.evaluation_card import write_evaluation_card
from dms.report.evidence import read_evidence

# Documents of each suite that the report's profile is made of.
_PROFILED = 4


@dataclass(frozen=True)
class EvaluationResult:
    """What rows.json holds: rows of this call and of earlier calls on the same folder, and what they say."""

    rows: list[ResultRow]
    findings: list[Finding]

    @property
    def marks(self) -> list[Mark]:
        return sorted({mark for row in self.rows for mark in row.marks})

    def to_dict(self) -> dict[str, Any]:
        """words: the findings' lines, for plain text."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "findings": [finding.to_dict() for finding in self.findings],
            "words": [line for finding in self.findings for line in finding.lines],
            "marks": [mark.value for mark in self.marks],
        }


def default_out(folder: str | Path) -> Path:
    """RUN/evaluation for RUN/model, else a folder beside the model's."""
    folder = Path(folder).resolve()
    is_run = folder.name == "model" and (folder.parent / "result.json").is_file()
    return folder.parent / "evaluation" if is_run else folder.with_name(f"{folder.name}-evaluation")


def evaluate_folder(
    folder: str,
    settings: EvaluationSettings,
    *,
    base: str | None = None,
    other_base: bool = False,
    window: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    card: bool = False,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Evaluate a retrofitted folder, or go on where an earlier call stopped; print the tables; write OUT/rows.json and return it.

    base, other_base, window, device_map, offload_folder: as of `dms.load`. out: None: `default_out`. card: also fill the folder's README.md from the rows.

    Raises:
        ValueError: a folder without gates, documents longer than the model's context, or an `out` that holds another evaluation.
    """
    console = console or make_console()
    if not settings.suites and settings.scaling is None and settings.lm_eval is None:
        raise ValueError("there is nothing to measure: name --tasks, --scaling or --lm-eval")
    # Many CPUs emulate half precision, and are slower with it.
    dtype = settings.dtype or ("auto" if torch.cuda.is_available() else "float32")
    placing: Any = {"device_map": device_map, "offload_folder": offload_folder}
    model = checkpoint.load(folder, base=base, other_base=other_base, window=window, dtype=dtype, **placing)
    about = describe(folder, model)
    settings = settings.completed(about.context)
    out = Path(out) if out is not None else default_out(folder)

    # All that cannot be measured is refused here, before the folder is touched.
    _check_model(model, about, settings)
    tokenizer, num_rows = base_models.load_tokenizer(base or folder), num_embeddings(model.config)
    check_tokenizer(tokenizer, num_rows)
    units = list(make_units(tokenizer, settings))
    scaling = None if settings.scaling is None else prepare_scaling(model, tokenizer, settings, settings.scaling)
    problems = [] if scaling is None else scaling.problems.problems
    check_documents(itertools.chain(*(unit.documents for unit in units), problems), tokenizer, num_rows)
    digest = open_folder(out, settings, about)
    lm_eval = _prepare_lm_eval(model, tokenizer, settings, about, out)

    _announce(folder, out, settings, about, console, window is not None)
    results = _run_units(model, units, settings, out, digest, console)
    context = about.row_context(settings.seed)
    rows = make_rows(results, settings.points(), context=context, trained_length=about.trained_length, num_greedy=settings.greedy_tokens)
    if lm_eval is not None:
        rows += _run_extra(lm_eval, "lm-evaluation-harness", about, settings, out, console)
    if scaling is not None:
        chains = _run_extra(scaling, scaling.title, about, settings, out, console)
        console.print(scaling_table(chains, scaling.title))
        rows += chains
    _write_profile(model, tokenizer, units, settings, out, console)
    with locked(out):
        rows = _with_earlier(rows, out, console)
        result = EvaluationResult(rows, make_findings(rows) + _findings_of_scaling(out))
        write_json(out / "rows.json", result.to_dict(), indent=1)
    print_result(result, settings, console)
    if card:
        console.print(f"wrote the figures into {write_evaluation_card(read_evidence(out), folder)}", highlight=False)
    console.print(f"wrote {out}/; `dms report {out}` makes a page of it", highlight=False)
    return result


def _check_model(model: Any, about: EvaluatedModel, settings: EvaluationSettings) -> None:
    if too_long := [length for length in settings.lengths if length > about.context]:
        raise ValueError(f"--lengths has {too_long} and the model's context is {about.context} tokens; shorten them")
    if settings.suites:
        # A prompt is nearly as long as its document.
        check_second_reading(
            [TRAINING_FREE[policy] for policy in settings.policies if policy in TRAINING_FREE], max(settings.lengths), model
        )
    if not state_of(model).takes_cache:
        raise ValueError(f"{type(model).__name__} works with a cache of its own kind alone, which cannot be evaluated policy by policy")


def _prepare_lm_eval(model: Any, tokenizer: Any, settings: EvaluationSettings, about: EvaluatedModel, out: Path) -> PreparedLmEval | None:
    if settings.lm_eval is None:
        return None
    return prepare_lm_eval(
        model,
        tokenizer,
        settings.lm_eval,
        # The others have no place in a likelihood's single forward pass.
        policies=[policy for policy in settings.policies if policy in ("dense", "dms")],
        points=settings.evict_bias,
        batch_size=settings.batch_size,
        chat=settings.chat,
        versions=about.versions,
        out=out,
    )


def _run_units(
    model: Any, units: Sequence[Unit], settings: EvaluationSettings, out: Path, digest: str, console: Console
) -> dict[tuple[str, int], list[UnitResults]]:
    """Results of each suite and length, unit by unit; what earlier calls have finished is read."""
    found: dict[tuple[str, int], list[UnitResults]] = {}
    with make_progress(console) as shown:
        task = shown.add_task("", total=len(units) * len(settings.points()))
        for unit in units:
            file = UnitFile(unit, out / "done", digest)

            def step(running: str, unit: Unit = unit) -> None:
                shown.update(task, description=f"{running}: {unit.suite}, {unit.length} tokens, batch {unit.number + 1}")

            progress = Progress(step=step, done=lambda: shown.advance(task))
            results = run_unit(model, unit, settings, finished=file.read(), save=file.write, progress=progress)
            found.setdefault((unit.suite, unit.length), []).append(results)
    return found


def _run_extra(
    prepared: PreparedLmEval | PreparedScaling,
    title: str,
    about: EvaluatedModel,
    settings: EvaluationSettings,
    out: Path,
    console: Console,
) -> list[ResultRow]:
    with make_progress(console) as shown:
        task = shown.add_task(title, total=prepared.num_runs)
        return prepared.run(
            context=about.row_context(settings.seed),
            out=out,
            trained_length=about.trained_length,
            progress=lambda n: shown.advance(task, n),
        )


def _with_earlier(rows: list[ResultRow], out: Path, console: Console) -> list[ResultRow]:
    """Beside what was asked for now, what earlier calls on the folder have measured. Of a task that was measured in another way then, it goes."""
    earlier = [ResultRow.from_dict(row) for row in (read_json(out / "rows.json") or {"rows": []})["rows"]]

    def figure(row: ResultRow) -> tuple:
        return row.suite, row.length, row.task, row.metric, row.policy, row.evict_bias

    def task(row: ResultRow) -> tuple:
        return row.suite, row.task

    known, hashes = set(map(figure, rows)), {task(row): row.settings_hash for row in rows}
    others = dict.fromkeys(task(row) for row in earlier if hashes.get(task(row), row.settings_hash) != row.settings_hash)
    if others:
        names = ", ".join(f"{name} ({suite})" for suite, name in others)
        console.print(f"earlier figures of {names} in {out}/ were measured with other settings, and are dropped", highlight=False)
    return [row for row in earlier if figure(row) not in known and task(row) not in others] + rows


def _findings_of_scaling(out: Path) -> list[Finding]:
    """Of this call, or of an earlier one. Versions before wrote sentences alone."""
    content = read_json(out / "scaling.json") or {"words": []}
    if "findings" in content:
        return [Finding.from_dict(finding) for finding in content["findings"]]
    return [Finding(None, None, "Hyper-scaling.", tuple(content["words"]))] if content["words"] else []


def _write_profile(model: Any, tokenizer: Any, units: Sequence[Unit], settings: EvaluationSettings, out: Path, console: Console) -> None:
    """For the report: what the gates do where, on documents of the longest length."""
    longest = max(settings.lengths)
    first = [unit for unit in units if unit.length == longest and unit.number == 0]
    chosen = [(unit, document) for unit in first for document in unit.documents[:_PROFILED]]
    if not chosen or "dms" not in settings.policies:
        return
    with make_progress(console) as progress:
        task = progress.add_task("what is kept, token by token", total=num_passes(len(chosen), len(settings.evict_bias)))
        write_profile(
            model,
            tokenizer,
            [document for _, document in chosen],
            out,
            points=settings.evict_bias,
            titles=[f"{unit.suite}, {unit.length} tokens" for unit, _ in chosen],
            progress=lambda n: progress.advance(task, n),
        )


def _announce(folder: str, out: Path, settings: EvaluationSettings, about: EvaluatedModel, console: Console, other_windows: bool) -> None:
    """What a reader of the figures must know beforehand."""
    said = [f"evaluating {folder} into {out}/; chat template: {'on' if settings.chat else 'off'}"]
    if settings.suites and settings.text is None and not str(about.base_name).startswith(base_models.BUILTIN):
        said.append(
            "text: Python's standard library, which the base has surely been trained on: what is evicted may be known by heart. "
            "--text names text of your own"
        )
    if about.other_base is not None:
        said.append(about.other_base)
    if other_windows:
        said.append(f"window {about.window}, in place of what the gates were trained with")
    if about.trained_length is None:
        said.append("at which length the gates were trained is not recorded: lengths beyond it cannot be marked")
    for line in said:
        console.print(line, highlight=False)


def describe(folder: str, model: Any) -> EvaluatedModel:
    _, metadata = checkpoint.read_gates(folder)
    origin = model.dms_origin
    state, run_dir = state_of(model), Path(folder).resolve().parent
    is_run = (run_dir / "result.json").is_file() and Path(folder).name == "model"
    recipe = run_dir / "recipe.yaml"
    parameter = next(model.parameters())
    return EvaluatedModel(
        model=str(folder),
        model_hash=origin["base_hash"],
        other_base=origin["other_base"],
        quant_method=quant_method(model.config),
        gates_hash=hashlib.sha256((Path(folder) / GATES_FILE).read_bytes()).hexdigest()[:16],
        recipe_hash=hashlib.sha256(recipe.read_bytes()).hexdigest()[:16] if is_run and recipe.is_file() else None,
        base_name=origin["base_name"],
        run_dir=str(run_dir) if is_run else None,
        target_cr=float(metadata["target_cr"]) if metadata.get("target_cr") else None,
        trained_length=int(metadata["trained_length"]) if metadata.get("trained_length") else None,
        window=state.config.window,
        sinks=state.config.sinks,
        granularity=state.config.granularity,
        alignment=state.config.alignment,
        context=model.config.get_text_config().max_position_embeddings,
        device_type=compute_device(model).type,
        dtype=str(parameter.dtype).removeprefix("torch."),
        versions=versions(),
        device=describe_device(),
    )


def print_result(result: EvaluationResult, settings: EvaluationSettings, console: Console) -> None:
    """Tables of what this call measured, and the findings of all rows."""
    for length in settings.lengths if settings.suites else ():
        for bias in settings.evict_bias:
            here = [row for row in _rows_at(result, bias) if row.length == length and row.suite in settings.suites]
            console.print(comparison_table(here, f"{length} tokens{_point(bias, settings)}"))
    for bias in settings.evict_bias:
        here = [row for row in _rows_at(result, bias) if row.suite == "lm_eval"]
        if here:
            console.print(comparison_table(here, f"lm-evaluation-harness{_point(bias, settings)}"))
    for finding in result.findings:
        for line in finding.lines:
            console.print(line, highlight=False)
    if result.marks:
        console.print(f"marks: {', '.join(mark.value for mark in result.marks)}", style="bold", highlight=False)


def _rows_at(result: EvaluationResult, bias: float) -> list[ResultRow]:
    """Those of an operating point, and dense's."""
    return [row for row in result.rows if row.evict_bias in (None, bias)]


def _point(bias: float, settings: EvaluationSettings) -> str:
    return f", evict_bias {bias:+g}" if len(settings.evict_bias) > 1 else ""


def failures(result: EvaluationResult) -> list[str]:
    """What `--strict` does not let pass, a line for each mark and policy."""
    found: dict[tuple[Mark, str], list[str]] = {}
    for row in result.rows:
        for mark in row.marks:
            if mark.is_fatal:
                found.setdefault((mark, row.policy), []).append(f"{row.task} at {row.length}")
    return [f"{mark.value}: {policy}: {', '.join(dict.fromkeys(places))}" for (mark, policy), places in found.items()]

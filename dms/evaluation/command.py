"""`dms evaluate`: a retrofit beside dense and beside what users would pick instead, at the same measured budget."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dms.console import make_console, make_progress
from dms.evaluation.engine import one_pass as evaluation
from dms.evaluation.engine.extras import LmEval, Scaling, prepare_harness, prepare_scaling
from dms.evaluation.engine.gate_profile import num_passes, write_profile
from dms.evaluation.engine.resume import read_json
from dms.evaluation.engine.settings import POLICIES, Settings, open_folder
from dms.evaluation.engine.units import Unit, finished, make_units, run_unit
from dms.evaluation.present.findings import in_words
from dms.evaluation.present.tables import comparison_table
from dms.evaluation.stats.collect import FATAL, make_rows
from dms.io import base_models as models
from dms.io import checkpoint
from dms.io.vocabulary import check_documents, check_tokenizer, num_embeddings
from dms.io.weights import GATES_FILE
from dms.report.evidence import read_evidence
from dms.report.operating_points import write_evaluation
from dms.retrofitting import state_of

# Documents of each suite that the report's profile is made of.
_PROFILED = 4
# The longest documents of an evaluation that names no lengths.
MAX_DEFAULT_LENGTH = 8192
QUICK = {"num_documents": 50, "batch_size": 25, "suites": ("needle", "records", "text")}


def make_settings(
    folder: str,
    *,
    policies: Sequence[str] = (),
    suites: Sequence[str] | None = None,
    lengths: Sequence[int] = (),
    num_documents: int | None = None,
    batch_size: int | None = None,
    quick: bool = False,
    **others: Any,
) -> Settings:
    """Settings with defaults for what is left out (empty; suites: None); `others` as of Settings. quick: smaller defaults."""
    from dms.evaluation.suites import SUITES

    if not lengths:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no model (config.json is missing); name a folder that `dms retrofit` wrote, such as RUN/model"
            )
        from transformers import AutoConfig

        context = min(AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings, MAX_DEFAULT_LENGTH)
        lengths = [context // 2] if quick else [context // 2, context]
    return Settings.make(
        policies=policies or POLICIES,
        suites=suites if suites is not None else QUICK["suites"] if quick else SUITES,
        lengths=lengths,
        num_documents=num_documents or (QUICK["num_documents"] if quick else 64),
        batch_size=batch_size or (QUICK["batch_size"] if quick else 16),
        **others,
    )


def default_out(folder: str | Path) -> Path:
    """RUN/evaluation for RUN/model, else a folder beside the model's."""
    folder = Path(folder).resolve()
    is_run = folder.name == "model" and (folder.parent / "result.json").is_file()
    return folder.parent / "evaluation" if is_run else folder.with_name(f"{folder.name}-evaluation")


def evaluate_folder(
    folder: str,
    settings: Settings,
    *,
    out: str | Path | None = None,
    scaling: Scaling | None = None,
    lm_eval: LmEval | None = None,
    card: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a retrofitted folder, or go on where an earlier call stopped; print the tables; write OUT/rows.json and return it.

    out: None: `default_out`. scaling, lm_eval: also those, their rows merged. card: also fill the folder's README.md from the rows.

    Raises:
        ValueError: a folder without gates, documents longer than the model's context, or an `out` that holds another evaluation.
    """
    console = console or make_console()
    if not settings.suites and scaling is None and lm_eval is None:
        raise ValueError("there is nothing to measure: name --tasks, --scaling or --lm-eval")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On a CPU half precision is emulated, and slower.
    model = checkpoint.load(folder, dtype="auto" if device == "cuda" else "float32")
    about = describe(folder, model)
    if too_long := [length for length in settings.lengths if length > about["context"]]:
        raise ValueError(f"--lengths has {too_long} and the model's context is {about['context']} tokens; shorten them")
    if not state_of(model).takes_cache:
        raise ValueError(f"{type(model).__name__} works with a cache of its own kind alone, which cannot be evaluated policy by policy")
    out = Path(out) if out is not None else default_out(folder)
    tokenizer, num_rows = models.load_tokenizer(folder), num_embeddings(model.config)
    # Before the folder is touched: what cannot be measured is said here.
    check_tokenizer(tokenizer, num_rows)
    units = list(make_units(tokenizer, settings))
    chains = None if scaling is None else prepare_scaling(model, tokenizer, settings, scaling)
    check_documents(
        itertools.chain(*(unit.documents for unit in units), () if chains is None else chains.problems.problems), tokenizer, num_rows
    )
    digest = open_folder(out, settings, about)
    harness = None if lm_eval is None else prepare_harness(model, tokenizer, settings, lm_eval, about["versions"], out)
    _announce(folder, out, settings, about, console)
    _run(model, units, settings, out, digest, console)

    common = {
        **{name: about[name] for name in ("model", "model_hash", "target_cr", "versions", "device")},
        "recipe_hash": about["recipe_hash"],
        "seed": settings.seed,
    }
    read: dict[tuple[str, int], list] = {}
    for unit in units:
        read.setdefault((unit.suite, unit.length), []).append(finished(out / "done" / unit.file_name, unit.key(digest)))
    rows = make_rows(read, settings, common=common, trained_length=about["trained_length"])
    shared = {"common": common, "out": out, "trained_length": about["trained_length"]}
    if harness is not None:
        rows += harness.run(shared, console)
    if chains is not None:
        rows += chains.run(shared, console)
    rows = _with_earlier(rows, out)
    words = in_words(rows) + (read_json(out / "scaling.json") or {"words": []})["words"]
    _write_profile(model, tokenizer, units, settings, out, console)
    result = {"rows": rows, "words": words, "marks": sorted({mark for row in rows for mark in row["marks"]})}
    (out / "rows.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_result(result, settings, console)
    if card:
        console.print(f"wrote the figures into {write_evaluation(read_evidence(out), folder)}", highlight=False)
    console.print(f"wrote {out}/; `dms report {out}` makes a page of it", highlight=False)
    return result


def _with_earlier(rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Beside what was asked for now, what earlier calls on the folder have measured."""
    earlier = (read_json(out / "rows.json") or {"rows": []})["rows"]

    def figure(row: dict[str, Any]) -> tuple:
        return tuple(row[name] for name in ("suite", "length", "task", "metric", "policy", "evict_bias"))

    known = set(map(figure, rows))
    return [row for row in earlier if figure(row) not in known] + rows


def _write_profile(model, tokenizer, units: Sequence[Unit], settings: Settings, out: Path, console: Console) -> None:
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


def _announce(folder: str, out: Path, settings: Settings, about: dict[str, Any], console: Console) -> None:
    """What a reader of the figures must know beforehand."""
    said = [f"evaluating {folder} into {out}/; chat template: {'on' if settings.chat else 'off'}"]
    if settings.suites and settings.text is None and not str(about["base_name"]).startswith(models.BUILTIN):
        said.append(
            "text: Python's standard library, which the base has surely been trained on: what is evicted may be known by heart. "
            "--text names text of your own"
        )
    if about["trained_length"] is None:
        said.append("at which length the gates were trained is not recorded: lengths beyond it cannot be marked")
    for line in said:
        console.print(line, highlight=False)


def describe(folder: str, model) -> dict[str, Any]:
    """What settings.json says of the model and of where it runs."""
    _, metadata = checkpoint.read_gates(folder)
    state, run_dir = state_of(model), Path(folder).resolve().parent
    is_run = (run_dir / "result.json").is_file() and Path(folder).name == "model"
    recipe = run_dir / "recipe.yaml"
    return {
        "model": str(folder),
        "model_hash": metadata["base_hash"],
        "gates_hash": hashlib.sha256((Path(folder) / GATES_FILE).read_bytes()).hexdigest()[:16],
        "recipe_hash": hashlib.sha256(recipe.read_bytes()).hexdigest()[:16] if is_run and recipe.is_file() else None,
        "base_name": metadata.get("base_name"),
        "run_dir": str(run_dir) if is_run else None,
        "target_cr": float(metadata["target_cr"]) if metadata.get("target_cr") else None,
        "trained_length": int(metadata["trained_length"]) if metadata.get("trained_length") else None,
        **{name: getattr(state.config, name) for name in ("window", "sinks", "granularity", "alignment")},
        "context": model.config.get_text_config().max_position_embeddings,
        "device_type": next(model.parameters()).device.type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": evaluation.versions(),
        "device": evaluation.describe_device(),
    }


def _run(model, units: Sequence[Unit], settings: Settings, out: Path, digest: str, console: Console) -> None:
    with make_progress(console) as progress:
        task = progress.add_task("", total=len(units) * len(settings.points()))
        for unit in units:
            place = f"{unit.suite}, {unit.length} tokens, batch {unit.number + 1}"
            run_unit(
                model,
                unit,
                settings,
                out / "done",
                digest,
                step=lambda what, place=place: progress.update(task, description=f"{what}: {place}"),
                done=lambda: progress.advance(task),
            )


def print_result(result: dict[str, Any], settings: Settings, console: Console) -> None:
    rows = result["rows"]
    for length in settings.lengths if settings.suites else ():
        for bias in settings.evict_bias:
            here = [
                row for row in rows if row["length"] == length and row["evict_bias"] in (None, bias) and row["suite"] in settings.suites
            ]
            point = f", evict_bias {bias:+g}" if len(settings.evict_bias) > 1 else ""
            console.print(comparison_table(here, f"{length} tokens{point}"))
    for bias in settings.evict_bias:
        here = [row for row in rows if row["suite"] == "lm_eval" and row["evict_bias"] in (None, bias)]
        if here:
            point = f", evict_bias {bias:+g}" if len(settings.evict_bias) > 1 else ""
            console.print(comparison_table(here, f"lm-evaluation-harness{point}"))
    for sentence in result["words"]:
        console.print(sentence, highlight=False)
    if result["marks"]:
        console.print(f"marks: {', '.join(result['marks'])}", style="bold", highlight=False)


def failures(result: dict[str, Any]) -> list[str]:
    """What `--strict` does not let pass, a line for each mark and policy."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for mark in row["marks"]:
            if mark in FATAL:
                found.setdefault((mark, row["policy"]), []).append(f"{row['task']} at {row['length']}")
    return [f"{mark}: {policy}: {', '.join(dict.fromkeys(places))}" for (mark, policy), places in found.items()]

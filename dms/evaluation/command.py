"""`dms evaluate`: a retrofit beside dense and beside what users would pick instead, at the same measured budget."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dms import checkpoint, models
from dms.console import make_console
from dms.evaluation import evaluate as evaluation
from dms.evaluation.collect import FATAL, make_rows
from dms.evaluation.settings import POLICIES, Settings, open_folder
from dms.evaluation.table import comparison_table
from dms.evaluation.units import Unit, make_units, run_unit
from dms.evaluation.words import in_words
from dms.retrofitting import state_of
from dms.weights import GATES_FILE

# The longest documents of an evaluation that names no lengths.
MAX_DEFAULT_LENGTH = 8192
QUICK = {"num_documents": 16, "suites": ("records", "passages", "text")}


def make_settings(
    folder: str,
    *,
    policies: Sequence[str] = (),
    suites: Sequence[str] = (),
    lengths: Sequence[int] = (),
    num_documents: int | None = None,
    quick: bool = False,
    **others: Any,
) -> Settings:
    """Settings with defaults for what is left out (empty); `others` as of Settings. quick: smaller defaults."""
    from dms.evaluation.suites import SUITES

    if not lengths:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no model (config.json is missing); name a folder that `dms retrofit` wrote, such as RUN/model"
            )
        from transformers import AutoConfig

        context = min(AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings, MAX_DEFAULT_LENGTH)
        lengths = [context] if quick else [context // 2, context]
    return Settings.make(
        policies=policies or POLICIES,
        suites=suites or (QUICK["suites"] if quick else SUITES),
        lengths=lengths,
        num_documents=num_documents or (QUICK["num_documents"] if quick else 64),
        **others,
    )


def default_out(folder: str | Path) -> Path:
    """RUN/evaluation for RUN/model, else a folder beside the model's."""
    folder = Path(folder).resolve()
    is_run = folder.name == "model" and (folder.parent / "result.json").is_file()
    return folder.parent / "evaluation" if is_run else folder.with_name(f"{folder.name}-evaluation")


def evaluate_folder(
    folder: str, settings: Settings, *, out: str | Path | None = None, card: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate a retrofitted folder, or go on where an earlier call stopped; print the tables; write OUT/rows.json and return it.

    out: None: `default_out`.

    Raises:
        ValueError: a folder without gates, documents longer than the model's context, or an `out` that holds another evaluation.
    """
    console = console or make_console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On a CPU half precision is emulated, and slower.
    model = checkpoint.load(folder, dtype="auto" if device == "cuda" else "float32")
    about = describe(folder, model)
    if too_long := [length for length in settings.lengths if length > about["context"]]:
        raise ValueError(f"--lengths has {too_long} and the model's context is {about['context']} tokens; shorten them")
    if not state_of(model).takes_cache:
        raise ValueError(f"{type(model).__name__} works with a cache of its own kind alone, which cannot be evaluated policy by policy")
    out = Path(out) if out is not None else default_out(folder)
    tokenizer = models.load_tokenizer(folder)
    digest = open_folder(out, settings, about)
    console.print(f"evaluating {folder} into {out}/; chat template: {'on' if settings.chat else 'off'}", highlight=False)
    units = list(make_units(tokenizer, settings))
    _run(model, units, settings, out, digest, console)

    common = {
        **{name: about[name] for name in ("model", "model_hash", "target_cr", "versions", "device")},
        "recipe_hash": about["recipe_hash"],
        "seed": settings.seed,
    }
    read: dict[tuple[str, int], list] = {}
    for unit in units:
        written = json.loads((out / "done" / unit.file_name).read_text(encoding="utf-8"))
        read.setdefault((unit.suite, unit.length), []).append(written["results"])
    rows = make_rows(read, settings, common=common, trained_length=about["trained_length"], context=about["context"])
    result = {"rows": rows, "words": in_words(rows), "marks": sorted({mark for row in rows for mark in row["marks"]})}
    (out / "rows.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_result(result, settings, console)
    return result


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
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": evaluation.versions(),
        "device": evaluation.describe_device(),
    }


def _run(model, units: Sequence[Unit], settings: Settings, out: Path, digest: str, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
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
    for length in settings.lengths:
        for bias in settings.evict_bias:
            here = [row for row in rows if row["length"] == length and row["evict_bias"] in (None, bias)]
            point = f", evict_bias {bias:+g}" if len(settings.evict_bias) > 1 else ""
            console.print(comparison_table(here, f"{length} tokens{point}"))
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

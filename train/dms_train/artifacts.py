"""What a retrofit leaves in its folder: gates, model, result.json, report and the table that is printed."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dms import report
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.engine.gate_profile import trace_document
from dms.evaluation.engine.run_end import evaluate_run, read_dense
from dms.evaluation.present.tables import results_table
from dms.evaluation.stats.results import PolicyResult
from dms.evaluation.stats.rows import RowContext, describe_device, versions
from dms.io import base_models, checkpoint
from dms.io.gguf_file import read_header
from dms.io.quantization import is_packed
from dms.io.weights import base_hash, sha256
from dms.modes import state_of
from dms.report.cards import write_run_card
from dms.report.evidence import TrainingFacts
from dms.retrofitting import retrofit
from dms_train.lora import without_adapters
from dms_train.models import Models
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import dump_recipe


@dataclass(frozen=True)
class BaseFacts:
    """What a card says of a base, found while its files are at hand."""

    license: str | None
    sha256: str | None
    """Of the GGUF file that its weights were dequantised from; None: there is no such file."""

    @classmethod
    def of(cls, name: str) -> "BaseFacts":
        path = base_models.resolve_model(name).gguf_path()
        if path is not None:
            return cls(read_header(path).license, sha256(path))
        return cls("apache-2.0" if name.startswith(base_models.BUILTIN) else None, None)


def saved_dtype(name: str) -> torch.dtype | None:
    """The dtype that a model's folder is saved in, so that a retrofit is saved in the same."""
    config = base_models.load_config(name)
    if base_models.is_saved_bfloat16(config):
        return torch.bfloat16
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def written_dtype(recipe: RetrofitRecipe, base_dtype: torch.dtype) -> torch.dtype | None:
    """Frozen weights are written as the base has them; trained ones as they were measured, None: as they are held."""
    return base_dtype if recipe.trainable == "gates" else None


def _save(folder: Path, recipe: RetrofitRecipe, student: Any, tokenizer, weights: checkpoint.Weights, base: dict) -> tuple[Path, str]:
    dtype = next(tensor.dtype for tensor in weights.base.values() if tensor.is_floating_point())
    target_cr = recipe.target_cr
    # Files that are packed already are copied; what the recipe packed is written as it was packed.
    came_packed = recipe.trainable == "gates" and recipe.quantize is None and is_packed(student.config)
    packed_files = base_models.local_weights(recipe.model) if came_packed else None
    model_folder = checkpoint.save(
        student,
        folder / "model",
        tokenizer=tokenizer,
        base_name=recipe.model,
        target_cr=target_cr,
        dtype=dtype,
        weights=weights,
        packed_files=packed_files,
    )
    digest = base_hash(model_folder)
    if recipe.trainable == "gates":
        # Gates alone go with the base that was named, so its own hash counts where its files are at hand.
        checkpoint.save_gates(
            student,
            folder / "gates",
            base_name=recipe.model,
            base_digest=base["hash"] or digest,
            base_form=recipe.quantize,
            target_cr=target_cr,
            tensors=weights.gates,
        )
    return model_folder, digest


def finish(
    folder: Path | None,
    recipe: RetrofitRecipe,
    student: nn.Module,
    tokenizer,
    *,
    dense: PolicyResult | None,
    weights: checkpoint.Weights,
    base: dict,
    base_facts: BaseFacts,
    documents: list[EvaluationDocument],
    tokens: int,
    training_seconds: float,
    start: float,
    num_processes: int,
    forwards_done: Callable[[], None],
    console: Console,
) -> dict:
    """Save, evaluate, draw and print. Returns what result.json holds.

    dense: what the model read as it was, where the student's weights are others now.
    folder: None on processes that only take part in the forward passes of a divided model. forwards_done is called after those.
    """
    if folder is not None:
        model_folder, digest = _save(folder, recipe, student, tokenizer, weights, base)

    length = len(documents[0].input_ids)
    with console.status("evaluating dense, dms and a sliding window of the same budget"):
        evaluated = evaluate_run(student, documents, batch_size=recipe.evaluation.batch_size, dense=dense)
    names = [f"layer {layer.index}" for layer in state_of(student).layers]
    trace = trace_document(student, tokenizer, documents[0])
    forwards_done()
    if folder is None:
        return {}
    context = RowContext(
        model=recipe.model,
        model_hash=digest,
        recipe_hash=hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16],
        target_cr=recipe.target_cr,
        seed=recipe.seed,
        versions=versions(),
        device=describe_device(),
    )
    figures = evaluated.figures
    rows = evaluated.rows(context, state_of(student).trained_length)
    result = {
        "model": recipe.model,
        "target_cr": recipe.target_cr,
        "window": recipe.dms.to_dict()["window"],
        "alignment": recipe.dms.alignment,
        "granularity": recipe.dms.granularity,
        "trainable": recipe.trainable,
        "quantize": recipe.quantize,
        "beta": recipe.beta,
        "steps": recipe.steps,
        "zero": recipe.zero.model_dump(),
        "num_processes": num_processes,
        "tokens": tokens,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - start,
        "length": length,
        "device": context.device,
        "versions": context.versions,
        "policies": {policy: found.to_dict() for policy, found in figures.items()},
        "rows": [row.to_dict() for row in rows],
    }

    # Before anything is drawn: figures must outlive a failing picture. Its name makes a run finished, so it gets that at the end.
    unnamed = folder / "result.json.new"
    unnamed.write_text(json.dumps(result, indent=1), encoding="utf-8")
    report.write_report(
        folder,
        report.read_metrics(folder / "metrics.jsonl"),
        evaluated.evicted_share_LH,
        trace,
        names,
        class_LHK=evaluated.class_share_LHK,
    )
    write_run_card(
        model_folder,
        base_name=recipe.model,
        base_license=base_facts.license,
        base_sha256=base_facts.sha256,
        dms_config=recipe.dms.to_dict(),
        rows=rows,
        run=TrainingFacts.from_result(result),
        data="standard-library sources with planted recall tasks (built-in)" if recipe.data.source == "builtin" else recipe.data.describe(),
    )
    result["seconds"] = time.perf_counter() - start
    unnamed.write_text(json.dumps(result, indent=1), encoding="utf-8")
    unnamed.replace(folder / "result.json")
    console.print(results_table(figures, f"{recipe.model} at {length} tokens, target CR {recipe.target_cr:g}"))
    console.print(f"wrote {folder}/: model/ gates/ report/ result.json metrics.jsonl ({result['seconds']:.0f} s)", highlight=False)
    return result


def dense_result(recipe: RetrofitRecipe, parts: Models, documents: list[EvaluationDocument]) -> PolicyResult | None:
    """What the model reads as it was, before adapters are merged; None where the student's weights are still those."""
    if recipe.trainable == "gates":
        return None
    model = parts.student if parts.teacher is None or recipe.teacher is not None else parts.teacher
    if getattr(model, "dms", None) is None:
        # A borrowed gate would take its channel from the teacher too.
        retrofit(model, replace(recipe.dms, gate="linear"))
    with without_adapters(model):
        return read_dense(model, documents, batch_size=recipe.evaluation.batch_size)


def result_of_base(recipe: RetrofitRecipe, parts: Models, documents: list[EvaluationDocument]) -> PolicyResult:
    """What the base reads before it trains: with a teacher cache no copy of it is left afterwards."""
    parts.student.eval()
    result = read_dense(parts.student, documents, batch_size=recipe.evaluation.batch_size)
    parts.student.train()
    return result

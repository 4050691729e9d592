"""`dms evaluate`: repeat a run's evaluation on a saved folder."""

import json
from pathlib import Path

from rich.progress import Progress

from dms import checkpoint, models
from dms.console import make_console
from dms.evaluation import evaluate as evaluation
from dms.evaluation.table import results_table
from dms.retrofitting import state_of


def evaluate_folder(folder: str, *, length: int | None, num_documents: int, num_items: int, evict_bias: float, out: str | None) -> dict:
    """Evaluate a retrofitted folder, print the table, and return (and write to `out`) the figures and rows.

    Raises:
        ValueError: a folder without gates, or documents longer than the model's context.
    """
    model = checkpoint.load(folder, dtype="float32", evict_bias=evict_bias)
    tokenizer = models.load_tokenizer(folder)
    context = model.config.get_text_config().max_position_embeddings
    length = length or min(context, 2048)
    if length > context:
        raise ValueError(f"--length is {length} and the model's context is {context} tokens; shorten it")
    documents = evaluation.make_documents(tokenizer, num_documents=num_documents, length=length, num_items=num_items)
    console = make_console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(documents) * len(evaluation.POLICIES))
        scores = evaluation.evaluate(model, documents, progress=lambda n: progress.advance(task, n))
    if scores["dms"].evicted == 0:
        console.print("[bold red]dms evicted nothing[/]: its figures are those of the dense model")
    _, metadata = checkpoint.read_gates(folder)
    common = {
        "model": str(folder),
        "model_hash": metadata["base_hash"],
        "recipe_hash": None,
        "target_cr": float(metadata["target_cr"]) if metadata.get("target_cr") else None,
        "seed": 7,
        "versions": evaluation.versions(),
        "device": evaluation.describe_device(),
    }
    policies = {name: evaluation.summary(s) for name, s in scores.items()}
    rows = [row for s in scores.values() for row in evaluation.rows(s, length=length, common=common)]
    result = {"model": str(folder), "length": length, "window": state_of(model).config.window, "policies": policies, "rows": rows}
    console.print(results_table(policies, f"{folder} at {length} tokens"))
    if out:
        Path(out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result

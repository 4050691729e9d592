"""`dms evaluate`: the run's own evaluation on a saved folder, at one operating point or several."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from dms import checkpoint, models
from dms.console import make_console
from dms.evaluation import evaluate as evaluation
from dms.evaluation.table import results_table
from dms.operating_points import policy_label, write_points
from dms.retrofitting import state_of

_AT_EACH_BIAS = ("dms", "sliding_window")


def evaluate_folder(
    folder: str,
    *,
    length: int | None,
    num_documents: int,
    num_items: int,
    evict_bias: Sequence[float],
    out: str | None,
    card: bool = False,
) -> dict:
    """Evaluate a retrofitted folder, print the table, and return (and write to `out`) the figures and rows.

    evict_bias: dms, and a sliding window of the budget that it then uses, are measured at each; dense once. card: also write
    the points into the folder's README.md.

    Raises:
        ValueError: a folder without gates, documents longer than the model's context, or a bias that is no number.
    """
    biases = list(dict.fromkeys(evict_bias)) or [0.0]
    if any(math.isnan(bias) for bias in biases):
        raise ValueError(f"--evict-bias is {biases}; give numbers, such as -2, 0 and 1.5")
    model = checkpoint.load(folder, dtype="float32")
    tokenizer = models.load_tokenizer(folder)
    context = model.config.get_text_config().max_position_embeddings
    length = length or min(context, 2048)
    if length > context:
        raise ValueError(f"--length is {length} and the model's context is {context} tokens; shorten it")
    documents = evaluation.make_documents(tokenizer, num_documents=num_documents, length=length, num_items=num_items)
    console = make_console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(documents) * (1 + len(biases) * len(_AT_EACH_BIAS)))
        scores = _measure(model, documents, biases, lambda n: progress.advance(task, n))
    for (policy, bias), found in scores.items():
        if policy == "dms" and found.evicted == 0:
            console.print(f"[bold red]dms evicted nothing[/] at bias {bias:g}: its figures are those of the dense model")
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
    policies = {
        policy_label(policy, bias if len(biases) > 1 else None): {**evaluation.summary(found), "evict_bias": bias}
        for (policy, bias), found in scores.items()
    }
    rows = [
        row for (_, bias), found in scores.items() for row in evaluation.rows(found, length=length, common={**common, "evict_bias": bias})
    ]
    result = {"model": str(folder), "length": length, "window": state_of(model).config.window, "policies": policies, "rows": rows}
    beside = ", evict_bias beside the policy" if len(biases) > 1 else ""
    console.print(results_table(policies, f"{folder} at {length} tokens{beside}"))
    if out:
        Path(out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    if card:
        points = [{"policy": policy, **figures} for (policy, _), figures in zip(scores, policies.values(), strict=True)]
        path = write_points(folder, points, length=length)
        console.print(f"wrote the operating points into {path}", highlight=False)
    return result


def _measure(model, documents: list, biases: list[float], progress) -> dict[tuple[str, float | None], evaluation.Scores]:
    """(policy, bias) -> its scores; dense has no bias."""
    found: dict[tuple[str, float | None], evaluation.Scores] = {
        ("dense", None): evaluation.run_policy(model, documents, "dense", progress=progress)
    }
    for bias in biases:
        state_of(model).evict_bias = bias
        scores = evaluation.evaluate(model, documents, policies=_AT_EACH_BIAS, progress=progress)
        found |= {(policy, bias): s for policy, s in scores.items()}
    return found

"""A run as it was when its schedule passed a ratio (`save: {at_cr: [4]}`): a folder that `dms export` takes for a run."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dms.io.gates_file import read_config, read_gates, write_gates
from dms.io.weights import GATES_FILE, base_hash, save_tensors, weight_files, write_index
from dms.report.card_text import CARD_FILE, Card
from dms_train import checkpoints


def write_snapshot(run: str | Path, cr: float, folder: Path) -> Path:
    """Write `folder`/model (and `folder`/gates, where the base was not trained) with what had been learned at `cr`.

    Weights that did not train are links into the run.

    Raises:
        ValueError: no such run or checkpoint, an unfinished run, or one whose checkpoints do not hold its weights whole.
    """
    run = Path(run).expanduser()
    saved = _find(run, cr)
    model = run / "model"
    if not (model / GATES_FILE).is_file():
        raise ValueError(f"{run} is no finished run: {model} is missing; end the run, with the command that began it")
    _require_whole(saved, run)
    tensors, metadata = read_gates(saved.folder)
    config = read_config(metadata, None, saved.folder)
    trained = load_file(saved.folder / checkpoints.WEIGHTS) if (saved.folder / checkpoints.WEIGHTS).is_file() else {}

    snapshot = folder / "model"
    snapshot.mkdir(parents=True)
    for entry in model.iterdir():
        if entry.name not in (GATES_FILE, CARD_FILE) and not (trained and entry in weight_files(model)):
            (snapshot / entry.name).symlink_to(entry.resolve())
    if trained:
        _write_weights(model, snapshot, trained)
    write_index(snapshot)
    trained_length = saved.manifest.recipe["data"]["length"]
    common: dict[str, Any] = {"base_name": metadata["base_name"], "target_cr": cr, "trained_length": trained_length}
    # A checkpoint of an earlier version does not have it.
    common["base_structure"] = metadata.get("base_structure")
    write_gates(snapshot, tensors, config, base_digest=base_hash(snapshot), **common)
    if not trained:
        of_run = read_gates(run / "gates")[1]
        write_gates(folder / "gates", tensors, config, base_digest=of_run["base_hash"], base_form=of_run.get("base_form"), **common)
    _card(model / CARD_FILE, saved, cr).write(snapshot)
    return folder


def _find(run: Path, cr: float) -> checkpoints.Saved:
    found = checkpoints.at_ratios(run)
    if cr not in found:
        known = ", ".join(f"{ratio:g}" for ratio in sorted(found)) or "none"
        raise ValueError(
            f"{run} has no checkpoint at CR {cr:g}; there are: {known} (a recipe asks for them: save: {{at_cr: [4]}}; without --at-cr "
            "the end of the run is exported)"
        )
    return found[cr]


def _require_whole(saved: checkpoints.Saved, run: Path) -> None:
    recipe = saved.manifest.recipe
    if recipe["trainable"] == "gates+lora":
        raise ValueError(f"{run} trained adapters, which are merged at its end only; export the end, without --at-cr")
    if recipe["trainable"] == "all" and recipe["zero"]["stage"] == 3:
        raise ValueError(
            f"{run} trained all weights under zero.stage 3, whose checkpoints hold them divided; export the end, without --at-cr"
        )


def _write_weights(model: Path, snapshot: Path, trained: dict) -> None:
    """The run's files with the snapshot's weights, in the files' dtypes."""
    missing = dict(trained)
    for file in weight_files(model):
        tensors = load_file(file)
        for name in set(tensors) & set(trained):
            tensors[name] = missing.pop(name).to(tensors[name].dtype)
        save_tensors(tensors, snapshot / file.name, {"format": "pt"})
    if missing:
        raise ValueError(
            f"the files of {model} name their weights otherwise than the checkpoint does (no {next(iter(missing))}); export the end"
        )


def _card(source: Path, saved: checkpoints.Saved, cr: float) -> Card:
    """The run's card without its figures: they are those of the run's end."""
    card = Card.read(source)
    fields = {key: value for key, value in card.fields.items() if key != "model-index"}
    title = next((line for line in card.body.splitlines() if line.startswith("# ")), "# A retrofitted model")
    text = (
        f"{title}\n\nThe retrofit as it was at step {saved.position.step}, when its schedule passed compression ratio {cr:g}. This snapshot was not "
        "evaluated: `dms evaluate FOLDER --card` does that, and writes its figures here.\n"
    )
    return Card(fields, text)

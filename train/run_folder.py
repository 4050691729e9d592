"""A run's folder: new, continued, replaced or refused, decided before anything is touched."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dms import models
from dms.train import saving
from dms.train.recipe import RetrofitRecipe, dump_recipe

# What a process that was killed while making the folder leaves.
_BARELY_BEGUN = {"metrics.jsonl", "metrics.jsonl.new", "recipe.yaml.new"}
# Where a run's files go and how they are kept, followed and measured: free to change when it is continued.
_FREE = ("output_dir", "overwrite", "resume", "save", "tracking", "evaluation", "timeout_minutes", "zero.nvme_path")
# These change the order of sums and nothing else: an out-of-memory run can be continued with smaller pieces.
_SAME_SUMS = ("micro_batch_size", "loss_chunk", "activation_checkpointing")


def decide(folder: Path, recipe: RetrofitRecipe, num_processes: int, base_hash: str | None, console: Console) -> saving.Saved | None:
    """The checkpoint to continue from, or None for a new run (`prepare` then makes the folder).

    Raises:
        ValueError: the folder holds something else, a finished run, another recipe's, or one that cannot be continued here.
    """
    if not folder.exists() or {path.name for path in folder.iterdir()} <= _BARELY_BEGUN:
        return None
    stored = _stored_recipe(folder)
    if stored is None:
        raise ValueError(f"output_dir '{folder}' is not empty and holds no run; choose another folder")
    if recipe.overwrite and (recipe.resume == "never" or (folder / "result.json").exists()):
        return None
    if (folder / "result.json").exists():
        raise ValueError(f"output_dir '{folder}' holds a finished run; choose another folder, or overwrite=true to replace it")
    if recipe.resume == "never":
        raise ValueError(f"output_dir '{folder}' holds another run, unfinished; resume=auto continues it, overwrite=true replaces it")
    differing = differences(stored, recipe)
    saved = None
    if not differing:
        saved = saving.newest(folder, console)
        differing = differences(saved.manifest["recipe"], recipe) if saved else []
    if differing:
        if recipe.overwrite:
            return None
        raise ValueError(
            f"output_dir '{folder}' holds another run, unfinished, whose recipe differs: {'; '.join(differing)}; "
            "give the same values to continue it, choose another folder, or overwrite=true to replace it"
        )
    if saved is None:
        console.print(f"{folder} holds this run without a checkpoint: it begins anew", highlight=False)
        return None
    manifest = saved.manifest
    if manifest["num_processes"] != num_processes and recipe.zero.stage > 0:
        raise ValueError(
            f"{saved.folder} was written by {manifest['num_processes']} processes and there are {num_processes}: under ZeRO each holds a "
            f"part of the optimizer's state, which is not divided anew; start {manifest['num_processes']} processes"
        )
    if base_hash is not None and manifest["base"]["hash"] != base_hash:
        raise ValueError(
            f"{saved.folder} was trained on {manifest['base']['name']!r} with hash {manifest['base']['hash']}, and {recipe.model} has hash "
            f"{base_hash}; give the base that the run began with"
        )
    then, now = _flat(manifest["recipe"]), _flat(recipe.model_dump())
    for name in [key for key in _SAME_SUMS if then.get(key) != now[key]]:
        console.print(f"continued with {name} {now[name]} instead of {then.get(name)}: the same sums in another order", highlight=False)
    if manifest["num_processes"] != num_processes:
        console.print(
            f"continued by {num_processes} processes instead of {manifest['num_processes']}: the same sums in another order",
            highlight=False,
        )
    return saved


def prepare(folder: Path, recipe: RetrofitRecipe, saved: saving.Saved | None) -> None:
    """Make the folder ready: emptied for a new run, its metrics cut back to the checkpoint for one that is continued."""
    folder.mkdir(parents=True, exist_ok=True)
    if saved is None:
        base = Path(models.resolve_model(recipe.model)).absolute()
        if any(folder.iterdir()) and base.is_relative_to(folder.absolute()):
            raise ValueError(f"model '{recipe.model}' lies within output_dir '{folder}', which would be emptied; choose another output_dir")
        _empty(folder)
    saving.remove_remains(folder)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    temporary = folder / "metrics.jsonl.new"
    temporary.write_text("".join(lines[: saved.position.step if saved else 0]), encoding="utf-8")
    temporary.replace(metrics)
    # The recipe comes last: it makes the folder a run.
    temporary = folder / "recipe.yaml.new"
    temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    temporary.replace(folder / "recipe.yaml")


def _empty(folder: Path) -> None:
    # What makes it a run goes last, so that a deletion that is broken off can be taken up again.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == "metrics.jsonl", path.name == "recipe.yaml")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of the run that a folder holds, or None where it holds none."""
    if not all((folder / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
        return None
    try:
        stored = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return stored if isinstance(stored, dict) else None


def differences(stored: dict[str, Any], recipe: RetrofitRecipe) -> list[str]:
    """Keys that make it another run, with both values."""
    then, now = _flat(stored), _flat(recipe.model_dump())
    keys = [key for key in {**now, **then} if not key.startswith(_FREE) and key not in _SAME_SUMS]
    return [f"{key} is {then.get(key)!r} there and {now.get(key)!r} here" for key in keys if then.get(key) != now.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

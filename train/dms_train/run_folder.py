"""A run's folder: whether a run is new, continued, replaced or refused is decided before any file is touched."""

import fcntl
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console

from dms.io import base_models
from dms_train import checkpoints
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import dump_recipe, flat

LOCK_FILE = ".lock"
# What a process leaves that was killed while it made the folder.
_BARELY_BEGUN = {LOCK_FILE, "metrics.jsonl", "metrics.jsonl.new", "recipe.yaml.new"}
# Where files go, what is saved, tracked and evaluated: may change when a run is continued.
_FREE = (
    "output_dir",
    "overwrite",
    "resume",
    "save",
    "tracking",
    "evaluation",
    "timeout_minutes",
    "zero.nvme_path",
    "teacher_cache.path",
    "data.prefetch",
    "data.workers",
)
# These change only the order of sums: a run that ran out of memory can be continued with smaller pieces.
_SAME_SUMS = ("micro_batch_size", "loss_chunk", "activation_checkpointing", "offload_activations")


class RunFolder:
    """A run's folder, locked until the context or the process ends. Only the first process uses it."""

    def __init__(self, path: Path, recipe: RetrofitRecipe, console: Console):
        self.path, self.recipe, self.console = path, recipe, console
        self._held: IO | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if self._held is not None:
            self._held.close()

    def decide(self, num_processes: int, base_hash: str | None) -> checkpoints.Saved | None:
        """The checkpoint to continue from, or None for a new run (`prepare` then makes the folder).

        Raises:
            ValueError: the folder is in use, or holds something else, a finished run, another recipe's, or one that cannot be
                continued here.
        """
        folder, recipe = self.path, self.recipe
        if not folder.exists() or {path.name for path in folder.iterdir()} <= _BARELY_BEGUN:
            return None
        stored = stored_recipe(folder)
        if stored is None:
            raise ValueError(f"output_dir '{folder}' is not empty and holds no run; choose another folder")
        self._lock()
        finished = (folder / "result.json").exists()
        if recipe.overwrite and (recipe.resume == "never" or finished):
            return None
        if finished:
            raise ValueError(f"output_dir '{folder}' holds a finished run; choose another folder, or overwrite=true to replace it")
        if recipe.resume == "never":
            raise ValueError(f"output_dir '{folder}' holds an unfinished run; resume=auto continues it, overwrite=true replaces it")
        saved, differing = None, differences(stored, recipe)
        if not differing:
            saved = checkpoints.newest(folder, self.console)
            differing = differences(saved.manifest.recipe, recipe) if saved else []
        if differing and recipe.overwrite:
            return None
        if differing:
            raise ValueError(
                f"output_dir '{folder}' holds another run, unfinished, whose recipe differs: {'; '.join(differing)}; "
                "give the same values to continue it, choose another folder, or overwrite=true to replace it"
            )
        if saved is None:
            self._say(f"{folder} holds this run without a checkpoint: it starts over")
            return None
        self._check(saved, num_processes, base_hash)
        return saved

    def _check(self, saved: checkpoints.Saved, num_processes: int, base_hash: str | None) -> None:
        manifest, recipe = saved.manifest, self.recipe
        before = manifest.num_processes
        if before != num_processes and recipe.zero.stage > 0:
            raise ValueError(
                f"{saved.folder} was written by {before} processes and there are {num_processes}: under ZeRO each holds a part of the "
                f"optimizer's state, which cannot be redistributed; start {before} processes"
            )
        if base_hash is not None and manifest.base.hash != base_hash:
            raise ValueError(
                f"{saved.folder} was trained on {manifest.base.name!r} with hash {manifest.base.hash}, and {recipe.model} has "
                f"hash {base_hash}; give the base that the run began with"
            )
        then, now = flat(manifest.recipe), flat(recipe.model_dump())
        changed = [f"{name} {now[name]} instead of {then.get(name)}" for name in _SAME_SUMS if then.get(name) != now[name]]
        changed += [f"{num_processes} processes instead of {before}"] if before != num_processes else []
        if changed:
            self._say(f"continued with {', '.join(changed)}: the same sums in another order")

    def prepare(self, saved: checkpoints.Saved | None) -> str:
        """Prepare the folder: emptied for a new run; for one that is continued, metrics are cut back to the checkpoint's step.

        Returns what the lock file now holds, by which other processes recognise the folder.
        """
        folder, recipe = self.path, self.recipe
        folder.mkdir(parents=True, exist_ok=True)
        if self._held is None:
            self._lock()
            if stored_recipe(folder) is not None:
                raise ValueError(f"output_dir '{folder}' was taken by another run meanwhile; choose another folder")
        if saved is None:
            base = base_models.resolve_model(recipe.model).path.absolute()
            if base.is_relative_to(folder.absolute()):
                raise ValueError(
                    f"model '{recipe.model}' lies within output_dir '{folder}', which would be emptied; choose another output_dir"
                )
            _empty(folder)
        checkpoints.remove_remains(folder, after=saved.position.step if saved else 0)
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        _replace(metrics, "".join(lines[: saved.position.step if saved else 0]))
        # The recipe comes last: a folder with recipe and metrics counts as a run.
        _replace(folder / "recipe.yaml", dump_recipe(recipe))
        return (folder / LOCK_FILE).read_text(encoding="utf-8")

    def _lock(self) -> None:
        if self._held is not None:
            return
        self._held = (self.path / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.seek(0)
            raise ValueError(
                f"output_dir '{self.path}' is in use by {self._held.read().strip() or 'another run'}; wait for its end, or stop it"
            ) from None
        except OSError as error:
            self._say(f"{self.path} cannot be locked ({error}): make sure that no second process continues the run")
        self._held.truncate(0)
        self._held.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._held.flush()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _empty(folder: Path) -> None:
    # Recipe and metrics, which make it a run, go last: an interrupted deletion can be repeated.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == "metrics.jsonl", path.name == "recipe.yaml")):
        if path.name == LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of the run that a folder holds, or None where it holds none."""
    if not all((folder / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
        return None
    try:
        stored = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return stored if isinstance(stored, dict) else None


def differences(stored: dict[str, Any], recipe: RetrofitRecipe) -> list[str]:
    """Keys in which the recipes differ and which make it another run, with both values."""
    then, now = flat(stored), flat(recipe.model_dump())
    keys = [key for key in {**now, **then} if is_of_another_run(key)]
    return [f"{key} is {then.get(key)!r} there and {now.get(key)!r} here" for key in keys if then.get(key) != now.get(key)]


def is_of_another_run(key: str) -> bool:
    """Whether a recipe that differs in this dotted key is another run's."""
    return not key.startswith(_FREE) and key not in _SAME_SUMS

"""Checkpoints that a run continues from: written completely or not at all, verified before they are read, nothing pickled.

`checkpoints/step_000050/` holds `gates.safetensors`, `weights.safetensors` (what else trains), the optimizer's state of each
process that has one, and `manifest.json`, which names every file with its SHA-256. It is written under another name and renamed
when all is on disk. The frozen base is never written: its hash is.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from dms.errors import describe, writing
from dms.io import checkpoint
from dms.io.weights import save_tensors
from dms.training.sharding import gathered
from dms_train import compat
from dms_train.engine import Engine
from dms_train.models import Models
from dms_train.recipe import RetrofitRecipe

FOLDER = "checkpoints"
FORMAT_VERSION = 2
_MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a run stands after `step`. Noise and schedule are functions of the step alone, but for `ramp`."""

    step: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    data: dict[str, Any] | None = None
    """The data cursors, as `Stream.state` gives them; None before the first step."""
    ramp: dict[str, Any] | None = None
    """The fields of `trial_schedules.WaitingRamp`; None: the target is a function of the step alone."""


@dataclass(frozen=True)
class BaseIdentity:
    """The base that a run trains on."""

    name: str
    hash: str | None
    """Of its files; None where it has none to hash."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same when a run is continued."""

    base: BaseIdentity
    frozen: str
    """Digest of the weights that do not train."""
    data: str
    """`Stream.digest`."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest.json; the fields are its keys."""

    format_version: int
    position: Position
    at_cr: float | None
    """The ratio of save.at_cr that it was written for; None: a periodic one."""
    recipe: dict[str, Any]
    num_processes: int
    run_id: str | None
    """The tracker's."""
    base: BaseIdentity
    frozen: str
    data: str
    files: dict[str, dict[str, Any]]
    """By name: `sha256` and `bytes`."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are all there and unchanged."""

    folder: Path
    manifest: Manifest

    @property
    def position(self) -> Position:
        return self.manifest.position


class Saver:
    """Writes the run's checkpoints. All processes call it together."""

    def __init__(self, folder: Path, recipe: RetrofitRecipe, accelerator: Accelerator, console: Console, identity: RunIdentity):
        self.folder, self.recipe, self.accelerator, self.console = folder / FOLDER, recipe, accelerator, console
        self.identity = identity
        self.last: Path | None = None

    @property
    def last_step(self) -> int | None:
        return None if self.last is None else _step(self.last)

    def save(self, engine: Engine, parts: Models, position: Position, *, at_cr: float | None, run_id: str | None) -> bool:
        """Write a checkpoint. Returns whether that worked: a full disk does not end the run."""
        if self.recipe.zero.offload_optimizer == "nvme":
            # The optimizer's state is in DeepSpeed's swap files. The recipe asks for no checkpoints; a signal gets none either.
            return False
        target = self.folder / f"step_{position.step:06d}"
        temporary = self.folder / f".{target.name}.new"
        is_main = self.accelerator.is_main_process
        # A collective under ZeRO-3: all processes must get through it, so it comes before anything that may fail.
        gates = _whole(parts.gates)
        files: dict[str, dict[str, Any]] = {}

        def make_folder() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write_state() -> dict[str, dict[str, Any]]:
            paths = _write_state(temporary, engine, parts, gates, self.recipe, self.identity.base, self.accelerator.process_index)
            return {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths}

        def finish() -> None:
            self._finish(temporary, target, files, position, at_cr, run_id)

        try:
            self._together(make_folder if is_main else None)
            for described in self._together(write_state):
                files.update(described)
            self._together(finish if is_main else None)
        except OSError as error:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                self.console.print(
                    f"[bold red]the checkpoint of step {position.step} could not be written[/]: {error}; {self.describe_last()}",
                    highlight=False,
                )
            return False
        self.last = target
        if is_main:
            self._rotate()
        return True

    def _together(self, action: Callable[[], Any] | None) -> list[Any]:
        """Run `action` -> its results on all processes. Raises OSError on all of them where it failed on one."""
        result, problem = None, None
        try:
            with writing(self.folder):
                result = action() if action is not None else None
        except (OSError, SafetensorError) as error:
            problem = describe(error)
        outcomes = [(result, problem)] * self.accelerator.num_processes
        if self.accelerator.num_processes > 1:
            torch.distributed.all_gather_object(outcomes, (result, problem))
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise OSError(failed if len(outcomes) == 1 else f"process {rank}: {failed}")
        return [result for result, _ in outcomes]

    def describe_last(self) -> str:
        return f"the last good one is {self.last}" if self.last is not None else "there is none yet"

    def _finish(
        self, temporary: Path, target: Path, files: dict[str, dict[str, Any]], position: Position, at_cr: float | None, run_id: str | None
    ) -> None:
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            position=position,
            at_cr=at_cr,
            recipe=self.recipe.model_dump(),
            num_processes=self.accelerator.num_processes,
            run_id=run_id,
            base=self.identity.base,
            frozen=self.identity.frozen,
            data=self.identity.data,
            files=files,
        )
        path = temporary / _MANIFEST
        path.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        _to_disk(path)
        _to_disk(temporary)
        if target.exists():
            # Left by a run that had come further, and was continued from an earlier checkpoint.
            _remove(target)
        temporary.rename(target)
        _to_disk(self.folder)

    def _rotate(self) -> None:
        periodic = [folder for folder in _folders(self.folder) if (read := _manifest(folder)) is None or read.at_cr is None]
        for old in periodic[: -self.recipe.save.keep_last]:
            _remove(old)


def _write_state(
    folder: Path, engine: Engine, parts: Models, gates: dict[str, torch.Tensor], recipe: RetrofitRecipe, base: BaseIdentity, rank: int
) -> list[Path]:
    """This process's files, on disk."""
    stage = recipe.zero.stage
    paths: list[Path] = []
    if stage > 0:
        paths += _write_tree(folder / f"zero_rank{rank}", compat.zero_state(engine.optimizer, stage))
    if rank == 0:
        paths.append(
            checkpoint.save_gates(
                parts.student, folder, base_name=base.name, base_digest=base.hash or "", target_cr=recipe.target_cr, tensors=gates
            )
        )
        # Under ZeRO-3 they are divided, and each process's optimizer state holds its part.
        if stage < 3 and parts.base:
            paths.append(save_tensors({name: p.detach().cpu().contiguous() for name, p in parts.base.items()}, folder / WEIGHTS))
        if stage == 0:
            paths += _write_tree(folder / "optimizer", engine.optimizer.state_dict())
    for path in paths:
        _to_disk(path)
    return paths


def restore(saved: Saved, engine: Engine, parts: Models, recipe: RetrofitRecipe, rank: int) -> None:
    """Put a checkpoint's weights and optimizer state where the run left them."""
    stage = recipe.zero.stage
    if stage < 3:
        tensors, _ = checkpoint.read_gates(saved.folder)
        if (saved.folder / WEIGHTS).is_file():
            tensors |= load_file(saved.folder / WEIGHTS)
        with torch.no_grad():
            for name, parameter in parts.trained.items():
                parameter.copy_(tensors[name])
    if stage == 0:
        engine.optimizer.load_state_dict(_read_tree(saved.folder / "optimizer"))
        return
    compat.load_zero_state(engine.optimizer, stage, _read_tree(saved.folder / f"zero_rank{rank}"))
    compat.replay_adam(engine.optimizer, saved.position.step)


def _whole(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with gathered(parameters.values()):
        return {name: p.detach().float().cpu().clone() for name, p in parameters.items()}


def _write_tree(path: Path, tree: Any) -> list[Path]:
    """Nested dictionaries and lists: tensors into PATH.safetensors, the rest into PATH.json."""
    tensors: dict[str, torch.Tensor] = {}

    def describe(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            # JSON has no integer keys.
            return {"items": [[key, describe(child, f"{name}.{key}")] for key, child in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [describe(child, f"{name}.{number}") for number, child in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")

    described = describe(tree, path.name)
    save_tensors(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(described), encoding="utf-8")
    return [path.with_suffix(".safetensors"), path.with_suffix(".json")]


def _read_tree(path: Path) -> Any:
    tensors = load_file(path.with_suffix(".safetensors"))

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "list" in value:
            return [build(child) for child in value["list"]]
        return {key: build(child) for key, child in value["items"]}

    return build(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def newest(folder: Path, console: Console) -> Saved | None:
    """The run's newest checkpoint whose files all match its manifest. Damaged ones are reported and passed over.

    Raises:
        ValueError: there are checkpoints, and none is good.
    """
    problems: list[tuple[Path, str]] = []
    for candidate in reversed(_folders(folder / FOLDER)):
        if not (candidate / _MANIFEST).exists():
            # Its deletion was interrupted.
            continue
        manifest = _manifest(candidate)
        if manifest is None:
            problems.append((candidate, f"its manifest cannot be read as format {FORMAT_VERSION}"))
        elif (problem := _damage(candidate, manifest)) is not None:
            problems.append((candidate, problem))
        else:
            for path, why in problems:
                console.print(f"[bold red]passing over {path}[/]: {why}", highlight=False)
            return Saved(candidate, manifest)
    if problems:
        named = "; ".join(f"{path}: {why}" for path, why in problems)
        raise ValueError(f"no checkpoint of this run is good ({named}); repair them, or start over with overwrite=true resume=never")
    return None


def at_ratios(folder: Path) -> dict[float, Saved]:
    """The run's good checkpoints that were written because the scheduled ratio got so far, by that ratio."""
    found = {}
    for candidate in _folders(folder / FOLDER):
        manifest = _manifest(candidate)
        if manifest is not None and manifest.at_cr is not None and _damage(candidate, manifest) is None:
            found[float(manifest.at_cr)] = Saved(candidate, manifest)
    return found


def _damage(folder: Path, manifest: Manifest) -> str | None:
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def remove_remains(folder: Path, after: int) -> None:
    """Delete what a process left half-written that was killed while saving, and checkpoints after that step, which were passed over."""
    for path in (folder / FOLDER).glob(".*.new"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _folders(folder / FOLDER):
        if _step(path) > after:
            _remove(path)


def _folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _manifest(folder: Path) -> Manifest | None:
    """None where it is missing, damaged or of another format."""
    try:
        read = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if read["format_version"] != FORMAT_VERSION:
            return None
        known = {field.name: read[field.name] for field in fields(Manifest)}
        return Manifest(**{**known, "position": Position(**read["position"]), "base": BaseIdentity(**read["base"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(folder: Path) -> None:
    # The manifest first: without it a folder is no checkpoint, however far the rest of the deletion gets.
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

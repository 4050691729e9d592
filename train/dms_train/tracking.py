"""Experiment trackers: wandb, TensorBoard or both. A preempted and resumed run is one run there, and no tracker stops a run."""

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dms.doctor import has_wandb_key
from dms.evaluation.stats.rows import describe_device, versions
from dms.report.plots import new_figure
from dms.requirements import explain, missing
from dms_train import compat
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import dump_recipe


def check_trackers(recipe: RetrofitRecipe) -> None:
    """Raises ValueError for a tracker that the recipe asks for and that is not installed."""
    if recipe.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(f"{missing('tracking.tensorboard', 'tensorboard')}, or set tracking.tensorboard=false")


class WandbTracker:
    """One wandb run. Offline, each process of it leaves a part, and wandb sync joins the parts that have one id.

    wandb sync would renumber steps that two parts hold, so steps of an earlier part are not logged again; and curves are drawn over
    `train/step`, which is never renumbered.
    """

    def __init__(self, recipe: RetrofitRecipe, folder: Path, say: Callable[[str], None], run_id: str):
        import wandb

        self.wandb, self.folder, tracking = wandb, folder, recipe.tracking
        asked = tracking.wandb if tracking.wandb != "auto" else "online" if has_wandb_key() else "offline"
        mode: Any = os.environ.get("WANDB_MODE") or asked
        # A dead network must not hold up the end for longer than a scheduler's grace period.
        patience = {"finish_timeout": float(os.environ.get("WANDB_FINISH_TIMEOUT", 60)), "finish_timeout_raises": True}
        start = partial(
            wandb.init,
            id=run_id,
            resume="allow",
            reinit="create_new",  # another run of this process stays what it is
            dir=str(folder),
            name=tracking.name or folder.name,
            **tracking.model_dump(include={"project", "entity", "group", "tags"}),
            config={**recipe.model_dump(), "versions": versions(), "device": describe_device()},
            settings={"silent": True, "console": "off", **compat.prompt_flush(), **patience},
        )
        try:
            self.run = start(mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            say(f"wandb does not answer, the run is tracked offline: {type(error).__name__}: {error}")
            _end_wandb_service()  # it would not give the id out a second time
            self.run = start(mode="offline")
        self.run.define_metric("train/step", hidden=True)
        self.run.define_metric("*", step_metric="train/step")
        # Online, starting_step covers the parts that the server has.
        self.last_step = max([self.run.starting_step - 1, *map(_repair, compat.earlier_parts(self.run, folder))])
        if self.run.offline:
            say(f"wandb is offline; to upload the run, in however many parts: wandb sync {folder}/wandb/offline-run-*")
        elif not self.run.disabled:
            say(f"wandb: {self.run.url}")

    def log(self, step: int, scalars: dict[str, float], heatmap: np.ndarray | None) -> None:
        if step > self.last_step:
            pictures = {} if heatmap is None else {"evicted/heatmap": self.wandb.Image(heatmap)}
            self.run.log({"train/step": step, **scalars, **pictures}, step=step, commit=True)

    def finish(self, step: int, rates: list[list], figures: dict[str, float], rows: list[dict], model_folder: Path) -> None:
        self.run.summary.update(figures)
        columns: list[str | int] = ["policy", "task", "metric", "value", "ci_low", "ci_high"]
        tables = {"results/table": self.wandb.Table(columns, [[row.get(column) for column in columns] for row in rows])}
        if rates:  # none, if the run was resumed at its end
            tables["evicted/table"] = self.wandb.Table(["layer", "head", "rate"], rates)
        self.run.log({"train/step": step, **tables})
        card = self.wandb.Artifact(f"card-{self.run.id}", type="model-card", metadata={"weights": str(model_folder.resolve())})
        for path in (model_folder / "README.md", self.folder / "result.json"):
            card.add_file(str(path), policy="immutable")  # uploaded from here, and not from a copy in the home directory
        self.run.log_artifact(card)
        self.close()

    def close(self, exit_code: int = 0) -> None:
        self.run.finish(exit_code=exit_code)


class TensorBoardTracker:
    """Event files in the run's folder. What an earlier process wrote after the step that is resumed from is void."""

    def __init__(self, recipe: RetrofitRecipe, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=5)
        self.writer.add_text("recipe", f"```yaml\n{dump_recipe(recipe)}```", step)

    def log(self, step: int, scalars: dict[str, float], heatmap: np.ndarray | None) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        if heatmap is not None:
            self.writer.add_image("evicted/heatmap", heatmap, step, dataformats="HWC")

    def finish(self, step: int, rates: list[list], figures: dict[str, float], rows: list[dict], model_folder: Path) -> None:
        self.log(step, figures, None)
        self.writer.add_text("model card", (model_folder / "README.md").read_text(encoding="utf-8"), step)
        self.close()

    def close(self, exit_code: int = 0) -> None:
        self.writer.close()


class Tracker:
    """The trackers that a recipe asks for. One that fails is reported once and left out from then on; nothing here raises."""

    def __init__(self, recipe: RetrofitRecipe, folder: Path, console: Console, run_id: str | None, step: int):
        self.run_id = run_id
        self._say = lambda text: console.print(" ".join(text.split()), highlight=False, markup=False, soft_wrap=True)
        # Pictures: at the first step, the last, and some twenty in between.
        self._drawn = {1, recipe.steps, *range(0, recipe.steps, max(1, recipe.steps // 20))}
        self._last: tuple[int, list[list]] = (step, [])
        self._trackers: dict[str, Any] = {}
        if recipe.tracking.wandb != "off":
            # Made here and not by wandb: checkpoints hold it, whatever happens to wandb.
            wandb_id = self.run_id = run_id or secrets.token_hex(4)
            self._try("wandb", lambda: self._trackers.update(wandb=WandbTracker(recipe, folder, self._say, wandb_id)))
        if recipe.tracking.tensorboard:
            self._try("TensorBoard", lambda: self._trackers.update(TensorBoard=TensorBoardTracker(recipe, folder, step)))

    def log(
        self,
        metrics: dict,
        rate_LH: torch.Tensor,
        layer_indices: list[int],
        windows: Sequence[int] = (),
        class_rate_LHK: torch.Tensor | None = None,
    ) -> None:
        """One step: its metrics, and the share of tokens that each KV head (H) of each gated layer (L, numbered by the list) evicts.

        class_rate_LHK: with several windows the share of tokens that leave by each.
        """
        step, rate_LH = metrics["step"], rate_LH.detach().float().cpu()
        layers = list(zip(layer_indices, rate_LH.tolist(), strict=True))
        self._last = step, [[layer, head, rate] for layer, rates in layers for head, rate in enumerate(rates)]
        scalars = {f"train/{name}": value for name, value in metrics.items() if name != "step" and isinstance(value, int | float)}
        scalars |= {f"evicted/layer{layer}": sum(rates) / len(rates) for layer, rates in layers}
        # The usual failures: heads that evict nothing, and heads that evict everything.
        scalars |= {"evicted/least_head": rate_LH.min().item(), "evicted/most_head": rate_LH.max().item()}
        shares = () if class_rate_LHK is None else class_rate_LHK.detach().float().cpu().unbind(-1)
        for share_LH, window in zip(shares, windows, strict=class_rate_LHK is not None):
            scalars |= {
                f"leave_after_{window}/layer{layer}": share for layer, share in zip(layer_indices, share_LH.mean(1).tolist(), strict=True)
            }
            scalars[f"leave_after_{window}/all"] = share_LH.mean().item()
        self._each(lambda tracker: tracker.log(step, scalars, _draw_heatmap(rate_LH, layer_indices, step) if step in self._drawn else None))

    def finish(self, result: dict, model_folder: Path) -> None:
        """The run ended: the policies' figures, tables, the model card."""
        figures = {f"{policy}/{name}": value for policy, values in result["policies"].items() for name, value in values.items()}
        figures = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.finish(*self._last, figures, result["rows"], model_folder))
        self._trackers.clear()

    def close(self, exit_code: int = 0) -> None:
        """The run stops early and can be resumed as the same run. After `finish`, and a second time, this does nothing."""
        self._each(lambda tracker: tracker.close(exit_code))
        self._trackers.clear()

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(act, tracker))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever ails a tracker, the run goes on
            why = explain(error, "tracking") if isinstance(error, ModuleNotFoundError) else None
            self._say(f"{name} fails, the run goes on without it: {why or f'{type(error).__name__}: {error}'}")
            self._trackers.pop(name, None)
            if name == "wandb":
                _end_wandb_service()


def open_tracker(recipe: RetrofitRecipe, folder: Path, console: Console, *, run_id: str | None, step: int) -> Tracker:
    """On rank 0 only. run_id: what an earlier process of this run kept, None for a new one; step: the last finished one, or 0."""
    return Tracker(recipe, folder, console, run_id, step)


def _repair(path: Path) -> int:
    """The last step in the .wandb file of an earlier process, 0 if none; if offline, it is left such that wandb sync reads it."""
    last, whole, begun = compat.read_part(path)
    # At a part that was killed before it began, or in mid-record, wandb sync stops and leaves the later parts behind.
    if path.parent.name.startswith("offline-"):
        os.truncate(path, whole) if begun else path.rename(path.with_suffix(".void"))
    return last


def _end_wandb_service() -> None:
    """Without this, wandb complains at Python's exit of a service that died."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it exits with the service's exit code
        wandb.teardown()


def _draw_heatmap(rate_LH: torch.Tensor, layer_indices: list[int], step: int) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    num_layers, num_heads = rate_LH.shape
    figure = new_figure(2.2 + min(4.0, 0.2 * num_heads), 1.4 + min(4.0, 0.14 * num_layers))
    axes = figure.add_subplot()
    image = axes.imshow(rate_LH.numpy(), cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    labelled = range(0, num_layers, -(-num_layers // 16))
    axes.set_yticks(labelled, [str(layer_indices[number]) for number in labelled])
    axes.set_xticks(range(0, num_heads, -(-num_heads // 16)))
    axes.set(xlabel="KV head", ylabel="layer", title=f"evicted, step {step}")
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]

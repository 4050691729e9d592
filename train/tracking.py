"""wandb on rank 0: online where a key is configured, offline elsewhere, never in the way of the run."""

import os
from pathlib import Path

import torch
from rich.console import Console

from dms.doctor import has_wandb_key
from dms.train.recipe import RetrofitRecipe


class NoTracker:
    def log(self, metrics: dict, rate_LH: torch.Tensor) -> None: ...

    def finish(self, result: dict) -> None: ...


class WandbTracker(NoTracker):
    def __init__(self, recipe: RetrofitRecipe, folder: Path, mode: str):
        import wandb

        self.run = wandb.init(
            project=recipe.tracking.project,
            name=recipe.tracking.name or folder.name,
            dir=str(folder),
            mode=mode,
            config=recipe.model_dump(),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, metrics: dict, rate_LH: torch.Tensor) -> None:
        rates = {f"evicted/layer{i}/head{h}": float(rate) for i, row in enumerate(rate_LH) for h, rate in enumerate(row)}
        self.run.log({**metrics, **rates}, step=metrics["step"])

    def finish(self, result: dict) -> None:
        for policy, figures in result["policies"].items():
            self.run.summary.update({f"{policy}/{name}": value for name, value in figures.items() if isinstance(value, int | float)})
        self.run.finish()


def open_tracker(recipe: RetrofitRecipe, folder: Path, console: Console) -> NoTracker:
    """The run's tracker; says where an offline run lies and how it is synced."""
    mode = recipe.tracking.wandb
    if mode == "off":
        return NoTracker()
    if mode == "auto":
        mode = "online" if has_wandb_key() else "offline"
    mode = os.environ.get("WANDB_MODE", mode)
    if mode == "offline":
        console.print(f"wandb is offline; to upload the run: wandb sync {folder}/wandb/offline-run-*", highlight=False)
    try:
        return WandbTracker(recipe, folder, mode)
    except Exception as error:  # noqa: BLE001 - whatever ails the tracker, the run goes on
        console.print(f"wandb does not start, the run goes on without it: {type(error).__name__}: {error}", highlight=False, markup=False)
        return NoTracker()

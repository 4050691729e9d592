"""`dms analyze`: finds the configuration of a model or a recipe, analyses its inference, and prints, writes and draws it."""

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedConfig

from dms.config import DMSConfig
from dms.costs import analysis_table as table
from dms.costs import hardware
from dms.costs.analysis import analyze, check
from dms.costs.inference import Machine
from dms.costs.packed_weights import UnknownPacking
from dms.costs.shapes import ModelShape, context_of, measure
from dms.errors import writing
from dms_train.plan_command import read_config
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import load_recipe, packaged_recipes


def run(
    name: str,
    *,
    gpu: str,
    num_gpus: int,
    contexts: list[int],
    batches: list[int],
    ratios: list[float],
    kv_dtypes: list[str],
    window: int | None,
    weight_bits: int | None,
    config: str | None,
    json_file: str | None,
    plot: str | None,
    console: Console,
) -> None:
    """Analyse and print; write the numbers and the picture where files are named. window: None: the recipe's or the model's own.
    weight_bits: None: as the model's configuration has them.

    Raises:
        ValueError: an unknown GPU, model, recipe or configuration, or values that do not go together.
    """
    card = hardware.load().gpu(gpu)
    _check_options(weight_bits, {"--json": json_file, "--plot": plot})
    values, dms = find(name, config)
    check(context_of(values), contexts, ratios, kv_dtypes)
    dms = dms if window is None else replace(dms, window=window)
    found = analyze(
        _measured(values, dms, weight_bits),
        gpu,
        card,
        contexts=contexts,
        batches=batches,
        ratios=ratios,
        dtypes=kv_dtypes,
        machine=Machine(num=num_gpus, weight_bits=weight_bits),
        window=dms.window,
    )
    title = Path(name).stem if name.endswith(".json") else name
    table.show(console, title, found)
    if json_file is not None:
        with writing(json_file):
            Path(json_file).write_text(json.dumps({"name": title, **found.as_dict()}, indent=1), encoding="utf-8")
    if plot is not None:
        from dms.costs.analysis_plot import draw

        with writing(plot):
            draw(found, title, plot)


def _measured(values: PreTrainedConfig, dms: DMSConfig, weight_bits: int | None) -> ModelShape:
    try:
        return measure(values, dms, packed=weight_bits is None)
    except UnknownPacking as error:
        raise ValueError(f"{error}; say with --weight-bits how wide the matrices are, 16, 8 or 4") from None


def _check_options(weight_bits: int | None, files: dict[str, str | None]) -> None:
    if weight_bits not in (None, 4, 8, 16):
        raise ValueError(f"--weight-bits is {weight_bits}; give 16, 8 or 4, or leave it out for what the model's configuration says")
    for option, file in files.items():
        if file is not None and not Path(file).expanduser().parent.is_dir():
            raise ValueError(f"{option} {file}: the folder {Path(file).parent} does not exist; make it, or name another")


def find(name: str, config: str | None) -> tuple[PreTrainedConfig, DMSConfig]:
    """A transformers configuration, and the gates' settings: the recipe's, those that the model was retrofitted with, or the defaults.

    name: a configuration's JSON file, a recipe (a path, or a packaged name), or a model (a folder, a hub id, or a GGUF file).
    """
    if name.endswith(".json"):
        if config is not None:
            raise ValueError(f"{name} is a configuration, and --config {config} names another; leave one out")
        if not Path(name).expanduser().is_file():
            raise ValueError(f"the configuration {name} is not a file")
        return _with_gates(read_config(name, name))
    if name.endswith((".yaml", ".yml")) or name in packaged_recipes():
        recipe = load_recipe(name, [], RetrofitRecipe)
        return read_config(recipe.model, config), recipe.dms
    return _with_gates(read_config(name, config))


def _with_gates(values: PreTrainedConfig) -> tuple[PreTrainedConfig, DMSConfig]:
    saved = getattr(values, "dms", None)
    return values, DMSConfig() if saved is None else DMSConfig.from_saved(saved, "the configuration's dms")

"""`dms plan`: reads a recipe and its model's configuration, plans the run, and prints it."""

import json
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import PreTrainedConfig

from dms.costs import hardware
from dms.costs import plan_table as table
from dms.costs.job import Choice, Job
from dms.costs.packed_weights import FORMS, Packing, packing_of
from dms.costs.plan import Plan, make_plan
from dms.errors import writing
from dms.io import base_models
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import load_recipe, packaged_recipes

EVERY = "all"
# Packaged files that are no retrofits, by the last part of their names.
_OTHERS = ("pretrain", "generate", "evaluate", "compare-gates")


def run(name: str, overrides: list[str], *, gpu: str, num_gpus: int, config: str | None, json_file: str | None, console: Console) -> None:
    """Plan one recipe, or every packaged one (`all`), and print it.

    Raises:
        ValueError: an unknown recipe, GPU or configuration, or a batch that these GPUs cannot share.
    """
    hardware.load().gpu(gpu)
    names = _every() if name == EVERY else [name]
    plans = {one: plan(load_recipe(one, overrides, RetrofitRecipe), gpu=gpu, num_gpus=num_gpus, config=config) for one in names}
    if name == EVERY:
        table.overview(console, plans)
    else:
        table.show(console, name, plans[name])
    if json_file is not None:
        values = {one: made.as_dict() for one, made in plans.items()}
        with writing(json_file):
            Path(json_file).write_text(json.dumps(values if name == EVERY else values[name], indent=1), encoding="utf-8")


def _every() -> list[str]:
    """Packaged recipes that retrofit, but those of GGUF files, which are to be fetched first and run on CPUs."""
    names = [name for name in packaged_recipes() if name.rpartition("/")[2] not in _OTHERS]
    return [name for name in names if not load_recipe(name, [], RetrofitRecipe).model.endswith(".gguf")]


def plan(recipe: RetrofitRecipe, *, gpu: str, num_gpus: int, config: str | None = None) -> Plan:
    """Plan a recipe. config: a config.json, a folder that holds one, or one with a NAME.json for each model; None: the model's own."""
    if recipe.teacher is not None:
        raise ValueError(
            f"teacher is {recipe.teacher}, another model, whose weights and passes dms plan does not count; plan without it (teacher=null) and add its "
            "weights, and a forward pass of it for each sequence"
        )
    values = read_config(recipe.model, config)
    saved_bfloat16, packing = base_models.is_saved_bfloat16(values), packing_for(recipe, values)
    return make_plan(
        build_on_meta(recipe, values),
        job_of(recipe),
        choice_of(recipe),
        saved_bfloat16=saved_bfloat16,
        gpu_name=gpu,
        num_gpus=num_gpus,
        hardware=hardware.load(),
        packing=packing,
    )


def packing_for(recipe: RetrofitRecipe, config: PreTrainedConfig) -> Packing | None:
    """How the recipe's base lies in memory: packed by `quantize`, or as its files are. None: whole.

    Raises:
        ValueError: both, a quantisation whose bytes are not known, or what packed weights rule out.
    """
    if recipe.quantize is not None:
        base_models.check_quantize(recipe.model, config, recipe.quantize)
        return FORMS[recipe.quantize]
    packed = packing_of(config)
    if packed is None:
        return None
    recipe.check_packed(f"model {recipe.model!r} is quantised ({packed.name})", "give the base dequantised")
    return None if packed.until_run else packed


def job_of(recipe: RetrofitRecipe) -> Job:
    return Job(
        trainable=recipe.trainable,
        precision=recipe.precision,
        length=recipe.data.length,
        packed=recipe.data.packs,
        steps=recipe.steps,
        ramp=recipe.ramp,
        target_cr=recipe.target_cr,
        window=recipe.dms.window,
        budget=recipe.budget,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        beta=recipe.beta,
        loss_chunk=recipe.loss_chunk,
        evaluation_length=recipe.evaluation.length or recipe.data.length,
        evaluation_batch_size=recipe.evaluation.batch_size,
        has_teacher_pass=recipe.teacher_cache is None,
        warm_up_steps=0 if recipe.warm_start is None else recipe.warm_start.steps,
        start_cr=recipe.start_cr,
    )


def choice_of(recipe: RetrofitRecipe) -> Choice:
    return Choice(
        stage=recipe.zero.stage,
        offload_optimizer=recipe.zero.offload_optimizer != "none",
        offload_param=recipe.zero.offload_param != "none",
        activation_checkpointing=recipe.activation_checkpointing,
        offload_activations=recipe.offload_activations,
        sequence_parallel=recipe.sequence_parallel,
    )


def read_config(model: str, given: str | None = None) -> PreTrainedConfig:
    """The configuration of a recipe's model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    if given is None or model.startswith(base_models.BUILTIN):
        source = base_models.resolve_model(model)
        if source.gguf is not None:
            return base_models.load_config(model)
        path = source.location
    else:
        path = _config_file(Path(given).expanduser(), model)
    try:
        # From this machine first: without a network the hub is asked again and again.
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - not cached, or broken; the next try says which
        first = error
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        # hub, network, JSON and unknown architectures: each has errors of its own.
        hint = "it is read from the hub where there is a network, or from the hub's cache; or name a config.json with --config"
        raise ValueError(
            f"the configuration of {model!r} cannot be read ({type(error).__name__}; on this machine {type(first).__name__}): {hint}"
        ) from error


def _config_file(path: Path, model: str) -> str:
    if path.is_file():
        return str(path)
    for candidate in (path / "config.json", path / f"{model.rpartition('/')[2]}.json"):
        if candidate.is_file():
            return str(candidate)
    raise ValueError(f"--config {path} is neither a file nor a folder with config.json or {model.rpartition('/')[2]}.json")


def build_on_meta(recipe: RetrofitRecipe, config: PreTrainedConfig) -> nn.Module:
    """The recipe's student without weights, with gates and adapters."""
    import torch

    from dms_train import models
    from dms_train.lora import check_lora

    check_lora(recipe)
    if hasattr(config, "quantization_config"):
        # What is planned of it is in `packing_for`; transformers would ask for the packages that unpack it.
        del config.quantization_config
    with torch.device("meta"):
        model = base_models.auto_class(config).from_config(config)
        models.equip(model, recipe.model_copy(update={"activation_checkpointing": False}))
    return model

"""Checks before a run's first step: that model, data and folder are what the recipe and the checkpoint say."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dms.io import base_models, weights
from dms.io.quantization import is_packed, load_options, quant_method
from dms_train.checkpoints import RunIdentity, Saved
from dms_train.recipe import RetrofitRecipe
from dms_train.run_folder import LOCK_FILE

SHARED_FOLDER_SECONDS = 60.0


def check_context(recipe: RetrofitRecipe) -> Any:
    """The model's configuration.

    Raises:
        ValueError: a GGUF file that is to be divided or packed, packed weights that the recipe cannot have, or documents longer than its context.
    """
    config = base_models.load_config(recipe.model)
    if recipe.zero.stage == 3 and base_models.resolve_model(recipe.model).gguf is not None:
        raise ValueError(
            f"zero.stage 3 divides weights as they are read, and transformers reads a GGUF file whole ({recipe.model}); choose zero.stage=2, or "
            "write it as a folder first: dms.io.base_models.load_base(FILE).save_pretrained(FOLDER), and load_tokenizer(FILE) the same way"
        )
    # Before weights or data are read: packages that are missing, and forms that do not go together.
    base_models.check_quantize(recipe.model, config, recipe.quantize)
    load_options(config, quantize=recipe.quantize)
    if is_packed(config):
        recipe.check_packed(f"model {recipe.model!r} is quantised ({quant_method(config)})", "give the base dequantised")
    context = config.get_text_config().max_position_embeddings
    if (recipe.evaluation.length or 0) > context:
        raise ValueError(
            f"evaluation.length is {recipe.evaluation.length} and the context of {recipe.model} is {context} tokens; shorten it"
        )
    if recipe.data.length > context:
        raise ValueError(f"data.length is {recipe.data.length} and the context of {recipe.model} is {context} tokens; shorten the data")
    if recipe.data.length + recipe.trial.position_jump > context:
        raise ValueError(
            f"trial.position_jump is {recipe.trial.position_jump}, data.length {recipe.data.length}, and the context of {recipe.model} "
            f"{context} tokens; jump by at most {context - recipe.data.length}"
        )
    return config


def base_hash(recipe: RetrofitRecipe) -> str | None:
    """Of the model's files; None where they are still to be fetched from the hub."""
    found = base_models.local_weights(recipe.model)
    return None if found is None else weights.base_hash(found)


def check_alike(marks: Sequence[object], where: str) -> None:
    """Raises ValueError where processes read different data. marks: by process, equal where they read the same."""
    if len(set(marks)) > 1:
        odd = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        raise ValueError(
            f"{where}: processes {', '.join(map(str, odd))} read other data than process 0; all nodes need the same files, and with "
            "data.bad_shards: skip each must be able to read the same ones"
        )


def check_alike_everywhere(accelerator: Accelerator, digest: str) -> None:
    """All processes call it together. Raises as `check_alike`."""
    if accelerator.num_processes > 1:
        digests = [""] * accelerator.num_processes
        torch.distributed.all_gather_object(digests, digest)
        check_alike(digests, "at the start")


def check_same(saved: Saved, now: RunIdentity) -> None:
    """Raises ValueError where the weights or the data are not those that a checkpoint's run began with."""
    then = saved.manifest
    if then.base.hash != now.base.hash or then.frozen != now.frozen:
        raise ValueError(
            f"{saved.folder} was trained on other weights than {now.base.name} has (hash and fingerprint {then.base.hash} "
            f"{then.frozen} then, {now.base.hash} {now.frozen} now); give the base that the run began with"
        )
    if then.data != now.data:
        raise ValueError(
            f"{saved.folder} was trained on other data than this recipe now gives: the files, the tokenizer or, for builtin, Python changed; "
            "give the data that the run began with, or start over with overwrite=true resume=never"
        )


def check_shared(folder: Path, mark: str) -> None:
    """Raises ValueError where this process does not see the folder that the first one made. mark: what its lock file holds."""
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (folder / LOCK_FILE).is_file() or (folder / LOCK_FILE).read_text(encoding="utf-8") != mark:
        if time.monotonic() > deadline:
            raise ValueError(f"output_dir '{folder}' is not seen by all processes; choose a folder on a file system that all nodes share")
        # Network file systems cache for a while that a file does not exist.
        time.sleep(1.0)


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run `action` on the first process; all get its result, or its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        if not accelerator.is_main_process:
            # The first process reports it for all, and ends first.
            time.sleep(2.0)
            raise SystemExit(2)
        raise outcome[1]
    return outcome[0]

"""Low-rank adapters (`trainable: gates+lora`): put in by peft, off in the teacher's pass, merged into the weights at the end."""

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from dms.modes import state_of
from dms.requirements import missing
from dms.training.sharding import gathered
from dms_train import compat

if TYPE_CHECKING:
    from dms_train.recipe import RetrofitRecipe


def check_lora(recipe: "RetrofitRecipe") -> None:
    """Raises ValueError where adapters are asked for and peft is not installed."""
    if recipe.trainable != "gates+lora":
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(f"{missing('trainable: gates+lora', 'peft')}, or choose trainable=gates") from None


def add_adapters(student: nn.Module, recipe: "RetrofitRecipe") -> None:
    """Put LoRA beside the student's linear layers (arXiv 2106.09685): they begin without effect, and train in float32.

    Raises:
        ValueError: target modules that the model does not have.
    """
    from peft import LoraConfig

    from dms_train.recipe import Lora

    lora = recipe.lora or Lora()
    decoder = state_of(student).decoder
    # Routers of some mixtures of experts are linear layers that return more than their product (Llama 4).
    routers = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear) and _is_of_one_family(module)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, and used as a factor
        lora_dropout=0.0,
        target_modules=lora.target_modules or "all-linear",
        exclude_modules=None if lora.target_modules else routers,
    )
    # Adapters are initialised at random: with the recipe's seed, alike on every process.
    torch.manual_seed(recipe.seed)
    try:
        # The text decoder alone: of a multimodal model, what reads images is left out.
        compat.add_lora(decoder, config)
    except ValueError as error:
        raise ValueError(f"lora.target_modules {lora.target_modules}: {error}") from None
    for _, module in compat.lora_layers(student):
        for part in (module.lora_A, module.lora_B):
            part.float()


def _is_of_one_family(module: nn.Module) -> bool:
    """Its class is a modelling file's own."""
    return type(module).__module__.startswith("transformers.models.")


@contextmanager
def without_adapters(model: nn.Module):
    """The base as it was, for the teacher's pass."""
    found = [module for _, module in compat.lora_layers(model)]
    for module in found:
        compat.switch_lora(module, False)
    try:
        yield
    finally:
        for module in found:
            compat.switch_lora(module, True)


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters' products to the weights that they adapt, in place, and take the adapters out."""
    for name, module in list(compat.lora_layers(model)):
        with gathered(module.parameters(), modify=True):
            module.merge()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], module.get_base_layer())

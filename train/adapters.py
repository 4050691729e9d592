"""Low-rank adapters (`trainable: gates+lora`): put in by peft, off in the teacher's pass, merged into the weights at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from dms.requirements import missing
from dms.sharding import gathered

if TYPE_CHECKING:
    from dms.train.recipe import RetrofitRecipe


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
    from peft import LoraConfig, inject_adapter_in_model

    from dms.train.recipe import Lora

    lora = recipe.lora or Lora()
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=lora.target_modules or "all-linear")
    # Adapters are drawn at random: by the recipe's seed, the same on every process.
    torch.manual_seed(recipe.seed)
    try:
        # Of a multimodal model, not what reads images.
        inject_adapter_in_model(config, student.dms.decoder)
    except ValueError as error:
        raise ValueError(f"lora.target_modules {lora.target_modules}: {error}") from None
    for _, module in adapters(student):
        for part in (module.lora_A, module.lora_B):
            part.float()


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold adapters, with their names."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


@contextmanager
def without_adapters(model: nn.Module):
    """The base as it was, for the teacher's pass. peft's own switch would also stop the adapters' gradients."""
    found = [module for _, module in adapters(model)]
    for module in found:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in found:
            module._disable_adapters = False


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters' products to the weights that they adapt, in place, and take the adapters out."""
    for name, module in list(adapters(model)):
        with gathered(module.parameters(), modify=True):
            module.merge()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], module.get_base_layer())

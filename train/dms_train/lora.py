"""Low-rank adapters (`trainable: gates+lora`): put in by peft, off in the teacher's pass, merged into the weights at the end."""

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dms.io.quantization import is_packed, packed_modules
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


def add_adapters(student: nn.Module, recipe: "RetrofitRecipe", apart: Sequence[nn.Module] = ()) -> None:
    """Put LoRA beside the student's linear layers (arXiv 2106.09685): they begin without effect, and train in float32.

    apart: parts of the decoder that get none.

    Raises:
        ValueError: target modules that the model does not have.
    """
    from peft import LoraConfig

    from dms_train.recipe import Lora

    lora = recipe.lora or Lora()
    decoder = state_of(student).decoder
    # Routers of some mixtures of experts are linear layers that return more than their product (Llama 4).
    routers = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear) and _is_of_one_family(module)]
    inside = {module for part in apart for module in part.modules()}
    others = [name for name, module in decoder.named_modules() if module in inside and isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, and used as a factor
        lora_dropout=0.0,
        target_modules=lora.target_modules or "all-linear",
        exclude_modules=others + ([] if lora.target_modules else routers) or None,
    )
    # Adapters are initialised at random: with the recipe's seed, alike on every process.
    torch.manual_seed(recipe.seed)
    # peft warns that it could not merge adapters into torchao's weights; they are merged into unpacked ones.
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without", category=UserWarning)
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
    """Add the adapters' products to the weights that they adapt, in place, and take the adapters out.

    A base with packed weights becomes an ordinary one: rounded again to a few bits, its weights would lose most of what adapters add.
    """
    found = list(compat.lora_layers(model))
    if found and is_packed(model.config):
        _unpack(model)
        return
    for name, module in found:
        with gathered(module.parameters(), modify=True):
            module.merge()
        _replace(model, name, module.get_base_layer())


@torch.no_grad()
def _unpack(model: Any) -> None:
    """Make packed linear layers ordinary ones, with what their adapters add, in the dtype of the other weights."""
    adapted = dict(compat.lora_layers(model))
    layers = {id(module.get_base_layer()): name for name, module in adapted.items()}
    for name, module in packed_modules(model).items():
        dense = _dense(module, model.device, model.dtype)
        where = layers.get(id(module))
        if where is not None:
            dense.weight += compat.lora_product(adapted[where]).to(dense.weight)
        _replace(model, name if where is None else where, dense)
    for name, module in compat.lora_layers(model):
        module.merge()
        _replace(model, name, module.get_base_layer())
    compat.forget_quantization(model)


def _dense(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A linear layer with the weight that a packed one computes with: what it makes of unit vectors, less what it makes of zeros."""
    if isinstance(module, nn.Embedding):
        rows = module(torch.arange(module.num_embeddings, device=device)).to(dtype)
        return nn.Embedding.from_pretrained(rows, padding_idx=module.padding_idx)
    module.train()
    bias = module(torch.zeros(1, module.in_features, device=device, dtype=dtype))
    units = torch.eye(module.in_features, device=device, dtype=dtype).split(1024)
    weight = torch.cat([module(part) - bias for part in units]).T.contiguous()
    dense = nn.Linear(module.in_features, weight.shape[0], bias=module.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(bias[0].clone(), requires_grad=False)
    return dense


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

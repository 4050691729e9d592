"""The models of a run: the student with its gates and what trains of it, and the frozen teacher where it is another model."""

from dataclasses import dataclass

import torch
from torch import nn

from dms.io import base_models as models
from dms.modes import enable_checkpointing
from dms.retrofitting import gate_parameters, retrofit
from dms_train import compat
from dms_train.lora import add_adapters
from dms_train.recipe import RetrofitRecipe


@dataclass(frozen=True)
class Models:
    """teacher: None where it is the student's frozen base, or read from a cache. trained: names and parameters of everything that trains, gates first, named as in gates.safetensors."""

    student: nn.Module
    teacher: nn.Module | None
    trained: dict[str, nn.Parameter]
    num_gates: int

    @property
    def gates(self) -> list[nn.Parameter]:
        return list(self.trained.values())[: self.num_gates]

    @property
    def trained_ids(self) -> set[int]:
        return {id(p) for p in self.trained.values()}

    @property
    def others(self) -> list[nn.Parameter]:
        return list(self.trained.values())[self.num_gates :]


def held_dtype(recipe: RetrofitRecipe, saved: torch.dtype) -> str:
    """Weights that train stay in float32; frozen ones are held as they are computed with, if that loses nothing."""
    frozen = recipe.trainable != "all"
    return "bfloat16" if frozen and recipe.precision == "bf16" and saved == torch.bfloat16 else "float32"


def build(recipe: RetrofitRecipe, saved: torch.dtype, device: str) -> Models:
    """Load, attach gates and adapters, and freeze the rest.

    Raises:
        ValueError: a model that cannot be loaded or retrofitted, LoRA without peft, or target modules that it does not have.
    """
    student = models.load_base(recipe.model, held_dtype(recipe, saved), device=device)
    teacher = None
    if recipe.trainable == "all" and recipe.teacher_cache is None:
        teacher = models.load_base(recipe.model, "float32", device=device).requires_grad_(False)
    return Models(student, teacher, *equip(student, recipe))


def equip(student: nn.Module, recipe: RetrofitRecipe) -> tuple[dict[str, nn.Parameter], int]:
    """Attach gates and adapters, freeze the rest, and make ready to train: what trains, gates first, and how many they are."""
    student.config.use_cache = False
    retrofit(student, recipe.dms)
    student.dms.trained_length = recipe.data.length
    if recipe.trainable == "gates+lora":
        add_adapters(student, recipe)
    # train() switches activation checkpointing on; distillation wants no dropout.
    student.train()
    compat.switch_off_dropout(student)
    if recipe.activation_checkpointing:
        enable_checkpointing(student)
        student.dms.offload_activations = recipe.offload_activations

    gates = gate_parameters(student)
    gate_ids = {id(p) for p in gates.values()}
    # Of a multimodal model text passes through its decoder and head alone.
    used = {id(p) for part in (student.dms.decoder, student.get_output_embeddings()) for p in part.parameters()}
    others = {}
    for name, parameter in student.named_parameters():
        wanted = recipe.trainable == "all" or id(parameter) in gate_ids or (recipe.trainable == "gates+lora" and ".lora_" in name)
        trains = wanted and id(parameter) in used
        parameter.requires_grad_(trains)
        if trains and id(parameter) not in gate_ids:
            others[name] = parameter
    return {**gates, **others}, len(gates)

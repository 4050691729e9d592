"""The models of a run: the student with its gates, what trains of it, and the frozen teacher where that is another model."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dms.borrowed import channels, query_projection
from dms.io import base_models
from dms.io.checkpoint import is_borrowed, structure_of_base
from dms.io.gates_file import check_base, check_shapes, read_config, read_gates
from dms.io.quantization import check_gradients, is_packed, packed_modules, packed_tensors, quant_method
from dms.io.vocabulary import num_embeddings
from dms.layer_discovery import NOT_CALLED
from dms.lm_head import find_head
from dms.modes import state_of
from dms.retrofitting import gate_parameters, retrofit
from dms.training.activation_checkpointing import enable_checkpointing
from dms.training.sharding import gathered
from dms_train import compat
from dms_train.lora import add_adapters
from dms_train.recipe import RetrofitRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Models:
    """Student and teacher of a run, and the parameters that train."""

    student: "PreTrainedModel"
    teacher: "PreTrainedModel | None"
    """None where the teacher is the student's own frozen base, or is read from a cache. A copy of the base, or what the recipe names."""
    gates: dict[str, nn.Parameter]
    """By their names in gates.safetensors."""
    base: dict[str, nn.Parameter]
    """What trains beside the gates, by name: the base's weights, or the adapters on them. Empty where the base is frozen."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that trains, gates first: the order of the optimizer's groups."""
        return {**self.gates, **self.base}

    @property
    def trained_ids(self) -> set[int]:
        return {id(p) for p in self.trained.values()}

    def frozen_fingerprint(self) -> "Fingerprint":
        """Of the student's parameters that do not train, to tell whether one of them changed. Under ZeRO-3 every process calls it."""
        return fingerprint(self.student, skip=self.trained_ids)


def held_dtype(recipe: RetrofitRecipe, saved: torch.dtype) -> str:
    """Weights that train stay in float32; frozen ones are held in the dtype of the computation, if that loses nothing."""
    frozen = recipe.trainable != "all"
    return "bfloat16" if frozen and recipe.precision == "bf16" and saved == torch.bfloat16 else "float32"


def build(recipe: RetrofitRecipe, saved: torch.dtype, device: str) -> Models:
    """Load, attach gates and adapters, and freeze the rest.

    Raises:
        ValueError: a model that cannot be loaded or retrofitted, one whose gates are borrowed, packed weights through which no gradient passes, LoRA without peft, or
            target modules that it does not have, or a teacher of another vocabulary.
    """
    for name in filter(None, (recipe.model, recipe.teacher)):
        if is_borrowed(name):
            raise ValueError(
                f"the gates of {name} are channels of its weights, without which it is another model: it cannot be a run's base or teacher; name the "
                "model that it was made from"
            )
    student = base_models.load_base(recipe.model, held_dtype(recipe, saved), device=device, quantize=recipe.quantize)
    check_packed(recipe, student)
    teacher = None
    if recipe.teacher is not None:
        teacher = load_teacher(recipe, student, device)
    elif recipe.trainable == "all" and recipe.teacher_cache is None:
        teacher = base_models.load_base(recipe.model, "float32", device=device).requires_grad_(False)
    gates, base = equip(student, recipe)
    if recipe.gates is not None:
        start_from(gates, recipe.gates.path, recipe)
    return Models(student, teacher, gates, base)


def check_packed(recipe: RetrofitRecipe, student: "PreTrainedModel") -> None:
    """Raises ValueError where gradients do not pass through packed weights, or where they are not packed once they are loaded."""
    name, config = f"model {recipe.model!r}", base_models.load_config(recipe.model)
    if is_packed(config) and not packed_modules(student):
        raise ValueError(
            f"{name} is quantised ({quant_method(config)}), and transformers unpacks it on this machine, so that gates would train on other weights "
            "than its files hold: FP8, for one, is computed with on GPUs of compute capability 8.9 or later alone. Run it there; or load it with "
            "AutoModelForCausalLM.from_pretrained, write that with save_pretrained, and give that folder"
        )
    check_gradients(student, name)


def equip(student: "PreTrainedModel", recipe: RetrofitRecipe) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Attach gates and adapters, freeze the rest, and prepare for training -> (the gates, what else trains), as in `Models`."""
    student.config.use_cache = False
    retrofit(student, recipe.dms)
    if recipe.dms.is_borrowed:
        start_borrowed(student)
    state = state_of(student)
    state.trained_length, state.budget = recipe.data.length, recipe.budget
    apart = not_called(student)
    if recipe.trainable == "gates+lora":
        add_adapters(student, recipe, apart=apart)
    # train() switches activation checkpointing on; distillation wants no dropout.
    student.train()
    compat.switch_off_dropout(student)
    if recipe.activation_checkpointing:
        enable_checkpointing(student)
        state.offload_activations = recipe.offload_activations

    gates = gate_parameters(student)
    gate_ids = {id(p) for p in gates.values()}
    # Of a multimodal model text passes through its decoder and head alone, and not through all of the decoder.
    used = {id(p) for part in (state.decoder, student.get_output_embeddings()) for p in part.parameters()}
    used -= {id(p) for part in apart for p in part.parameters()}
    base = {}
    for name, parameter in student.named_parameters():
        wanted = recipe.trainable == "all" or id(parameter) in gate_ids or (recipe.trainable == "gates+lora" and ".lora_" in name)
        trains = wanted and id(parameter) in used
        parameter.requires_grad_(trains)
        if trains and id(parameter) not in gate_ids:
            base[name] = parameter
    return gates, base


def load_teacher(recipe: RetrofitRecipe, student: "PreTrainedModel", device: str) -> "PreTrainedModel":
    """The model that `teacher` names, frozen.

    Raises:
        ValueError: another vocabulary, or a head that scales or caps its logits in another way.
    """
    assert recipe.teacher is not None, "a recipe that names no teacher has none to load"
    tokens, theirs = (base_models.load_tokenizer(name).get_vocab() for name in (recipe.model, recipe.teacher))
    config = base_models.load_config(recipe.teacher)
    num_rows = (num_embeddings(student.config), num_embeddings(config))
    if tokens != theirs or num_rows[0] != num_rows[1]:
        raise ValueError(
            f"teacher {recipe.teacher} has another vocabulary than {recipe.model} ({len(theirs):,} tokens and {num_rows[1]:,} logits against "
            f"{len(tokens):,} and {num_rows[0]:,}); choose a teacher of the same, such as a larger model of the family"
        )
    half = recipe.precision == "bf16" and base_models.is_saved_bfloat16(config)
    teacher = base_models.load_base(recipe.teacher, "bfloat16" if half else "float32", device=device).requires_grad_(False)
    if find_head(teacher) != find_head(student):
        raise ValueError(
            f"teacher {recipe.teacher} computes its logits as {find_head(teacher)}, and {recipe.model} as {find_head(student)}"
        )
    return teacher


# What gates' logits and decisions mean; the window may be another, as many, and so may tau and sinks.
_KEPT = ("gate", "granularity", "alignment", "scale", "offset")


@torch.no_grad()
def start_from(gates: dict[str, nn.Parameter], path: str, recipe: RetrofitRecipe) -> None:
    """Give gates the values of a folder's. Under ZeRO-3 every process calls it.

    Raises:
        ValueError: no gates there, of another model, or such as decide in another way than the recipe's.
    """
    tensors, metadata = read_gates(path)
    found = read_config(metadata, None, path)
    different = [name for name in _KEPT if getattr(found, name) != getattr(recipe.dms, name)]
    if different or len(found.windows) != len(recipe.dms.windows):
        name = different[0] if different else "window"
        raise ValueError(
            f"gates.path {path}: its gates have {name} {getattr(found, name)!r}, and dms.{name} is {getattr(recipe.dms, name)!r}; of these settings the "
            f"recipe keeps what they were trained with ({', '.join(_KEPT)}, and the number of windows)"
        )
    other = check_base(
        base_models.local_weights(recipe.model),
        metadata,
        recipe.model,
        form=recipe.quantize,
        other_base=True,
        structure=lambda: structure_of_base(recipe.model),
    )
    if other is not None:
        warnings.warn(str(other), stacklevel=2)
    with gathered(gates.values(), modify=True):
        check_shapes("the model", gates, tensors, path)
        for name, parameter in gates.items():
            parameter.copy_(tensors[name])


@torch.no_grad()
def start_borrowed(student: nn.Module) -> None:
    """Let borrowed gates start where linear ones do: with rows and biases of 0, and so with the logit `-offset`.

    What the rows computed is lost to attention whatever they hold; as they are, they would evict at random.
    """
    for layer in state_of(student).layers:
        projection = query_projection(layer)
        with gathered(projection.parameters(), modify=True):
            for parameter in projection.parameters():
                if parameter.numel():
                    parameter[channels(layer)].zero_()


def not_called(student: nn.Module) -> list[nn.Module]:
    """Parts of a retrofitted model's decoder that text does not pass through: cross-attention, or the layers that attend in no other way."""
    state = state_of(student)
    others = [layer.name for layers in (state.layers, state.following) for layer in layers]
    others += [name for name, why in state.skipped.items() if why != NOT_CALLED]
    found = []
    for name, why in state.skipped.items():
        part, around = name, name.rpartition(".")[0]
        while why == NOT_CALLED and not (
            isinstance(student.get_submodule(around), nn.ModuleList) or any(other.startswith(f"{around}.") for other in others)
        ):
            part, around = around, around.rpartition(".")[0]
        if why == NOT_CALLED:
            found.append(student.get_submodule(part))
    return found


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """Two position-weighted sums of every tensor's bits, by name: exact, and cheap on any device."""

    sums: dict[str, tuple[int, int]]

    @property
    def digest(self) -> str:
        """The same for the same weights, however they are divided among processes."""
        return hashlib.sha256(json.dumps(sorted(self.sums.items())).encode()).hexdigest()[:32]

    def differing(self, other: "Fingerprint") -> list[str]:
        return sorted(name for name in self.sums.keys() | other.sums.keys() if self.sums.get(name) != other.sums.get(name))


@torch.no_grad()
def fingerprint(model: nn.Module, skip: set[int]) -> Fingerprint:
    """Fingerprint all parameters but those whose id() is in `skip`, and what packed modules hold. Under ZeRO-3 every process calls it."""
    packed = packed_modules(model)
    held = {name: p for name, p in model.named_parameters() if id(p) not in skip and name.rpartition(".")[0] not in packed}
    sums = {}
    for name, tensor in (held | packed_tensors(model)).items():
        with gathered([tensor]):
            sums[name] = _sums(tensor.detach())
    return Fingerprint(sums)


def _sums(tensor: torch.Tensor) -> tuple[int, int]:
    bits = tensor.contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    # Integer sums wrap and are exact in any order.
    weighted = sum(int((part.long() * (torch.arange(part.numel(), device=part.device) % 65_521 + 1)).sum()) for part in bits.split(1 << 24))
    return int(bits.sum(dtype=torch.int64)), weighted

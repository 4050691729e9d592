"""Save and load retrofitted models: a Hugging Face folder with gates beside its weights, or the gates alone.

A model folder is an ordinary one plus `gates.safetensors` (float32, `layers.{i}.gate.*`) and `config.json["dms"]`. Where dms is not
installed, it loads as the dense model.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dms import hf_compat
from dms.io.base_models import auto_class, load_base, load_config, local_weights, processor_files, refuse_unimported, resolve_model
from dms.io.device_map import DeviceMap
from dms.io.gates_file import (
    OtherBase,
    attach,
    check_base,
    gate_names,
    gate_tensors,
    read_config,
    read_gates,
    save_beside_files,
    save_pretrained,
    set_gates,
    structure_of,
    write_gates,
)
from dms.io.quantization import packed_modules, quant_method
from dms.io.weights import GATES_FILE, Structure
from dms.modes import Mode, set_mode, state_of
from dms.placement import onloaded
from dms.training.sharding import gathered, is_sharded


@dataclass(frozen=True)
class Weights:
    """A model's weights, whole and on the CPU. Tensors that the model ties are one object here."""

    base: dict[str, torch.Tensor]
    """By their names in the model."""
    gates: dict[str, torch.Tensor]
    """By their names in gates.safetensors, in float32."""


@torch.no_grad()
def collect(model: nn.Module, dtype: torch.dtype | None = None, keep: bool = True) -> Weights:
    """Gather a model's weights in `dtype` (None: as they are; packed ones stay as they are). Under ZeRO-3 every process calls it; with
    keep=False it returns nothing."""
    gates = gate_names(model)
    packed = tuple(f"{name}." for name in packed_modules(model))
    # One converted tensor for each original: save_pretrained recognises tied weights by their storage.
    converted: dict[int, torch.Tensor] = {}
    weights = Weights({}, {})
    for name, tensor in onloaded(model, model.state_dict(keep_vars=True)).items():
        with gathered([tensor]):
            if not keep:
                continue
            if name in gates:
                weights.gates[gates[name]] = tensor.detach().float().cpu().contiguous().clone()
                continue
            if id(tensor) not in converted:
                casts = dtype is not None and tensor.is_floating_point() and not name.startswith(packed)
                cast = tensor.detach().to(dtype) if casts else tensor.detach()
                # Of a divided tensor only this copy is whole afterwards.
                converted[id(tensor)] = cast.cpu().clone() if is_sharded(tensor) else cast.cpu()
            weights.base[name] = converted[id(tensor)]
    return weights


def save(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    base_name: str,
    target_cr: float | None = None,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    packed_files: Path | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a model folder: weights in `dtype` (None: as they are), gates in float32, tokenizer, configuration.

    What prepares images for a multimodal model is copied from where the model was loaded from.

    base_name: of the model that was retrofitted. weights: what `collect` returned; None: collected here. packed_files: the folder that
    the packed weights came from, whose files are copied, whatever their format; None: they are written as the model holds them. max_shard_size: of a file of weights, as "2GB"; None: as of `gates_file.save_pretrained`. Of a model
    with a device_map no more than one file's weights are in memory at once, unless a dtype is given: then all of them.

    Raises:
        ValueError: a model without gates, or one that `save_pretrained` refuses.
    """
    folder = Path(folder)
    state_of(model)
    if weights is None and dtype is not None:
        weights = collect(model, dtype)
    origin = getattr(model, "dms_origin", {})
    model.dms_origin = {**origin, "base_name": base_name, "target_cr": target_cr}
    sizes: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if packed_files is not None:
        save_beside_files(model, folder, packed_files, gates=None if weights is None else weights.gates)
    elif weights is None:
        save_pretrained(model, folder, **sizes)
    else:
        save_pretrained(model, folder, state_dict=weights.base, gates=weights.gates, **sizes)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _copy_processor(hf_compat.loaded_from(model.config), folder)
    return folder


def _copy_processor(name: str, folder: Path) -> None:
    try:
        files = processor_files(name) if name else []
    except ValueError:
        # The folder that it was loaded from is no longer there.
        return
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)


def load_gates(model: nn.Module, folder: str | Path) -> None:
    """Give a retrofitted model the gates of a folder, in place: transformers' Trainer leaves them out where it resumes from a checkpoint.

    Raises:
        ValueError: no gates there, or of another configuration, names or shapes than the model's.
    """
    tensors, metadata = read_gates(folder)
    config = read_config(metadata, None, folder)
    if config != state_of(model).config:
        raise ValueError(f"{folder} holds gates of another configuration, {config}; the model has {state_of(model).config}")
    set_gates(model, tensors, folder)


def save_gates(
    model: nn.Module,
    folder: str | Path,
    *,
    base_name: str,
    base_digest: str,
    target_cr: float | None,
    base_form: str | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `gates.safetensors` alone; its metadata names the base and holds the DMSConfig.

    base_digest: the base's hash. base_form: how it was packed when it was loaded, such as "nf4"; None: as its files are. tensors: the gates' values by name, where the model does not hold them whole (ZeRO-3).
    """
    tensors = gate_tensors(model) if tensors is None else tensors
    state = state_of(model)
    return write_gates(
        folder,
        tensors,
        state.config,
        base_name=base_name,
        base_digest=base_digest,
        target_cr=target_cr,
        trained_length=state.trained_length,
        base_structure=structure_of(model),
        base_form=base_form,
        trained_on=getattr(model, "dms_origin", {}).get("trained_on"),
    )


def load(
    path: str | Path,
    *,
    base: str | None = None,
    other_base: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    mode: Mode = "evict",
    evict_bias: float = 0.0,
    window: int | Sequence[int] | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """A retrofitted model in evict mode, for `generate`, pipelines and lm-eval.

    path: a model folder, or gates alone together with `base` (a folder, a hub id or a GGUF file). other_base: the weights may be another
    form of the model that the gates were trained on, of equal names and shapes (from another place, in another dtype, quantised or
    dequantised); a warning then says which is used. A base that was packed for training, such as "nf4", is packed again, and with other_base
    it is not. evict_bias is added to every logit: above 0 evicts more than was trained, below 0 less.
    window: in tokens, in place of what the gates were trained with and as many, such as windows in proportion for longer texts.
    device_map, max_memory, offload_folder: as of `load_base`, for weights that do not fit on the device: "auto" fills the GPU, then host memory,
    then the disk. Gates, and what the cache holds, are where their layer computes. For evict and dense mode.

    Raises:
        ValueError: no such folder, no gates in it, gates of another base, an unknown format, damaged files, windows that do not fit, or a
            device_map that cannot be followed.
    """
    if device_map is not None and mode not in ("evict", "dense"):
        raise ValueError(
            f"mode is {mode!r} and device_map was given; weights that are brought for each use do not train: leave device_map out"
        )
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{folder} is no folder on this machine; name one that `dms retrofit` wrote, such as RUN/model")
    if not (folder / GATES_FILE).is_file() and (folder / "config.json").is_file():
        refuse_unimported(str(folder), json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
    tensors, metadata = read_gates(folder)
    name = base if base is not None else str(folder)
    in_config = None
    if base is None and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds gates alone, trained on {metadata.get('base_name')!r}; give that model as base=... (--base)")
    if base is None:
        in_config = json.loads((folder / "config.json").read_text()).get("dms")
    config = read_config(metadata, in_config, folder)
    if window is not None:
        config = config.with_window(window)
    # From the hub, its files may be on this machine only after loading.
    is_here = local_weights(name) is not None
    form = _form(name, metadata, other_base)
    other = _check_base(name, metadata, form, other_base) if is_here else None
    placing: Any = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    model = load_base(name, dtype, device, quantize=form, **placing)
    if not is_here:
        other = _check_base(name, metadata, form, other_base)
    attach(model, config, tensors, metadata, folder, other)
    set_mode(model, mode)
    model.dms.evict_bias = evict_bias
    return model


def is_borrowed(name: str) -> bool:
    """Whether a model is a retrofitted folder whose gates are channels of its weights: without its gates it is another model."""
    saved = getattr(load_config(name), "dms", None)
    return isinstance(saved, dict) and saved.get("gate", "linear") != "linear"


def _form(name: str, metadata: dict[str, Any], other_base: bool) -> str | None:
    """How the base is to be packed: as when the gates were trained, unless it cannot be (it is quantised already, or a GGUF file), or is meant
    to be another form."""
    form = metadata.get("base_form")
    return None if other_base or form is None or resolve_model(name).gguf is not None or quant_method(load_config(name)) else form


def _check_base(name: str, metadata: dict[str, Any], form: str | None, other_base: bool) -> OtherBase | None:
    return check_base(local_weights(name), metadata, name, form=form, other_base=other_base, structure=lambda: structure_of_base(name))


def structure_of_base(name: str) -> Structure:
    """Of the base of that name, from its configuration alone."""
    config = load_config(name)
    return Structure.of(auto_class(config).from_config, config)

"""What `save_pretrained` of a retrofitted model writes: the base's folder, the gates beside it, and nothing of ours among the weights."""

from collections.abc import Mapping
from pathlib import Path

import torch

from dms import hf_compat
from dms.io.files import follow_umask
from dms.io.gates_file import gate_tensors, write_gates
from dms.io.weights import base_hash, refuse_quantized, weight_files, write_index
from dms.modes import state_of
from dms.retrofitting import set_mode

# Options of transformers' that write weights where nobody looks for them together with gates, or before the gates are there.
_REFUSED = {
    "push_to_hub": "would upload the model without its gates; call model.push_to_hub(...)",
    "variant": "writes weights under a name that dms.load does not read; leave it out, and choose another folder",
    "distributed_checkpoint": "writes weights in parts that no gates can lie beside; leave it out",
}


@torch.no_grad()
def save_pretrained(
    model,
    folder: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *,
    gates: Mapping[str, torch.Tensor] | None = None,
    **options,
) -> None:
    """As transformers' own, with gates.safetensors, `config.json["dms"]`, and an index that leaves the gates out.

    state_dict: the weights, and perhaps the gates, under their modules' names; None: the model's. gates: by their names in
    gates.safetensors; None: those of state_dict, or the model's. options: transformers'.

    Raises:
        ValueError: a quantised model, adapters that are not merged, weights that are not here, or an option that gates cannot follow.
    """
    _refuse(model, options)
    state = state_of(model)
    own = gate_names(model)
    given = dict(model.state_dict() if state_dict is None else state_dict)
    found = onloaded(model, {name: given.pop(name) for name in own if name in given})
    if gates is None:
        gates = {own[name]: tensor.float().cpu().contiguous() for name, tensor in found.items()} or gate_tensors(model)
    if is_main_process and any(tensor.numel() == 0 for tensor in gates.values()):
        raise ValueError(
            f"the weights of {type(model).__name__} are divided among processes; gather them on all, and give them: "
            "model.save_pretrained(folder, state_dict=accelerator.get_state_dict(wrapped), is_main_process=accelerator.is_main_process)"
        )
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
        # What a device_map has put elsewhere transformers brings itself, a file at a time; tied weights once.
        ties = hf_compat.tied_weights(model)
        given = {name: tensor for name, tensor in given.items() if not (tensor.is_meta and ties.get(name) in given)}
    else:
        given = onloaded(model, given)
    mode = state.mode, state.noise, state.tokens, state.rows
    # The configuration names the attention function, and the folder's must be the base's own.
    set_mode(model, "dense")
    model.config.dms = state.config.to_saved()
    try:
        base_class = getattr(type(model), "_own_class", type(model))
        base_class.save_pretrained(model, folder, is_main_process=is_main_process, state_dict=given, **options)
    finally:
        set_mode(model, *mode)
    if not is_main_process:
        return
    follow_umask(*weight_files(folder))
    write_index(folder)
    origin = getattr(model, "dms_origin", {})
    write_gates(
        folder,
        gates,
        state.config,
        base_name=origin.get("base_name") or hf_compat.loaded_from(model.config),
        base_digest=base_hash(folder),
        target_cr=origin.get("target_cr"),
        trained_length=state.trained_length,
    )


def _refuse(model, options: Mapping) -> None:
    refuse_quantized(model.config, type(model).__name__)
    for name, why in _REFUSED.items():
        if options.get(name):
            raise ValueError(f"save_pretrained({name}={options[name]!r}) {why}")
    if hf_compat.has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} carries adapters, which would be saved without it and without its gates; merge them first"
        )


def gate_names(model) -> dict[str, str]:
    """What the gates' parameters are called in a model's state, and in gates.safetensors."""
    return {
        f"{layer.name}.dms_gate.{name}": f"layers.{layer.index}.gate.{name}"
        for layer in state_of(model).layers
        for name, _ in layer.module.dms_gate.named_parameters()
    }


def onloaded(model, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model's state, by name, where accelerate keeps their values elsewhere (on disk) with their values, on the CPU.

    Raises:
        ValueError: a tensor without values (on the meta device), and nothing that says where they are.
    """
    # Weights that the model ties are one object here, as they were before accelerate made two of them.
    ties = hf_compat.tied_weights(model)
    values: dict[str, torch.Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            source = ties.get(name, name)
            if source not in values:
                values[source] = _value(model, source)
            tensor = values[source]
        result[name] = tensor
    return result


def _value(model, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    try:
        from accelerate.utils import align_module_device, has_offloaded_params
    except ImportError:
        offloaded = False
    else:
        offloaded = has_offloaded_params(module)
    if not offloaded:
        raise ValueError(f"{name} has no values here (it is on the meta device); load the model's weights before it is saved")
    with align_module_device(module, "cpu"):
        return getattr(module, leaf).detach().clone()

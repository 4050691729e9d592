"""gates.safetensors beside a base's weights: written and read, tied to its base, and written by `save_pretrained` of a retrofitted model.

The file holds the gates' parameters in float32, `layers.{i}.gate.*`. Its metadata: base_name, base_hash, target_cr ("" where there is
none), format_version, and dms, the DMSConfig as JSON. These may be missing: trained_length, tokens of the sequences that the gates were
trained on; base_structure, a Structure as JSON; base_form, how the base was packed when it was loaded, such as nf4 (missing: as its files
are); trained_on, the base that the gates were trained on, where it is another form of this one.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dms import hf_compat
from dms.config import FORMAT_VERSIONS, DMSConfig
from dms.io.weights import GATES_FILE, Structure, base_hash, follow_umask, save_tensors, weight_files, write_index
from dms.modes import set_mode, state_of
from dms.placement import is_offloaded, onloaded
from dms.retrofitting import gate_parameters, retrofit

# Options of transformers' `save_pretrained` that would write weights without their gates beside them.
_REFUSED = {
    "push_to_hub": "would upload the model without its gates; call model.push_to_hub(...)",
    "variant": "writes weights under a name that dms.load does not read; leave it out, and choose another folder",
    "distributed_checkpoint": "writes weights in parts that no gates can lie beside; leave it out",
}


SHARD_OF_OFFLOADED = "1GB"
"""Of a file of weights, where a model's do not fit on its device."""


def read_gates(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a gates file (or of a folder that holds one).

    Raises:
        ValueError: no gates there, or a damaged file.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path} is a model without gates; retrofit it (`dms retrofit RECIPE model={path}`) and name the folder that this wrote, such as "
            "RUN/model, or name the folder of its gates, and this as their base (--base; in Python base=...)"
        )
    path = path / GATES_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no gates ({GATES_FILE} is missing); name a folder that `dms retrofit` wrote, such as RUN/model; a model without "
            "gates is retrofitted first, and a DMS checkpoint of another project imported (`dms import`)"
        )
    try:
        with safe_open(str(path), framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_gates(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: DMSConfig,
    *,
    base_name: str,
    base_digest: str,
    target_cr: float | None,
    trained_length: int | None = None,
    base_structure: str | None = None,
    base_form: str | None = None,
    trained_on: str | None = None,
) -> Path:
    """Write `gates.safetensors` into a folder, which is made where it is missing. The arguments are its metadata, as the module says."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "base_name": base_name,
        "base_hash": base_digest,
        "target_cr": "" if target_cr is None else str(float(target_cr)),
        "format_version": str(config.format_version),
        "dms": json.dumps(config.to_saved()),
    }
    if trained_on is not None and trained_on.endswith(f"(hash {base_digest})"):
        # Another form, such as a GGUF file, that was written out as what the gates were trained on.
        trained_on = None
    may_be_missing = {
        "trained_length": None if trained_length is None else str(trained_length),
        "base_structure": base_structure,
        "base_form": base_form,
        "trained_on": trained_on,
    }
    metadata |= {name: value for name, value in may_be_missing.items() if value is not None}
    return save_tensors(tensors, folder / GATES_FILE, metadata)


def gate_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gates' values as they are written: by name, float32, on the CPU."""
    return {name: p.detach().float().cpu().contiguous() for name, p in gate_parameters(model).items()}


def read_config(metadata: Mapping[str, str], in_model_config: Mapping[str, Any] | None, folder: str | Path) -> DMSConfig:
    """The DMSConfig in a gates file's metadata. in_model_config: `config.json["dms"]` of the model, which must agree.

    Raises:
        ValueError: an unknown format, no configuration, or two that disagree.
    """
    version = metadata.get("format_version")
    if version not in [str(known) for known in FORMAT_VERSIONS]:
        raise ValueError(
            f"{folder}/{GATES_FILE}: format_version is {version!r}, this version of dms reads {' and '.join(map(str, FORMAT_VERSIONS))}"
        )
    saved = json.loads(metadata.get("dms", "null"))
    if saved is None:
        raise ValueError(f"{folder}: the gates' metadata lacks the DMS configuration; it was not written by dms")
    config = DMSConfig.from_saved(saved, f"{folder}/{GATES_FILE}")
    if in_model_config is not None and DMSConfig.from_saved(in_model_config, f"{folder}/config.json") != config:
        raise ValueError(f"{folder}: config.json and {GATES_FILE} disagree about the DMS configuration: {in_model_config} against {saved}")
    return config


@dataclass(frozen=True)
class OtherBase:
    """Gates on another form of the model that they were trained on, which was asked for."""

    trained_on: str
    """Name, hash and form of the base that they were trained on."""
    name: str
    """Of the base that they are used on."""
    hash: str | None
    """Of its weights; None: not known."""
    form: str | None = None
    """As base_form in the metadata."""
    note: str = ""
    """What could not be compared."""

    def __str__(self) -> str:
        return f"gates trained on {self.trained_on}, used on {describe_base(self.name, self.hash, self.form)}{self.note}"


def describe_base(name: str | None, digest: str | None, form: str | None) -> str:
    packed = f", packed as {form} when it was loaded" if form else ""
    return f"{name or 'a base without a name'} ({'hash ' + digest if digest else 'hash unknown'}{packed})"


def check_base(
    weights: str | Path | None,
    metadata: Mapping[str, str],
    name: str,
    *,
    form: str | None = None,
    other_base: bool = False,
    structure: Callable[[], Structure] | None = None,
) -> OtherBase | None:
    """Whether gates fit the base called `name`: None where its weights are those that they were trained on.

    weights: where they lie; None: they have no hash. form: how they are packed at loading; None: as the files are. other_base: another
    form of the same model is accepted, and returned. structure: gives the base's, and is called where the weights are others.

    Raises:
        ValueError: another base, or another form of it without other_base.
    """
    found = None if weights is None else base_hash(weights)
    own_form = metadata.get("base_form")
    if found is not None and (found, form) == (metadata.get("base_hash"), own_form):
        return None
    trained_on, used_on = describe_base(metadata.get("base_name"), metadata.get("base_hash"), own_form), describe_base(name, found, form)
    saved = metadata.get("base_structure")
    difference = Structure.from_saved(saved).difference(structure()) if saved is not None and structure is not None else None
    if difference is not None:
        raise ValueError(
            f"these gates belong to another base: they were trained on {trained_on}, and {used_on} differs in its structure ({difference}); "
            "give the base that they were trained on"
        )
    if not other_base:
        known = "it has the same structure" if saved is not None and structure is not None else "its structure cannot be compared"
        raise ValueError(
            f"these gates belong to another base: they were trained on {trained_on}, and the given one is {used_on}; give the base that they "
            f"were trained on. If this is the same model in another form ({known}), --other-base accepts it (in Python: other_base=True)"
        )
    note = "" if saved is not None and structure is not None else "; the structure of the first is not recorded, and was not compared"
    return OtherBase(metadata.get("trained_on") or trained_on, name, found, form, note)


def attach(
    model: Any,
    config: DMSConfig,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    folder: str | Path,
    other: OtherBase | None = None,
) -> Any:
    """Retrofit a model and give its gates their values; dense mode. `model.dms_origin` then says what they were trained on, and for.

    other: what `check_base` returned; where it is another base, a warning says so.

    Raises:
        ValueError: a model that cannot carry gates, or gates of other names or shapes than it needs.
    """
    retrofit(model, config)
    set_gates(model, tensors, folder)
    if other is not None:
        # At the line that called `load` or `from_pretrained`.
        warnings.warn(str(other), stacklevel=3)
    model.dms.trained_length = int(metadata["trained_length"]) if metadata.get("trained_length") else None
    name, digest = metadata.get("base_name"), metadata.get("base_hash")
    if other is None and (trained_on := metadata.get("trained_on")):
        # Saved with weights that were another base's already.
        other = OtherBase(trained_on, name or "", digest, metadata.get("base_form"))
    model.dms_origin = {
        "base_name": name if other is None else other.name,
        "base_hash": digest if other is None else other.hash,
        "target_cr": float(metadata["target_cr"]) if metadata.get("target_cr") else None,
        "trained_on": None if other is None else other.trained_on,
        "other_base": None if other is None else str(other),
    }
    return model


def structure_of(model: Any) -> str:
    """The structure of a model's base, gates and adapters not counted, as the gates' metadata has it."""
    return Structure.of(getattr(type(model), "_own_class", type(model)), model.config).to_saved()


def set_gates(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Give a retrofitted model's gates their values. Raises ValueError for others than it has."""
    parameters = gate_parameters(model)
    check_shapes(type(model).__name__, parameters, tensors, folder)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def check_shapes(model: str, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Raises ValueError where gates are of other names or shapes than the `parameters` of the model's. model: its name."""
    if set(parameters) != set(tensors) or any(parameters[n].shape != t.shape for n, t in tensors.items()):
        raise ValueError(f"{folder}: the gates do not fit {model}: {_misfit(parameters, tensors)}")


def _misfit(needed: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    """The first difference in names or shapes. A gate has an output for each window of a head."""
    for name in sorted(needed.keys() | given.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (needed, given)]
        if shapes[0] != shapes[1]:
            wanted, found = ("nothing" if shape is None else str(list(shape)) for shape in shapes)
            return f"{name} is {found} and the configuration needs {wanted} ({len(given)} tensors given, {len(needed)} needed)"
    return "nothing differs"


@torch.no_grad()
def save_pretrained(
    model: Any,
    folder: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *,
    gates: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """As transformers' own, with gates.safetensors, `config.json["dms"]`, and an index that leaves the gates out.

    state_dict: the weights, and perhaps the gates, under their modules' names; None: the model's. gates: by their names in
    gates.safetensors; None: those of state_dict, or the model's. options: transformers'. Of a model with a device_map, max_shard_size is
    SHARD_OF_OFFLOADED unless it is given: a file's weights are in memory together.

    Raises:
        ValueError: adapters that are not merged, weights that are not here, an option that gates cannot follow, or the folder that weights of
            a device_map are read from.
    """
    _refuse(model, options)
    if is_offloaded(model):
        _refuse_own_files(model, Path(folder))
        options.setdefault("max_shard_size", SHARD_OF_OFFLOADED)
    state = state_of(model)
    weights, gate_values = _split_state(model, dict(model.state_dict() if state_dict is None else state_dict), gates)
    if is_main_process and any(tensor.numel() == 0 for tensor in gate_values.values()):
        raise ValueError(
            f"the weights of {type(model).__name__} are divided among processes; gather them on all, and give them: "
            "model.save_pretrained(folder, state_dict=accelerator.get_state_dict(wrapped), is_main_process=accelerator.is_main_process)"
        )
    mode = state.mode, state.noise, state.tokens, state.rows
    # The configuration names the attention function, and in the folder it must be the base's own.
    set_mode(model, "dense")
    state.name_original()
    model.config.dms = state.config.to_saved()
    try:
        base_class = getattr(type(model), "_own_class", type(model))
        with hf_compat.saving_packed(model, weights), warnings.catch_warnings():
            # It warns of its own shards of 50 GB.
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            base_class.save_pretrained(model, folder, is_main_process=is_main_process, state_dict=weights, **options)
    finally:
        set_mode(model, *mode)
    if not is_main_process:
        return
    follow_umask(*weight_files(folder))
    _write_beside(model, Path(folder), gate_values)


def save_beside_files(model: Any, folder: str | Path, files: Path, gates: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a model folder whose weights and configuration are copies of another's, for a base that was not changed.

    Of packed weights not every kind can be written again from memory, and none need be. gates: as for `save_pretrained`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*weight_files(files), *files.glob("*.py"), *files.glob("generation_config.json")):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((files / "config.json").read_text(encoding="utf-8")) | {"dms": state_of(model).config.to_saved()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_beside(model, folder, gate_tensors(model) if gates is None else gates)


def _write_beside(model: Any, folder: Path, gates: Mapping[str, torch.Tensor]) -> None:
    """Index and gates of a folder whose weights are written."""
    write_index(folder)
    origin = getattr(model, "dms_origin", {})
    state = state_of(model)
    write_gates(
        folder,
        gates,
        state.config,
        base_name=origin.get("base_name") or hf_compat.loaded_from(model.config),
        base_digest=base_hash(folder),
        target_cr=origin.get("target_cr"),
        trained_length=state.trained_length,
        base_structure=structure_of(model),
        trained_on=origin.get("trained_on"),
    )


def _split_state(
    model: Any, given: dict[str, torch.Tensor], gates: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The weights to save, and the gates by their names in gates.safetensors, of a model's state that may hold both."""
    own = gate_names(model)
    found = onloaded(model, {name: given.pop(name) for name in own if name in given})
    if gates is None:
        gates = {own[name]: tensor.float().cpu().contiguous() for name, tensor in found.items()} or gate_tensors(model)
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
        # transformers itself reads weights that a device_map keeps elsewhere, a file at a time; tied weights once.
        ties = hf_compat.tied_weights(model)
        return {name: tensor for name, tensor in given.items() if not (tensor.is_meta and ties.get(name) in given)}, gates
    return onloaded(model, given), gates


def _refuse(model: Any, options: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if options.get(name):
            raise ValueError(f"save_pretrained({name}={options[name]!r}) {why}")
    if hf_compat.has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} carries adapters, which would be saved without it and without its gates; merge them first"
        )


def _refuse_own_files(model: Any, folder: Path) -> None:
    source = hf_compat.loaded_from(model.config)
    if "disk" in getattr(model, "hf_device_map", {}).values() and folder.exists() and source and Path(source).resolve() == folder.resolve():
        raise ValueError(f"weights of {type(model).__name__} are on disk (device_map), in {folder} itself; save it into another folder")


def gate_names(model: nn.Module) -> dict[str, str]:
    """What the gates' parameters are called in a model's state, and in gates.safetensors."""
    return {
        f"{layer.name}.dms_gate.{name}": f"layers.{layer.index}.gate.{name}"
        for layer in state_of(model).layers
        for name, _ in layer.gate.named_parameters()
    }

"""gates.safetensors: the gates' parameters in float32, `layers.{i}.gate.*`, and in its metadata what they belong to.

Metadata: base_name, base_hash, target_cr ("" where there is none), format_version, trained_length (tokens of the rows that the
gates were trained on; may be missing), and dms, the DMSConfig as JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dms.config import FORMAT_VERSION, DMSConfig
from dms.io.files import save_tensors
from dms.io.weights import GATES_FILE, base_hash
from dms.retrofitting import gate_parameters, retrofit


def read_gates(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a gates file (or of a folder that holds one).

    Raises:
        ValueError: no gates there, or a damaged file.
    """
    path = Path(path)
    path = path / GATES_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no gates ({GATES_FILE} is missing); name a folder that `dms retrofit` wrote, such as RUN/model"
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
) -> Path:
    """Write `gates.safetensors` into a folder, which is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "base_name": base_name,
        "base_hash": base_digest,
        "target_cr": "" if target_cr is None else str(float(target_cr)),
        "format_version": str(FORMAT_VERSION),
        "dms": json.dumps(config.to_saved()),
    }
    if trained_length is not None:
        metadata["trained_length"] = str(trained_length)
    return save_tensors(tensors, folder / GATES_FILE, metadata)


def gate_tensors(model) -> dict[str, torch.Tensor]:
    """The gates' values as they are written: by name, float32, on the CPU."""
    return {name: p.detach().float().cpu().contiguous() for name, p in gate_parameters(model).items()}


def read_config(metadata: Mapping[str, str], in_model_config: Mapping[str, Any] | None, folder: str | Path) -> DMSConfig:
    """The DMSConfig in a gates file's metadata. in_model_config: `config.json["dms"]` of the model, which must agree.

    Raises:
        ValueError: an unknown format, no configuration, or two that disagree.
    """
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{folder}/{GATES_FILE}: format_version is {metadata.get('format_version')!r}, this version of dms reads {FORMAT_VERSION}"
        )
    saved = json.loads(metadata.get("dms", "null"))
    if saved is None:
        raise ValueError(f"{folder}: the gates' metadata lacks the DMS configuration; it was not written by dms")
    config = DMSConfig.from_saved(saved, f"{folder}/{GATES_FILE}")
    if in_model_config is not None and DMSConfig.from_saved(in_model_config, f"{folder}/config.json") != config:
        raise ValueError(f"{folder}: config.json and {GATES_FILE} disagree about the DMS configuration: {in_model_config} against {saved}")
    return config


def check_base(folder: str | Path, metadata: Mapping[str, str], name: str) -> None:
    """Raises ValueError where a folder's weights, called `name`, are others than the gates were trained on."""
    found = base_hash(folder)
    if found != metadata.get("base_hash"):
        raise ValueError(
            f"these gates belong to another base: they were trained on {metadata.get('base_name')!r} with hash {metadata.get('base_hash')}, "
            f"and {name} has hash {found}; give the base that they were trained on"
        )


def attach(model, config: DMSConfig, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], folder: str | Path):
    """Retrofit a model and give its gates their values; dense mode. `model.dms_origin` then says what they were trained on, and for.

    Raises:
        ValueError: a model that cannot carry gates, or gates of other names or shapes than it needs.
    """
    retrofit(model, config)
    set_gates(model, tensors, folder)
    model.dms.trained_length = int(metadata["trained_length"]) if metadata.get("trained_length") else None
    target_cr = float(metadata["target_cr"]) if metadata.get("target_cr") else None
    model.dms_origin = {"base_name": metadata.get("base_name"), "target_cr": target_cr}
    return model


def set_gates(model, tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Give a retrofitted model's gates their values. Raises ValueError for others than it has."""
    parameters = gate_parameters(model)
    if set(parameters) != set(tensors) or any(parameters[n].shape != t.shape for n, t in tensors.items()):
        raise ValueError(
            f"{folder}: the gates do not fit {type(model).__name__}: they name {len(tensors)} tensors, the model has {len(parameters)} of other names or shapes"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)

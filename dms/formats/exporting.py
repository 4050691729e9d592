"""`dms export --format nvidia | fastdms | hipengine`: a retrofitted model as another project's code reads it.

What a format cannot represent is refused, with what to retrain. The projects' readers are no part of this one.
"""

import json
from pathlib import Path
from typing import Any

import torch

from dms.export.folder import Exportable, new_folder
from dms.formats import fastdms, hipengine, nvidia
from dms.formats.writing import Retrofitted
from dms.io import base_models
from dms.io.gates_file import read_config, read_gates
from dms.io.weights import GATES_FILE, sha256
from dms.layer_discovery import find_layers
from dms.report.foreign_cards import write_foreign_card

FORMATS = ("nvidia", "fastdms", "hipengine")
_NAMES = {"nvidia": "NVIDIA's DMS code", "fastdms": "FastDMS"}
_LOADING = {
    "nvidia": f"It is loaded by NVIDIA's code, with `trust_remote_code=True`: {nvidia.CODE}.",
    "fastdms": "It is loaded by FastDMS: `LLM(FOLDER)`. It reads prompts dense, and lets evicted entries live up to two windows.",
}


def export_model(found: Exportable, out: Path, format: str) -> list[Path]:
    """Write a model folder in the format "nvidia" or "fastdms" to `out`, which is there and empty.

    Raises:
        ValueError: what the format cannot represent, with what to retrain.
    """
    module = {"nvidia": nvidia, "fastdms": fastdms}[format]
    model = _retrofitted(found)
    _refuse(format, module.why_not(model))
    card = write_foreign_card(found.model / "README.md", out, found.metadata, whose=_NAMES[format], loading=_LOADING[format])
    return [*module.write(model, out), card]


def export_sidecar(source: str | Path, out: str | Path, base: str | None) -> list[Path]:
    """Write gates of linear kind as hipEngine's sidecar to `out`. source: a folder of gates alone, a run, or a model folder. base: the GGUF file.

    Raises:
        ValueError: a base that is no GGUF file here or another than the gates', or what a sidecar cannot represent.
    """
    folder = Path(source).expanduser()
    folder = next((part for part in (folder, folder / "gates", folder / "model") if (part / GATES_FILE).is_file()), folder)
    gates, metadata = read_gates(folder)
    config = read_config(metadata, None, folder)
    _refuse("hipengine", hipengine.why_not(config))
    file = base_models.local_weights(base) if base is not None else None
    if base is None or file is None or not file.is_file():
        raise ValueError(
            f"--base is {base}; hipEngine binds gates to one GGUF file by its hash: retrofit on such a file (model: FOLDER/FILE.gguf), and name it"
        )
    if sha256(file)[:32] != metadata.get("base_hash"):
        raise ValueError(
            f"{folder} holds gates of {metadata.get('base_name')!r} (hash {metadata.get('base_hash')}), and {base} is another file; name the one that "
            "they were trained on"
        )
    target = float(metadata["target_cr"]) if metadata.get("target_cr") else None
    base_config = base_models.load_config(base)
    _require_normed(base_config)
    with new_folder(out, folder) as new:
        return hipengine.write(config, gates, file, base_config.get_text_config(), target, new)


def _require_normed(config: Any) -> None:
    """Raises ValueError where gates bring a norm of their own, since attention reads the residual stream as it is."""
    with torch.device("meta"):
        layers = find_layers(base_models.auto_class(config).from_config(config)).gated
    if other := [layer.name for layer in layers if not layer.normalized_input]:
        raise ValueError(
            f"--format hipengine cannot hold this model: {other[0]} reads the residual stream, which gates normalise by themselves"
        )


def _retrofitted(found: Exportable) -> Retrofitted:
    gates, metadata = read_gates(found.model)
    return Retrofitted(
        folder=found.model,
        config=json.loads((found.model / "config.json").read_text(encoding="utf-8")),
        dms=read_config(metadata, found.config.get("dms"), found.model),
        gates=gates,
        target_cr=float(metadata["target_cr"]) if metadata.get("target_cr") else None,
        trained_length=int(metadata["trained_length"]) if metadata.get("trained_length") else None,
    )


def _refuse(format: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"--format {format} cannot hold this model: {'; '.join(problems)}")

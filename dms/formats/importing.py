"""`dms import`: a DMS checkpoint of another project -> a model folder of ours, or gates alone where it holds no base.

No code of the checkpoint runs, and none is copied: its classes' files import a package named `dms`, which is another one than this.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dms.export.folder import new_folder
from dms.formats import fastdms, hipengine, nvidia
from dms.formats.foreign import Foreign, Tensors, read_json
from dms.io import base_models, checkpoint
from dms.io.gates_file import check_shapes, write_gates
from dms.io.weights import GATES_FILE, INDEX_FILE, base_hash, save_tensors, tensor_spans, weight_files, write_index
from dms.report.card_text import Card
from dms.report.foreign_cards import write_import_card
from dms.retrofitting import gate_parameters, retrofit

FORMATS = "NVIDIA's (dms_proj_alpha tensors, or dms_separate_alpha in config.json), FastDMS' (dms_metadata.json), hipEngine's sidecar"
# What is not carried over: written anew, other forms of the weights, and code.
_WRITTEN = {INDEX_FILE, "config.json", "README.md", fastdms.METADATA}
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".py", ".gguf", ".md")
_FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` did."""

    foreign: Foreign
    licence: Mapping[str, str]
    """The fields of the checkpoint's card about its licence; none where it names none."""
    files: list[Path]


def import_checkpoint(
    source: str, out: str | Path, *, given: Mapping[str, Any] | None = None, base: str | None = None, licence: str | None = None
) -> Imported:
    """Write the checkpoint `source`, a folder or a hub id, to `out` as ours.

    given: settings that its files leave out, by the names of DMSConfig's fields, and `target_cr`. base: the name of the model that its
    gates were trained on, where its card does not say. licence: the identifier of its licence, where its card names none.

    Raises:
        ValueError: no format that is known, a folder that is not whole, settings or a licence that contradict its files, a model that
            cannot carry such gates, or an `out` that holds something.
    """
    folder = _folder_of(source)
    found = read_foreign(folder, given or {})
    if found is None:
        raise ValueError(f"{source} is no DMS checkpoint of a format that is known: {FORMATS}; {_instead(folder)}")
    card = Card.read(folder / "README.md")
    fields = _licence(card, licence, source)
    with new_folder(out, folder) as new:
        named = base or _base_name(card, source)
        files = _write_gates_alone(found, new, base) if found.base_config is None else _write_model(found, folder, new, named)
        files.append(write_import_card(new, found, named=named, source=source, licence=fields, base_given=base))
    return Imported(found, fields, files)


def read_foreign(folder: Path, given: Mapping[str, Any]) -> Foreign | None:
    """What a folder of another project holds; None where it is of no format that is known."""
    config, metadata = read_json(folder / "config.json"), read_json(folder / fastdms.METADATA)
    if hipengine.recognises(metadata):
        return hipengine.read(folder, metadata, given)
    if not config or "dms" in config:
        return None
    tensors = Tensors(folder)
    if nvidia.recognises(config, tensors):
        found = nvidia.read(folder, config, tensors, given)
    elif settings := fastdms.settings_of(folder, config):
        found = fastdms.read(folder, config, *settings, given)
    else:
        return None
    if not list(folder.glob("tokenizer*")):
        found = replace(found, notes=(*found.notes, "it has no tokenizer; copy the files of its base's into the folder that is written"))
    if not tensors.names - found.not_base:
        raise ValueError(
            f"{folder} holds no weights of its base in safetensors files; put them into the folder, as its project's code would load them"
        )
    return found


def _folder_of(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} is no folder; name a folder, or a hub id such as nvidia/Qwen3-8B-DMS-8x")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_FROM_HUB))
    except Exception as error:
        # Hub and network errors have no common base class.
        raise ValueError(
            f"{source} cannot be fetched from the hub: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error


def _instead(folder: Path) -> str:
    if (folder / GATES_FILE).is_file():
        return "it is a folder of this project, which every command takes as it is"
    return "a model without gates is retrofitted (dms retrofit)"


def _licence(card: Card, given: str | None, source: str) -> dict[str, str]:
    found = {name: str(card.fields[name]) for name in _LICENCE if card.fields.get(name)}
    if given is not None and found.get("license") not in (None, given):
        raise ValueError(f"the licence was given as {given!r}, and the card of {source} says {found['license']!r}; leave it out")
    return found or ({} if given is None else {"license": given})


def _base_name(card: Card, source: str) -> str:
    named = card.fields.get("base_model") or source
    return str(named[0] if isinstance(named, list) else named)


def _write_model(found: Foreign, folder: Path, out: Path, base_name: str) -> list[Path]:
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and entry.name not in _WRITTEN and entry.suffix not in _NOT_COPIED and not entry.name.startswith("."):
            files.append(Path(shutil.copyfile(entry, out / entry.name)))
    files += _copy_base(folder, out, found.not_base)
    assert found.base_config is not None, "a folder with a base has its configuration"
    config_file = out / "config.json"
    config_file.write_text(json.dumps({**found.base_config, "dms": found.config.to_saved()}, indent=2) + "\n", encoding="utf-8")
    _check_fits(str(out), found)
    gates = write_gates(
        out,
        found.gates,
        found.config,
        base_name=base_name,
        base_digest=base_hash(out),
        target_cr=found.target_cr,
        trained_length=found.trained_length,
        base_structure=checkpoint.structure_of_base(str(out)).to_saved(),
    )
    return [*files, config_file, gates]


def _copy_base(folder: Path, out: Path, left_out: frozenset[str]) -> list[Path]:
    """Copy a folder's weights bit for bit, without the tensors that are not the base's; one file at a time is in memory."""
    written = []
    for file in weight_files(folder):
        names = tensor_spans(file).keys()
        if not names & left_out:
            written.append(Path(shutil.copyfile(file, out / file.name)))
        elif kept := {name: tensor for name, tensor in load_file(file).items() if name not in left_out}:
            written.append(save_tensors(kept, out / file.name, {"format": "pt"}))
    return [*written, write_index(out)]


def _check_fits(folder: str, found: Foreign) -> None:
    """Raises ValueError where the model cannot carry the gates, or they are of other names or shapes."""
    config = base_models.load_config(folder)
    with torch.device("meta"):
        model = base_models.auto_class(config).from_config(config)
        check_shapes(type(model).__name__, gate_parameters(retrofit(model, found.config)), found.gates, folder)


def _write_gates_alone(found: Foreign, out: Path, base: str | None) -> list[Path]:
    return [
        write_gates(
            out,
            found.gates,
            found.config,
            base_name=base or "",
            base_digest=found.base_hash or "",
            target_cr=found.target_cr,
            trained_length=found.trained_length,
            base_structure=None if base is None else checkpoint.structure_of_base(base).to_saved(),
        )
    ]

"""`dms export`: turn a retrofitted folder into one for others, in one of these formats.

hf      weights, gates and code: transformers loads it with trust_remote_code=True, evicting, without dms; without
        trust_remote_code it is the dense model.
merged  weights (with all that was trained in them) and gates, without code: `dms.load` evicts, transformers loads it dense.
gates   the gates alone, a few hundred KB, for whoever has the base: `dms.load(OUT, base=...)`.
nvidia, fastdms, hipengine  for the code of other projects: `dms.formats`.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dms
from dms.export.code import MODEL_FILE, base_class, is_carried, write_code
from dms.export.pretrained import GENERATE_FILE
from dms.export.reference_vectors import FOLDER as VECTORS_FOLDER
from dms.export.reference_vectors import check_exportable, write_reference_vectors
from dms.export.shards import copy_weights, parse_size
from dms.io import base_models, checkpoint
from dms.io.gates_file import OtherBase, check_base, read_config, read_gates
from dms.io.quantization import is_packed
from dms.io.weights import GATES_FILE, INDEX_FILE, base_hash, save_tensors, weight_files
from dms.report.cards import write_export_card, write_gates_card

FORMATS = ("hf", "gates", "merged", "nvidia", "fastdms", "hipengine")


@dataclass(frozen=True)
class Exportable:
    """What is exported."""

    model: Path
    """A folder of weights and gates."""
    gates: Path
    """The gates file that goes with the named base: the run's, if there is one."""
    config: dict[str, Any]
    """The model's config.json."""
    metadata: dict[str, str]
    """Of the gates in the model's folder."""
    other: OtherBase | None = None
    """Its weights are another form of the base that the gates were trained on."""


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    max_shard_size: str = "5GB",
    base: str | None = None,
    other_base: bool = False,
    reference_vectors: bool = False,
) -> list[Path]:
    """Write `source`, a run or a model folder that dms wrote, to `out` in one of FORMATS. Returns the files.

    max_shard_size: weights in larger files are divided; those in smaller ones are copied as they are. base: where `source` holds gates
    alone, the model that they go with. other_base: as of `dms.load`. reference_vectors: also write what tests an implementation
    elsewhere (`dms.export.reference_vectors`), for which the model is run in float32 on the CPU.

    Raises:
        ValueError: a source without gates or with other weights than they belong to, an `out` that holds something, an unknown
            format or size, a base whose class transformers lacks (hf), one whose weights were trained too (gates), a model that can have no
            reference vectors, or what another project's format cannot represent.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; the formats are {', '.join(FORMATS)}")
    # Its modules import this one.
    from dms.formats import exporting

    foreign = exporting.FORMATS
    if format in foreign and (max_shard_size != "5GB" or (format == "hipengine" and other_base)):
        raise ValueError(
            f"--format {format} copies files of weights as they are, and hipEngine's gates go with one file: leave out --max-shard-size and --other-base"
        )
    if reference_vectors and format not in ("hf", "merged"):
        raise ValueError(
            f"reference vectors are computed with the model, which a folder of --format {format} does not hold as dms loads it; choose --format hf or "
            "merged"
        )
    if format == "hipengine":
        return exporting.export_sidecar(source, out, base)
    max_bytes = parse_size(max_shard_size)
    if format == "gates" and (base is not None or other_base):
        raise ValueError("format gates writes the gates alone, for the base that they were trained on; leave out --base and --other-base")
    if base is not None:
        options: dict[str, Any] = {"format": format, "max_shard_size": max_shard_size, "reference_vectors": reference_vectors}
        return _export_onto(base, source, out, other_base=other_base, **options)
    found = find_source(source)
    name = base_class(found.config.get("architectures"), found.model) if format == "hf" else ""
    _check_generate(found.model, format)
    if format == "gates":
        _require_untrained_base(found)
    else:
        model = str(found.model)
        other = check_base(found.model, found.metadata, model, other_base=other_base, structure=lambda: checkpoint.structure_of_base(model))
        if other is not None:
            warnings.warn(str(other), stacklevel=2)
        found = replace(found, other=other)
    if reference_vectors:
        check_exportable(found.model, _metadata(found))
    with new_folder(out, found.model) as new:
        if format in foreign:
            return exporting.export_model(found, new, format)
        written = _write_gates(found, new) if format == "gates" else _write_model(found, new, name, max_bytes)
        return [*written, *(write_reference_vectors(new) if reference_vectors else [])]


def _export_onto(base: str, source: str | Path, out: str | Path, *, other_base: bool, **options: Any) -> list[Path]:
    """Export gates that lie alone, with a base's weights: by way of a model folder beside `out`."""
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file() or not (folder / GATES_FILE).is_file():
        raise ValueError(f"--base is for a folder of gates alone, such as RUN/gates, and {folder} is none; leave --base out")
    out = Path(out).expanduser()
    tokenizer = base_models.load_tokenizer(base)
    model = checkpoint.load(folder, base=base, other_base=other_base, device="cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as made:
        # Not every kind of packed weights is written again from memory.
        came_packed = is_packed(base_models.load_config(base))
        checkpoint.save(
            model,
            made,
            tokenizer=tokenizer,
            base_name=base,
            target_cr=model.dms_origin["target_cr"],
            packed_files=base_models.local_weights(base) if came_packed else None,
        )
        return export(made, out, **options)


def find_source(path: str | Path) -> Exportable:
    """Raises ValueError where `path` is neither a run nor a model folder with gates."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name a run, or a model folder that dms wrote, such as RUN/model")
    is_run = not (folder / GATES_FILE).is_file() and (folder / "model" / GATES_FILE).is_file()
    model = folder / "model" if is_run else folder
    _, metadata = read_gates(model)
    if not (model / "config.json").is_file() or not weight_files(model):
        raise ValueError(
            f"{model} holds gates alone, trained on {metadata.get('base_name')!r}; name the run or its model folder, or give that model with --base"
        )
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    read_config(metadata, config.get("dms"), model)
    beside = folder / "gates" / GATES_FILE
    return Exportable(model, beside if is_run and beside.is_file() else model / GATES_FILE, config, metadata)


def _check_generate(model: Path, format: str) -> None:
    """Raises ValueError where a folder of format hf would have two files of its own `generate`."""
    theirs = model / GENERATE_FILE
    if format == "hf" and theirs.is_file() and not is_carried(theirs):
        raise ValueError(
            f"{theirs} changes generation, and format hf writes a file of that name; choose --format merged, or move it out of the folder"
        )


def _require_untrained_base(found: Exportable) -> None:
    """Raises ValueError where the base was trained too: gates alone go with the base as it was."""
    _, metadata = read_gates(found.gates)
    if read_config(metadata, None, found.gates.parent).is_borrowed:
        raise ValueError(
            f"the gates of {found.model} are channels of its weights, and there are none to write alone; choose --format hf or merged"
        )
    name = metadata.get("base_name") or ""
    try:
        base = base_models.local_weights(name)
    except ValueError:
        # A folder that is not on this machine.
        base = None
    if base is not None:
        try:
            # They go with the base packed again, as `dms.load` does it.
            check_base(base, metadata, name, form=metadata.get("base_form"))
        except ValueError:
            raise ValueError(
                f"{found.model} holds other weights than its base {name!r}, or in another dtype, so its gates alone would not work on that; "
                "choose --format hf or merged (or, if the base was not trained, name the run's folder, which has gates for it)"
            ) from None


@contextmanager
def new_folder(out: str | Path, model: Path) -> Iterator[Path]:
    """Make the folder that is written; what fails within leaves nothing in it, since half a folder could be taken for a whole one.

    Raises:
        ValueError: it holds something, or lies in `model`, the folder that is read.
    """
    out = Path(out).expanduser()
    existed = out.exists()
    if existed and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name a new one, or empty it")
    if out.resolve().is_relative_to(model.resolve()):
        raise ValueError(f"{out} lies in the folder that is read, {model}; name one outside")
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    except BaseException:
        shutil.rmtree(out)
        if existed:
            out.mkdir()
        raise


def _write_model(found: Exportable, out: Path, name: str, max_bytes: int) -> list[Path]:
    """Write weights, gates, configuration, card, and the code. name: the class that the code builds on; "": no code."""
    autos = _auto_classes(found.model) if name else []
    left = {GATES_FILE, INDEX_FILE, "config.json", "README.md", VECTORS_FOLDER, *(file.name for file in weight_files(found.model))}
    written = []
    for entry in sorted(found.model.iterdir()):
        if entry.name in left or entry.name.startswith(".") or is_carried(entry):
            continue
        # Tokenizers may keep templates in a folder of their own.
        copied = (
            shutil.copytree(entry, out / entry.name, copy_function=shutil.copyfile)
            if entry.is_dir()
            else shutil.copyfile(entry, out / entry.name)
        )
        written.append(Path(copied))
    written += copy_weights(found.model, out, max_bytes)
    metadata = _metadata(found)
    if found.other is None:
        written.append(Path(shutil.copyfile(found.model / GATES_FILE, out / GATES_FILE)))
    else:
        # What is written fits its own weights from here on, and says where its gates are from.
        structure = checkpoint.structure_of_base(str(found.model)).to_saved()
        metadata = {**metadata, "base_hash": base_hash(out), "base_structure": structure, "trained_on": found.other.trained_on}
        written.append(save_tensors(read_gates(found.model)[0], out / GATES_FILE, metadata))
    (out / "config.json").write_text(json.dumps(_config(found, name, autos), indent=2) + "\n", encoding="utf-8")
    written.append(out / "config.json")
    if name:
        written += write_code(out, name, autos[0])
    written.append(write_export_card(found.model / "README.md", out, metadata, auto_class=autos[0] if autos else None))
    return written


def _metadata(found: Exportable) -> dict[str, str]:
    """Of the gates that are written. Another base's weights are as their files are, whatever those were packed as that the gates were trained on."""
    return found.metadata if found.other is None else {name: value for name, value in found.metadata.items() if name != "base_form"}


def _auto_classes(model: Path) -> list[str]:
    """Every Auto class that would load the base is to load our class; first the one that loads it as what it is."""
    return [auto.__name__ for auto in base_models.auto_classes(base_models.load_config(str(model)))] or ["AutoModelForCausalLM"]


def _config(found: Exportable, name: str, autos: list[str]) -> Mapping[str, Any]:
    config = {key: value for key, value in found.config.items() if key not in ("auto_map", "dms_version")}
    ours = f"{Path(MODEL_FILE).stem}."
    # Without what an earlier export named.
    others = {
        key: value for key, value in found.config.get("auto_map", {}).items() if key != "AutoModelForCausalLM" and ours not in str(value)
    }
    auto_map = {**others, **dict.fromkeys(autos, f"{ours}{name}")} if name else others
    return {
        **config,
        **({"auto_map": auto_map} if auto_map else {}),
        "dms": json.loads(found.metadata["dms"]),
        **({"dms_version": dms.__version__} if name else {}),
    }


def _write_gates(found: Exportable, out: Path) -> list[Path]:
    path = Path(shutil.copyfile(found.gates, out / GATES_FILE))
    _, metadata = read_gates(path)
    return [path, write_gates_card(out, metadata)]

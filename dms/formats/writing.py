"""What the formats share in writing: a retrofitted model, what none of them can represent, and copies of its files."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dms.config import DMSConfig
from dms.io.weights import GATES_FILE, INDEX_FILE, save_tensors, tensor_spans, weight_files, write_index

# Beside weights: written anew by each format, or ours.
_NOT_COPIED = {GATES_FILE, INDEX_FILE, "config.json", "README.md"}


@dataclass(frozen=True)
class Retrofitted:
    """What is exported."""

    folder: Path
    config: Mapping[str, Any]
    """Its config.json."""
    dms: DMSConfig
    gates: Mapping[str, torch.Tensor]
    """By their names in gates.safetensors."""
    target_cr: float | None
    trained_length: int | None

    @property
    def base_config(self) -> dict[str, Any]:
        """config.json without what is ours."""
        return {key: value for key, value in self.config.items() if key not in ("dms", "dms_version", "auto_map")}


def common_limits(dms: DMSConfig, whose: str, alignment: str) -> list[str]:
    """What none of the formats has, and what to retrain."""
    problems = []
    if len(dms.windows) > 1:
        problems.append(
            f"dms.window is {list(dms.windows)}, and {whose} gates have one window: retrain with one, such as {dms.windows[-1]}"
        )
    if dms.sinks:
        problems.append(f"dms.sinks is {dms.sinks}, and {whose} code evicts first tokens too: retrain with dms.sinks=0")
    if dms.alignment != alignment:
        problems.append(
            f"dms.alignment is {dms.alignment!r}, and {whose} code reads gates as {alignment!r}: retrain with dms.alignment={alignment}"
        )
    return problems


def copy_others(folder: Path, out: Path) -> list[Path]:
    """Copy tokenizer, licence and whatever else lies beside weights; no code."""
    left = _NOT_COPIED | {file.name for file in weight_files(folder)}
    entries = [
        entry for entry in sorted(folder.iterdir()) if entry.name not in left and entry.suffix != ".py" and not entry.name.startswith(".")
    ]
    return [Path(shutil.copyfile(entry, out / entry.name)) for entry in entries if entry.is_file()]


def copy_weights(folder: Path, out: Path, more: Mapping[str, torch.Tensor] | None = None) -> list[Path]:
    """Copy weights bit for bit; `more` tensors go into the last file, so that no file holds others alone."""
    files = weight_files(folder)
    written = [Path(shutil.copyfile(file, out / file.name)) for file in (files if not more else files[:-1])]
    if more:
        last = files[-1]
        taken = sorted(more.keys() & {name for file in files for name in tensor_spans(file)})
        assert not taken, f"{taken[0]} is a tensor of the base"
        written.append(save_tensors({**load_file(last), **more}, out / last.name, {"format": "pt"}))
    return [*written, write_index(out)]


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def ratio(target_cr: float | None) -> int | float | None:
    """As others write it: a whole number where it is one."""
    return int(target_cr) if target_cr is not None and target_cr == int(target_cr) else target_cr

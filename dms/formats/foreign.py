"""What the formats share: a checkpoint as ours would have it, its tensors by name, and settings that a file or the user gives."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dms.config import DMSConfig
from dms.io.weights import tensor_spans, weight_files


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a folder of another project holds, as ours would have it."""

    format: str
    """Whose it is and of which kind, in words."""
    config: DMSConfig
    gates: Mapping[str, torch.Tensor]
    """By their names in gates.safetensors, float32; none for gates without weights of their own."""
    base_config: Mapping[str, Any] | None
    """config.json of the base alone; None: the folder holds gates and no base."""
    not_base: frozenset[str] = frozenset()
    """Names of tensors that are not the base's."""
    target_cr: float | None = None
    """None: it is not said."""
    trained_length: int | None = None
    base_hash: str | None = None
    """Of the base that the gates are bound to, where the folder does not hold it."""
    notes: tuple[str, ...] = ()
    """What was assumed, and in what running it here differs from running it there."""


class Tensors:
    """A folder's weights by name, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._files = {name: file for file in weight_files(folder) for name in tensor_spans(file)}

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises ValueError where the folder has no such tensor, or a damaged file."""
        if name not in self._files:
            raise ValueError(f"there is no tensor {name!r} among the {len(self._files)} in the folder's safetensors files")
        try:
            with safe_open(str(self._files[name]), framework="pt") as f:
                return f.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]} is damaged: {error}") from error


@dataclass
class Settings:
    """Fields of DMSConfig and `target_cr`, from a checkpoint's file, from the user where the file leaves them out, or by default."""

    saved: Mapping[str, Any]
    """By the names that the file gives them."""
    given: Mapping[str, Any]
    """By our names; what the user gave."""
    where: str
    """The file, for messages."""
    notes: list[str] = field(default_factory=list)

    def take(self, ours: str, *theirs: str, default: Any = None) -> Any:
        """A setting by our name. theirs: what the file may call it; nothing: the format leaves it out. default: the other project's own.

        Raises:
            ValueError: the user gave another value than the file holds.
        """
        given = self.given.get(ours)
        name = next((name for name in theirs if self.saved.get(name) is not None), None)
        if name is not None:
            found = self.saved[name]
            if given is not None and given != found:
                raise ValueError(
                    f"{ours} was given as {given!r}, and {self.where} says {name} {found!r}: gates work with what they were trained with; leave it out "
                    "(a folder that was imported is loaded with another window by --window)"
                )
            return found
        if given is None and default is not None and theirs:
            self.notes.append(f"{self.where} does not say {ours} ({theirs[0]}): taken as {default!r}, that project's default")
        return default if given is None else given


def read_json(path: Path) -> dict[str, Any]:
    """An empty one where there is no such file. Raises ValueError for a file that is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} and no JSON object")
    return found


def plain_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """A configuration without another project's settings and without the code that it names, for transformers' own class."""
    kept = {key: value for key, value in config.items() if not key.startswith("dms_") and key != "auto_map"}
    return {**kept, "architectures": [architecture]}

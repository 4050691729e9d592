"""The code in an exported folder: the model's class, and the modules of ours that it needs."""

from pathlib import Path

import dms
from dms.export.closure import flat_name, flatten

MODEL_FILE = "modeling_dms.py"
_ENTRY = "dms.export.pretrained"
_MARK = "carried by `dms export`"

_MODEL = '''"""{name} with learned KV-cache eviction: transformers' own model, and gates beside its attention layers."""

from typing import TYPE_CHECKING

from transformers import {name} as Base

from .{entry} import GatedPretrained

if TYPE_CHECKING:
    # Never run: transformers copies the files that a line of this form names.
{files}


class {name}(GatedPretrained, Base):
    """Loaded with `trust_remote_code=True` it evicts; see `GatedPretrained`."""

    # Tells transformers to save this code beside weights, and as which class's.
    _auto_class = "{auto}"
'''


def base_class(architectures: list[str] | None, where: str | Path) -> str:
    """The transformers class that a folder's configuration names.

    Raises:
        ValueError: none is named, or transformers has no such class (a base that brings code of its own).
    """
    import transformers

    name = architectures[0] if architectures else None
    if name is None or not hasattr(transformers, name):
        raise ValueError(
            f"{where}: architectures is {architectures}, and transformers {transformers.__version__} has no such class to build on; "
            "choose --format merged, which carries no code"
        )
    return name


def write_code(folder: Path, name: str, auto: str) -> list[Path]:
    """Write the class `name`, a subclass of transformers' class of that name, and what it needs. Returns the files.

    auto: the Auto class that loads it.
    """
    modules = flatten(_ENTRY)
    lines = "\n".join(f"    from .{flat} import __name__ as _" for flat in sorted(modules))
    texts = {MODEL_FILE: _header("The model class") + _MODEL.format(name=name, auto=auto, entry=flat_name(_ENTRY), files=lines)}
    texts |= {f"{flat}.py": _header(f"Module {module.name}") + module.text for flat, module in modules.items()}
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def _header(what: str) -> str:
    return f"# {what} of dms-retrofit {dms.__version__}, {_MARK}: generated, do not edit.\n# SPDX-License-Identifier: Apache-2.0\n"


def is_carried(file: Path) -> bool:
    """Whether a file is one that `write_code` wrote."""
    if file.suffix != ".py":
        return False
    with open(file, encoding="utf-8") as f:
        return _MARK in f.readline()

"""The code in an exported folder: the model's class, and the modules of ours that it needs."""

from pathlib import Path

import dms
from dms.export.closure import flat_name, flatten
from dms.export.pretrained import GENERATE_FILE

MODEL_FILE = "modeling_dms.py"
_ENTRY = "dms.export.pretrained"
_MARK = "carried by `dms export`"

_MODEL = '''"""{name} with learned KV-cache eviction: transformers' own model, and gates beside its attention layers."""

from typing import TYPE_CHECKING

from transformers import {name} as Base

from .{entry} import GatedPretrained, attach_gates

if TYPE_CHECKING:
    # Never run: transformers copies the files that a line of this form names.
{files}


class {name}(GatedPretrained, Base):
    """Loaded with `trust_remote_code=True` it evicts; see `GatedPretrained`."""

    # Tells transformers to save this code beside weights, and as which class's.
    _auto_class = "{auto}"
    # For `custom_generate`, whose models are of transformers' own class.
    attach_gates = staticmethod(attach_gates)
'''

_GENERATE = '''"""What `generate` is where transformers' own {name} loads this folder with trust_remote_code, as `transformers serve` does."""

from pathlib import Path

from transformers.dynamic_module_utils import get_class_from_dynamic_module


def generate(*args, model, **kwargs):
    """Attach the gates at the first call, and generate with eviction."""
    if getattr(model, "dms", None) is None:
        source = model.name_or_path
        # transformers copies a hub's code into a folder named after its commit.
        options = {{}} if Path(source).is_dir() else {{"revision": Path(__file__).parent.parent.name}}
        get_class_from_dynamic_module("{module}.{name}", source, **options).attach_gates(model, source, options)
    return type(model).generate(model, *args, **kwargs)
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
    """Write the class `name`, a subclass of transformers' class of that name, what it needs, and `generate` for models of transformers'
    class. Returns the files.

    auto: the Auto class that loads it.
    """
    modules = flatten(_ENTRY)
    lines = "\n".join(f"    from .{flat} import __name__ as _" for flat in sorted(modules))
    texts = {MODEL_FILE: _header("The model class") + _MODEL.format(name=name, auto=auto, entry=flat_name(_ENTRY), files=lines)}
    texts |= {f"{flat}.py": _header(f"Module {module.name}") + module.text for flat, module in modules.items()}
    texts[GENERATE_FILE] = _header("Generation") + _GENERATE.format(name=name, module=Path(MODEL_FILE).stem)
    (folder / GENERATE_FILE).parent.mkdir()
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def _header(what: str) -> str:
    return f"# {what} of dms-retrofit {dms.__version__}, {_MARK}: generated, do not edit.\n# SPDX-License-Identifier: Apache-2.0\n"


def is_carried(path: Path) -> bool:
    """Whether a file, or the folder of `generate`, is one that `write_code` wrote."""
    if path.is_dir():
        generate = path.parent / GENERATE_FILE
        return generate.parent == path and generate.is_file() and is_carried(generate)
    if path.suffix != ".py":
        return False
    with open(path, encoding="utf-8") as f:
        return _MARK in f.readline()

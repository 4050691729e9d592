"""A hook of mkdocs: tables of settings and of packaged recipes, made from the code that reads them.

A page asks for a table with a comment on a line of its own: `<!-- keys: MODULE:CLASS -->` for the keys of a settings class (pydantic or a
dataclass, sections included), `<!-- recipes -->` for the packaged recipes. tests/docs checks that the tables are complete.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]


# How the name of a section goes on where there may be several.
_SUFFIX = {list: "[]", tuple: "[]", dict: ".NAME"}


class Key(NamedTuple):
    """One row: the dotted name, the type as it is written, the default (None: the key is required) and what it means."""

    name: str
    type: str
    default: str | None
    meaning: str


def load(target: str) -> type:
    """The class that `MODULE:CLASS` names."""
    for folder in ("", "train", "kernels"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def keys_of(settings: type, prefix: str = "") -> list[Key]:
    """Every key of a settings class, those of its sections after the section's own."""
    found = []
    for name, annotation, default, meaning in _fields(settings):
        section = _section(annotation)
        found.append(Key(prefix + name, _type(annotation), default, meaning))
        if section is not None:
            found[-1] = found[-1]._replace(meaning=meaning or _first_line(section))
            inside = prefix + name + _SUFFIX.get(typing.get_origin(_without_none(annotation)), "") + "."
            # A section that shares keys with the one around it, as a source does with `data`, is not listed twice.
            shared = {key for base in section.__mro__[1:] if base in settings.__mro__ for key in vars(base).get("__annotations__", {})}
            if shared:
                found[-1] = found[-1]._replace(meaning=f"{found[-1].meaning} Each has the keys of `{prefix.rstrip('.')}` above, and:")
            found += [key for key in keys_of(section, inside) if key.name.removeprefix(inside).split(".")[0] not in shared]
    return found


def _fields(settings: type) -> list[tuple[str, Any, str | None, str]]:
    """(name, type, default as text or None, docstring)"""
    documented = _docstrings(settings)
    if dataclasses.is_dataclass(settings):
        hints = typing.get_type_hints(settings)
        found = []
        for field in dataclasses.fields(settings):
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            shown = None if default is dataclasses.MISSING else _value(default)
            found.append((field.name, hints[field.name], shown, documented.get(field.name, "")))
        return found
    assert issubclass(settings, BaseModel), settings
    found = []
    for name, info in settings.model_fields.items():
        shown = None if info.is_required() else _value(info.get_default(call_default_factory=True))
        found.append((name, info.annotation, shown, documented.get(name, "") or (info.description or "")))
    return found


def _docstrings(settings: type) -> dict[str, str]:
    """The string under each field, of the class and of those that it is made from."""
    found: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if base.__module__.split(".")[0] not in ("dms", "dms_train", "dms_kernels"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    if typing.get_origin(annotation) is typing.Annotated:
        return _without_none(typing.get_args(annotation)[0])
    return annotation


def _section(annotation: Any) -> type | None:
    """The settings class of a section, of a list of sections or of a mapping of them; None: a plain value."""
    annotation = _without_none(annotation)
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (list, tuple, dict) else [annotation]
    for part in parts:
        if isinstance(part, type) and (dataclasses.is_dataclass(part) or issubclass(part, BaseModel)):
            return part
    return None


def _type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _type(part) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (list, tuple):
        parts = [part for part in typing.get_args(annotation) if part is not Ellipsis]
        return f"list of {_type(parts[0])}" if parts else "list"
    if origin is dict:
        return "section"
    if _section(annotation) is not None:
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}.get(annotation, "any")


def _value(default: Any) -> str:
    if default is None:
        return "none"
    if dataclasses.is_dataclass(default) or isinstance(default, BaseModel):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (list, tuple)):
        return f"`[{', '.join(map(str, default))}]`"
    if default == "":
        return "empty"
    return f"`{default}`"


def _first_line(settings: type) -> str:
    return (inspect.getdoc(settings) or "").split("\n\n")[0].replace("\n", " ")


def key_table(target: str) -> str:
    """The Markdown table of a settings class."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys_of(load(target)):
        default = "**required**" if key.default is None else key.default
        cells = (f"`{key.name}`", key.type, default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def recipe_table() -> str:
    """The Markdown table of the packaged recipes, with what the comment at the head of each says."""
    lines = ["| recipe | what it does, and on what |", "|---|---|"]
    folder = ROOT / "recipes"
    for path in sorted(folder.rglob("*.yaml")):
        head = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            head.append(line.lstrip("# ").strip())
        lines.append(f"| `{path.relative_to(folder).with_suffix('').as_posix()}` | {' '.join(head)} |".replace("<", "&lt;"))
    return "\n".join(lines)


def fill(markdown: str) -> str:
    """The page with its tables in the place of the comments that ask for them."""
    markdown = re.sub(r"^<!-- keys: (\S+) -->$", lambda match: key_table(match[1]), markdown, flags=re.M)
    return re.sub(r"^<!-- recipes -->$", lambda match: recipe_table(), markdown, flags=re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with the text of each page."""
    return fill(markdown)

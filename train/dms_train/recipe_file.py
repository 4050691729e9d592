"""Recipe files: one strict, typed YAML file describes a whole run.

Unknown, misspelt, duplicate or mistyped keys are errors. `extends: NAME` starts from another recipe, one level deep;
`a.b=c` on the command line overrides with the same types.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dms.builtin import recipes_folder
from dms.config import nearest
from dms.strict_config import explain
from dms_train.compat import replace_scalars

Recipe = TypeVar("Recipe", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """Strict YAML: duplicate keys are errors, `1e-5` is a number, only true and false are booleans."""


replace_scalars(
    _StrictLoader,
    {
        "tag:yaml.org,2002:bool": (re.compile(r"^(?:true|false)$"), "tf"),
        "tag:yaml.org,2002:float": (
            re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$"),
            "-+0123456789.",
        ),
    },
)


def _no_duplicates(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a string")
        if key in mapping:
            raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def parse_yaml(text: str, source: str) -> Any:
    """Raises ValueError, with line and column, for anything that is not plain, unambiguous YAML."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def packaged_recipes() -> dict[str, Path]:
    root = recipes_folder()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """A path, or the name of a packaged recipe such as `tiny/retrofit`."""
    for candidate in (Path(name).expanduser(), *((beside / name, beside / f"{name}.yaml") if beside else ())):
        if candidate.is_file():
            return candidate
    known = packaged_recipes()
    short = name.removesuffix(".yaml").removeprefix("recipes/")
    if short in known:
        return known[short]
    raise ValueError(f"recipe {name!r} is neither a file nor a packaged recipe{nearest(short, known)}; packaged: {', '.join(known)}")


def load_recipe(name: str | None, overrides: list[str], schema: type[Recipe]) -> Recipe:
    """Read, extend, override and validate a recipe. name: None: the overrides are all that is given.

    Raises:
        ValueError: naming the file, the key, what was given and what is allowed.
    """
    path = None if name is None else find_recipe(name)
    values = {} if path is None else _read_mapping(path)
    if path is not None and "extends" in values:
        parent_path = find_recipe(str(values.pop("extends")), path.parent)
        parent = _read_mapping(parent_path)
        if "extends" in parent:
            raise ValueError(f"{path}: extends {parent_path.name}, which extends another recipe; one level is allowed")
        values = _merge(parent, values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} is not of the form key=value")
        _set(values, key.split("."), parse_yaml(text, f"override {override!r}"), override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{'settings' if name is None else f'recipe {name}'}: {explain(error, schema)}") from None


def _read_mapping(path: Path) -> dict:
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values, this is {type(values).__name__}")
    return values


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _set(values: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        # A section that is switched off (null) is switched on.
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {key} is not a section")
    values[keys[-1]] = value


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, readable by `load_recipe`."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted name; sections in lists are numbered. For comparisons by `get`: a key that an older recipe lacks, and that
    defaults to None or to an empty section, makes no difference."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found

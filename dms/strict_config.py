"""Strict settings, for recipes: frozen, typed, and an unknown key is an error that names the nearest known one."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dms.config import nearest


class Strict(BaseModel):
    """Frozen, typed, documented at each field; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ValueError(explain(error, type(self))) from None


def fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `path`, which is the path of a validation error."""
    for part in path:
        info = model.model_fields.get(part) if isinstance(part, str) else None
        annotation = info.annotation if info is not None else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """The problems of a validation error, with "; " between: for each the key, what was given and what is allowed. where: before each key."""
    lines = []
    for problem in error.errors():
        path = tuple(problem["loc"])
        name = where + ".".join(str(part) for part in path)
        if problem["type"] == "extra_forbidden":
            known = fields_at(model, path[:-1])
            lines.append(f"unknown key {name!r}{nearest(str(path[-1]), known)}; allowed: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"key {name!r} is missing")
        elif problem["type"] == "value_error":
            lines.append(f"{name}: {problem['ctx']['error']}" if name else str(problem["ctx"]["error"]))
        else:
            lines.append(f"{name}: {problem['msg']}; given: {problem['input']!r}")
    return "; ".join(lines)

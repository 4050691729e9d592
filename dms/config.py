"""`DMSConfig`: everything about the method that a checkpoint must remember. Symbols as in arXiv 2506.05345 (cited as [P])."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT_VERSION = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" for the known name closest to `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


class Strict(BaseModel):
    """Frozen, typed, documented at each field; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ValueError(explain(error, type(self))) from None


def fields_at(model: type[BaseModel], path: tuple) -> list[str]:
    """Names of the fields of the section that `path` (of a validation error) points into."""
    for part in path:
        info = model.model_fields.get(part) if isinstance(part, str) else None
        annotation = info.annotation if info is not None else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """One line per problem: the key, what was given, what is allowed."""
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


class DMSConfig(Strict):
    """How decisions are made and what they mean.

    Raises:
        ValueError: an unknown, misspelt or mistyped field, or a value out of range.
    """

    window: int = Field(default=256, ge=0)
    """w in tokens: an evicted token stays visible for the w queries after its own ([P] section 3.1, delayed eviction)."""
    granularity: Literal["head", "layer"] = "head"
    """One decision per token and KV head, or one per token for all heads of a layer."""
    alignment: Literal["own", "next"] = "own"
    """Which token a gate rules: `own`, the token that it reads ([P]); `next`, the one before it (NVIDIA's checkpoints)."""
    tau: float = Field(default=0.1, gt=0.0)
    """Temperature of the Gumbel-sigmoid in training (not in [P]; NVIDIA's reference implementation uses 0.1)."""
    scale: float = Field(default=100.0, gt=0.0)
    """The gate's logit is `scale * (x w + b) - offset`: a learning rate of its own for the gate (NVIDIA's reference: 100)."""
    offset: float = 5.0
    """Minus the logit at the start, w = b = 0: sigmoid(-5) = 0.7 %, nothing is evicted at first ([P] section 3.1)."""
    sinks: int = Field(default=0, ge=0)
    """The first tokens of each document are always visible."""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], source: str) -> "DMSConfig":
        """Read `config.json["dms"]` (or a gates file's metadata).

        Raises:
            ValueError: another format version, an unknown alignment, or any other field that this version does not know.
        """
        fields = dict(saved)
        version = fields.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source}: format_version is {version!r}, this version of dms reads {FORMAT_VERSION}; upgrade dms-retrofit or retrofit anew"
            )
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_saved(self) -> dict[str, Any]:
        return {**self.model_dump(), "format_version": FORMAT_VERSION}

"""metrics.jsonl of a run: what its curves are drawn from."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """One optimizer step. None: not recorded, or not finite."""

    step: int | None = None
    kl: float | None = None
    """To the dense model, nats a token."""
    target_cr: float | None = None
    cr: float | None = None
    """What was reached of the target, by the recipe's `budget`."""
    cr_decided: float | None = None
    """The same of decisions, which runs of earlier versions have alone."""

    @property
    def reached(self) -> float | None:
        return self.cr_decided if self.cr is None else self.cr

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "LoggedStep":
        """A line of metrics.jsonl, whose other fields are left."""
        known = {name: row.get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in known.items() if is_number(value)})


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_metrics(path: str | Path) -> list[LoggedStep]:
    """The steps of a metrics.jsonl. A torn last line is skipped; any other bad line is a ValueError."""
    # Only "\n" ends a row: splitlines() would also split at characters that JSON leaves unescaped.
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    steps = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        # A whole row ends in a line end, so what follows the last one was cut while it was written.
        is_torn = number == len(lines)
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if is_torn:
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error}); each line is one JSON object") from None
        if not isinstance(row, dict):
            if is_torn:
                break
            raise ValueError(f"{path}, line {number}: {line.strip()[:40]!r} is not a JSON object")
        steps.append(LoggedStep.from_dict(row))
    return steps

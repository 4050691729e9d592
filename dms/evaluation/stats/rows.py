"""The types of a figure: a result row, the marks on it, and its comparison with another policy. The same everywhere: a run's result.json
and metrics, an evaluation's rows.json, cards, reports and benches."""

import platform
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from typing import Any


class Mark(str, Enum):
    """A reason not to trust a row, or to read it with care. In files: the value."""

    EVICTED_NOTHING = "evicted_nothing"
    BUDGET_MISSED = "budget_missed"
    DENSE_AT_CHANCE = "dense_at_chance"
    FEW_SAMPLES = "few_samples"
    BEYOND_TRAINING = "beyond_training"

    @property
    def is_fatal(self) -> bool:
        """Whether `--strict` fails on it; the others are for information."""
        return self is not Mark.BEYOND_TRAINING

    @property
    def is_severe(self) -> bool:
        """Whether a figure is not what it seems; the others say how far it carries."""
        return self in (Mark.EVICTED_NOTHING, Mark.BUDGET_MISSED, Mark.DENSE_AT_CHANCE)

    @property
    def meaning(self) -> str:
        """What a reader of marked rows must know."""
        return _MEANINGS[self]


_MEANINGS = {
    Mark.EVICTED_NOTHING: "nothing was evicted: these are the dense model's figures, and no saving",
    Mark.BUDGET_MISSED: "the entries alive miss the budget by more than 3 %: not a comparison at equal memory",
    Mark.DENSE_AT_CHANCE: "the dense model does no better than guessing: the task tells nothing about eviction",
    Mark.FEW_SAMPLES: "fewer than 50 samples, or than 25 documents: the interval is wide and may be too narrow still",
    Mark.BEYOND_TRAINING: "longer than what the gates were trained on",
}


class Verdict(str, Enum):
    """What a paired comparison says at 95 %."""

    BETTER = "better"
    WORSE = "worse"
    NOT_DIFFERENT = "not different"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One policy minus another on the same documents, with a 95 % interval."""

    difference: float
    ci_low: float
    ci_high: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One figure and the conditions that it was measured under."""

    model: str
    model_hash: str | None
    recipe_hash: str | None
    policy: str
    task: str
    length: int | None
    """Tokens of a document; None: texts of many lengths."""
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    num_samples: int | None
    target_cr: float | None
    cr_decided: float | None
    """None: the policy decides nothing."""
    cr: float | None
    bytes: int | None
    """Of the cache at a document's end; None: not measured."""
    memory: str | None
    """`masked` or `compacted`; None: dense."""
    seed: int
    versions: Mapping[str, str]
    device: str
    seconds: float
    suite: str | None = None
    evict_bias: float | None = None
    """The operating point; None: dense."""
    num_documents: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    budget: float | None = None
    """Entries a head that the policy was allowed."""
    entries: float | None = None
    """Entries a head alive at the end, mean over documents."""
    entries_mean: float | None = None
    """Entries a head alive in the mean over a document's positions, mean over documents; of a training-free policy by its budget."""
    cr_mean: float | None = None
    """As cr, with both sums taken over all positions: equal entries at the end may have been more or fewer on the way there."""
    peak_entries: float | None = None
    reads: float | None = None
    """Entries read in decoding."""
    step_ms: float | None = None
    chance: float | None = None
    """How often a guess is right; None: the metric is no share of right answers."""
    limit: int | None = None
    """The most that the metric can be, where it has a bound of its own (divergence_length)."""
    marks: tuple[Mark, ...] = ()
    vs_dense: Comparison | None = None
    vs_dms: Comparison | None = None
    k: int | None = None
    """Hyper-scaling: chains that the metric takes (pass@k, majority@k)."""
    num_chains: int | None = None
    """Hyper-scaling: chains sampled for each problem."""
    entries_read: float | None = None
    """Hyper-scaling: entries a head that k chains read while they are decoded, mean over problems."""
    other_base: str | None = None
    """Where gates were used on another form of the base that they were trained on: a sentence that names both."""
    settings_hash: str | None = None
    """A hash of settings that the evaluation's folder does not fix: of hyper-scaling and of lm-evaluation-harness."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            **asdict(self),
            "versions": dict(self.versions),
            "marks": [mark.value for mark in self.marks],
            **{name: comparison_to_dict(getattr(self, name)) for name in ("vs_dense", "vs_dms")},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ResultRow":
        """Raises ValueError for a field that is missing or unknown, and for an unknown mark or verdict."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(required - values.keys()):
            raise ValueError(f"a result row lacks {', '.join(missing)}")
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"a result row has unknown fields {', '.join(unknown)}")
        parsed = dict(values)
        parsed["marks"] = tuple(Mark(mark) for mark in values.get("marks") or ())
        for name in ("vs_dense", "vs_dms"):
            if (found := values.get(name)) is not None:
                parsed[name] = Comparison(**{**found, "verdict": Verdict(found["verdict"])})
        return cls(**parsed)


def comparison_to_dict(comparison: Comparison | None) -> dict[str, Any] | None:
    return None if comparison is None else {**asdict(comparison), "verdict": comparison.verdict.value}


@dataclass(frozen=True, kw_only=True)
class RowContext:
    """The fields that all rows of an evaluation share: which model was measured, and where. `ResultRow(**vars(context), ...)` takes them."""

    model: str
    model_hash: str | None
    recipe_hash: str | None
    target_cr: float | None
    seed: int
    versions: Mapping[str, str]
    device: str
    other_base: str | None = None


def versions() -> dict[str, str]:
    """Of the libraries that decide figures, for the field `versions`."""
    import torch
    import transformers

    import dms

    return {
        "dms": dms.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe_device() -> str:
    """What computes here, for the field `device`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

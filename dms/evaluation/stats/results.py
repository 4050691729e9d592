"""What was measured of one unit of an evaluation: the sums that figures are made of, as `done/*.json` keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

DMS_POLICIES: dict[str, str | None] = {"dms": None, "dms_int8": "int8", "dms_fp8": "fp8", "dms_int4": "int4"}
"""The gates' own policy, by the `kv_dtype` of the pages: "dms" reads as the model is set."""


class OperatingPoint(NamedTuple):
    """A policy, and the operating point of dms that it belongs to."""

    policy: str
    evict_bias: float | None
    """None: dense, which has none."""

    @property
    def name(self) -> str:
        """The key of the point's result in a file of `done/`."""
        return self.policy if self.evict_bias is None else f"{self.policy}@{self.evict_bias:g}"


@dataclass
class Sums:
    """A metric's numerators and denominators, one for each document: right answers over questions, bits over bytes."""

    numerators: list[float]
    denominators: list[float]

    @classmethod
    def zeros(cls, num_documents: int) -> "Sums":
        return cls([0.0] * num_documents, [0.0] * num_documents)

    def add(self, document: int, numerator: float, denominator: float) -> None:
        self.numerators[document] += numerator
        self.denominators[document] += denominator


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """One policy on the documents of a unit. Entries are means over the layers with gates and their KV heads."""

    metrics: dict[tuple[str, str], Sums]
    """By task and metric."""
    entries: list[float]
    """Alive at the end of each document."""
    entries_mean: list[float] | None = None
    """Alive in the mean over each document's positions; None: not counted (results of earlier versions)."""
    reads: list[float] | None
    """Read per decoded token; None: nothing was decoded."""
    peak: list[float] | None
    """The most at any time, the running forward's tokens included; None: not measured."""
    budget: int | None
    """Entries a head that the policy was allowed; None: it has no budget."""
    num_seen: int
    """Tokens of a document that were read."""
    bytes: int | None
    """Held by the cache at a document's end, mean over documents; None: there was no cache, or it masks what is evicted."""
    memory: str | None = None
    """`masked` or `compacted`; None: no cache that evicts, and in results of earlier versions."""
    evicted: int
    decided: int
    """Decisions of the gates, over documents, layers and heads."""
    step_ms: float | None
    """Median of the decoding steps."""
    seconds: float
    batch_size: int
    seen: int | None = None
    alive: int | None = None
    """Entries seen, and alive at the end, as whole numbers over documents, layers and heads; None: by `num_seen` and `entries`."""
    evicted_share_LH: list[list[float]] | None = None
    """Share of the decisions of each layer and head that evict; None: not measured."""
    class_share_LHK: list[list[list[float]]] | None = None
    """With several windows: the share of the tokens of each layer and head that leave by each window, in the windows' order; None: one window,
    or not measured."""

    @property
    def num_documents(self) -> int:
        return len(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: metrics as "task|metric" -> [numerators, denominators]."""
        metrics = {"|".join(name): [sums.numerators, sums.denominators] for name, sums in self.metrics.items()}
        return {**vars(self), "metrics": metrics}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PolicyResult":
        metrics = {}
        for name, (numerators, denominators) in values["metrics"].items():
            task, _, metric = name.partition("|")
            metrics[task, metric] = Sums(numerators, denominators)
        return cls(**{**values, "metrics": metrics})


UnitResults = dict[str, PolicyResult]
"""What is finished of a unit, by `OperatingPoint.name`."""

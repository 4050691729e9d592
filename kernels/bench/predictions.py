"""What a row should be by roofline and instruction counts, and the best that others are known to reach: `predictions.json`.

A rule's terms add up to milliseconds; each rule says where its numbers come from.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.shapes import Shape, all_shapes

_FILE = Path(__file__).with_name("predictions.json")
# What the kernels' tiles have: queries x keys.
_TILE = 128 * 64


@dataclass(frozen=True)
class Prediction:
    """Of one row."""

    ms: float
    factor: float
    """Beyond which a measured time is off."""
    best_ms: float | None = None
    """What the best known implementation would take; None: none is known."""
    best_name: str = ""

    def verdict(self, ms: float) -> str:
        """ "" for a time within the factor."""
        if ms > self.ms * self.factor:
            return " slower"
        return " faster" if ms * self.factor < self.ms else ""


@cache
def load() -> dict:
    return json.loads(_FILE.read_text(encoding="utf-8"))


@cache
def _shapes() -> dict[tuple[str, str], Shape]:
    return {(shape.operation, shape.name): shape for shape in all_shapes()}


def predict(row: dict) -> Prediction | None:
    """None where no rule is for this row: another GPU, competitor, head dim or shape."""
    known = load()
    gpu = next((values for name, values in known["gpus"].items() if name in (row.get("gpu") or "")), None)
    shape = _shapes().get((row["operation"], row["shape"]))
    rules = (rule for rule in known["rules"] if (rule["operation"], rule["competitor"]) == (row["operation"], row["competitor"]))
    rule = next(rules, None)
    if gpu is None or shape is None or rule is None or rule.get("head_dim", shape.D) != shape.D:
        return None
    best = rule.get("best", {})
    return Prediction(
        ms=_milliseconds(rule, row, shape, gpu),
        factor=known["factor"],
        best_ms=_milliseconds(best, row, shape, gpu) if best else None,
        best_name=best.get("name", ""),
    )


def _milliseconds(rule: dict, row: dict, shape: Shape, gpu: dict) -> float:
    ms = rule.get("fixed_us", 0.0) / 1e3
    if "copy_share" in rule:
        ms += row["bytes"] / (rule["copy_share"] * gpu["copy_gbps"]) / 1e6
    if "peak_share" in rule:
        ms += row["bytes"] / (rule["peak_share"] * gpu["peak_gbps"]) / 1e6
    if "tflops" in rule:
        ms += row["flops"] / rule["tflops"] / 1e9
    if "causal_tflops" in rule:
        products = {"attention": 7, "prefill": 2}[shape.operation]
        ms += 2 * products * shape.D * shape.batch * shape.Hq * shape.causal_pairs() / rule["causal_tflops"] / 1e9
    if "cycles_per_tile" in rule:
        extra = rule["extra_keys"] + rule["extra_keys_per_window"] * len(shape.windows)
        # Short documents have no more keys than tokens.
        extra = min(extra, shape.tokens // 2)
        pairs = row["flops"] / (2 * shape.D * rule["products"]) + shape.batch * shape.Hq * shape.tokens * extra
        ms += pairs / _TILE * rule["cycles_per_tile"] / (gpu["processors"] * gpu["clock_ghz"]) / 1e6
    return ms

"""The report's charts as data: what stands on which axis. The page draws them (assets/chart.js), and `plots.py` as pictures.

A chart is a dict: `title`; `choices` that pick it (such as task and length); `y`: {label, log, unit}; `xs`: [{key, name, label, log}], of
which one is drawn; `series`: [{name, style, markers, points}]; a point has `y`, `low`, `high` (None: no interval), a value for each x's key and a
`note`; `references`: [{name, style, y, low, high}], lines over the whole width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Chart = dict[str, Any]

COSTS = (
    ("bytes", "memory", "bytes of the cache at the document's end"),
    ("reads", "reads", "entries read per decoded token and KV head"),
    ("step_ms", "latency", "milliseconds of a decoding step"),
)
SCALING_COSTS = (
    ("entries_read", "reads", "entries read per problem and KV head, all samples together"),
    ("peak_entries", "memory", "most entries alive at once per KV head, all samples together, their prompt once"),
)
METRICS = {
    "accuracy": "accuracy",
    "bits_per_byte": "bits per byte",
    "kl": "KL to the dense model, nats a token",
    "top1_agreement": "tokens on which dense agrees",
    "divergence_length": "tokens until greedy decoding leaves dense's",
}
# More points than pixels say nothing.
_MAX_POINTS = 400


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if is_number(value) else None


def point_name(bias: float) -> str:
    return f"evict_bias {bias:+g}".replace("-", "−") if bias else "as trained"


def pareto_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each task, metric and length: a curve a policy over its operating points, dense as the reference."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if is_number(row["value"]):
            groups.setdefault((row["suite"], row["task"], row["metric"], row.get("length")), []).append(row)
    charts = []
    for (suite, task, metric, length), group in groups.items():
        series = []
        for policy in _policies(group):
            # From point to point, whatever each was measured to cost.
            own = sorted((row for row in group if row["policy"] == policy), key=lambda row: row.get("evict_bias") or 0.0)
            points = [_point(row) for row in own]
            series.append({"name": policy, "style": policy, "markers": True, "points": points})
        dense = [row for row in group if row["policy"] == "dense"]
        series += [_dense_series(row) for row in dense[:1]]
        xs = _axes(COSTS, series)
        if not xs:
            continue
        charts.append(
            {
                "title": f"{task} at {length:,} tokens" if length else task,
                "choices": {"suite": suite, "task": task, "metric": metric, "length": length},
                "y": {"label": METRICS.get(metric, metric), "log": False, "unit": "share" if _is_share(metric) else None},
                "xs": xs,
                "series": series,
                "references": [{"name": "dense", "style": "dense", **_interval(row)} for row in dense[:1]],
            }
        )
    return charts


def scaling_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Accuracy against all that k samples read and hold; a curve a policy, k beside its points."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if is_number(row["value"]):
            groups.setdefault((row["task"], str(row["metric"]).split("@")[0], row.get("length")), []).append(row)
    charts = []
    for (task, metric, length), group in groups.items():
        series = []
        biases = list(dict.fromkeys((row["policy"], row.get("evict_bias")) for row in group))
        several = {policy for policy, bias in biases if sum(other == policy for other, _ in biases) > 1}
        for policy, bias in biases:
            mine = sorted((r for r in group if (r["policy"], r.get("evict_bias")) == (policy, bias)), key=lambda r: r.get("k") or 0)
            points = [{**_interval(r), **{key: number(r.get(key)) for key, *_ in SCALING_COSTS}, "note": f"k = {r.get('k')}"} for r in mine]
            name = f"{policy}, {point_name(bias)}" if policy in several and bias is not None else policy
            series.append({"name": name, "style": policy, "markers": True, "labels": True, "points": points})
        xs = _axes(SCALING_COSTS, series)
        if not xs:
            continue
        charts.append(
            {
                "title": f"{metric}, {task}" + (f" at {length:,} tokens" if length else ""),
                "choices": {"task": task, "metric": metric, "length": length},
                "y": {"label": f"{metric}@k", "log": False, "unit": "share"},
                "xs": xs,
                "series": series,
                "references": [],
            }
        )
    return charts


def position_chart(profile: Mapping[str, Any], target_cr: float | None) -> Chart:
    """The ratio of what was seen to what is alive, where the document has got to each position, and the target beside it."""
    points = profile["points"]
    series = [
        {
            "name": point_name(point["evict_bias"]) if len(points) > 1 else "dms",
            "style": f"line{number}",
            "markers": False,
            "points": [{"y": y, "position": x, "low": None, "high": None} for x, y in zip(point["positions"], point["cr_at"], strict=True)],
        }
        for number, point in enumerate(points)
    ]
    return {
        "title": "Compression ratio where the document has got to",
        "choices": {},
        "y": {"label": "tokens seen over entries alive (×)", "log": False, "unit": None},
        "xs": [{"key": "position", "name": "position", "label": "position in the document (tokens)", "log": False}],
        "series": series,
        "references": [{"name": f"target {target_cr:g}", "style": "dense", "y": target_cr, "low": None, "high": None}] if target_cr else [],
    }


def share_chart(profile: Mapping[str, Any], target_cr: float | None) -> Chart:
    """What is marked for eviction in each part of the document."""
    points = profile["points"]
    series = [
        {
            "name": point_name(point["evict_bias"]) if len(points) > 1 else "dms",
            "style": f"line{number}",
            "markers": False,
            "points": [{"y": b["evicted"], "position": (b["start"] + b["end"]) / 2, "low": None, "high": None} for b in point["bins"]],
        }
        for number, point in enumerate(points)
    ]
    target = 1 - 1 / target_cr if target_cr else None
    return {
        "title": "Tokens evicted, by where they stand",
        "choices": {},
        "y": {"label": "share of tokens that the gates evict", "log": False, "unit": "share"},
        "xs": [{"key": "position", "name": "position", "label": "position in the document (tokens)", "log": False}],
        "series": series,
        "references": [{"name": f"target {target_cr:g}", "style": "dense", "y": target, "low": None, "high": None}] if target else [],
    }


def training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Target and achieved ratio over the steps, and the divergence from the dense model."""
    chosen = metrics[:: max(1, math.ceil(len(metrics) / _MAX_POINTS))]
    if metrics and chosen[-1] is not metrics[-1]:
        chosen = [*chosen, metrics[-1]]

    def line(name: str, key: str, style: str) -> dict[str, Any]:
        points = [{"y": number(row.get(key)), "step": row.get("step"), "low": None, "high": None} for row in chosen]
        return {"name": name, "style": style, "markers": False, "points": [p for p in points if p["y"] is not None]}

    def chart(title: str, label: str, log: bool, series: list) -> Chart:
        axis = {"key": "step", "name": "step", "label": "optimizer step", "log": False}
        return {
            "title": title,
            "choices": {},
            "y": {"label": label, "log": log, "unit": None},
            "xs": [axis],
            "series": [s for s in series if s["points"]],
            "references": [],
        }

    kl = [row.get("kl") for row in chosen if is_number(row.get("kl"))]
    log = bool(kl) and min(kl) > 0 and max(kl) > 10 * min(kl)
    charts = [
        chart(
            "Compression ratio in training",
            "compression ratio (×)",
            False,
            [line("target", "target_cr", "dense"), line("achieved", "cr_decided", "line0")],
        ),
        chart("Divergence from the dense model in training", "KL, nats a token", log, [line("KL", "kl", "line0")]),
    ]
    return [c for c in charts if c["series"]]


def headline(charts: Sequence[Chart], rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart a suite and length: that of the suite's headline."""
    chosen = headlines(rows)
    return [chart for chart in charts if chosen[chart["choices"]["suite"]] == (chart["choices"]["task"], chart["choices"]["metric"])]


def headlines(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """The (task, metric) that stands for each suite: the accuracy with the most samples, which pools the others, or the first metric."""
    best: dict[str, tuple[tuple[bool, int], tuple[str, str]]] = {}
    for row in rows:
        is_accuracy = row["metric"] == "accuracy"
        rank = (is_accuracy, (row.get("num_samples") or 0) if is_accuracy else 0)
        if row["suite"] not in best or rank > best[row["suite"]][0]:
            best[row["suite"]] = (rank, (row["task"], row["metric"]))
    return {suite: chosen for suite, (_, chosen) in best.items()}


def _policies(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """dms first, then the others in their order; dense is the reference."""
    found = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "dense"))
    return sorted(found, key=lambda policy: policy != "dms")


def _interval(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {"y": number(row["value"]), "low": number(row.get("ci_low")), "high": number(row.get("ci_high"))}


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    bias, entries, cr = row.get("evict_bias"), row.get("entries"), row.get("cr")
    note = [point_name(bias)] if is_number(bias) else []
    note += [f"{entries:,.0f} entries"] if is_number(entries) else []
    note += [f"CR {cr:.2f}"] if is_number(cr) else []
    note += [mark.replace("_", " ") for mark in row.get("marks") or []]
    return {**_interval(row), **{key: number(row.get(key)) for key, *_ in COSTS}, "note": ", ".join(note)}


def _dense_series(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "dense", "style": "dense", "markers": True, "points": [_point(row)]}


def _is_share(metric: str) -> bool:
    return metric in ("accuracy", "top1_agreement") or metric.startswith(("pass@", "majority@"))


def _axes(costs: Sequence[tuple[str, str, str]], series: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each cost that was measured anywhere, its axis: logarithmic where the values span more than a factor of 4."""
    axes = []
    for key, name, label in costs:
        known = [point[key] for line in series for point in line["points"] if point[key]]
        if known:
            axes.append({"key": key, "name": name, "label": label, "log": max(known) > 4 * min(known)})
    return axes

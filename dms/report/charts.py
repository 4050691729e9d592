"""The report's charts as data: which values stand on which axis. The page draws them (assets/chart.js), and `plots` as pictures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dms.evaluation.stats.rows import ResultRow
from dms.report.decisions import GateProfile
from dms.report.run_metrics import LoggedStep, is_number

COSTS = (
    ("bytes", "memory", "bytes of the cache at the document's end"),
    ("entries_mean", "mean entries", "entries per KV head alive in the mean over positions"),
    ("reads", "reads", "entries read per decoded token and KV head"),
    ("step_ms", "latency", "milliseconds of a decoding step"),
)
"""(field of a row, short name, label of the axis)."""
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
_MAX_POINTS = 400
"""Of a line over training steps: more than this no screen shows."""


@dataclass(frozen=True, kw_only=True)
class ChartAxis:
    key: str
    """Where a point has its value: a key of `ChartPoint.x`."""
    name: str
    label: str
    log: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "name": self.name, "label": self.label, "log": self.log}


@dataclass(frozen=True, kw_only=True)
class ChartPoint:
    y: float | None
    x: dict[str, float | None]
    """A value for each axis; None: not measured."""
    low: float | None = None
    """The interval of `y`; None: there is none."""
    high: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"y": self.y, "low": self.low, "high": self.high, **self.x, "note": self.note}


@dataclass(frozen=True, kw_only=True)
class ChartSeries:
    name: str
    style: str
    """Names colour, marker and dashes, the same on the page and in pictures."""
    points: list[ChartPoint]
    markers: bool = False
    labels: bool = False
    """Whether each point's note stands beside it."""

    def to_dict(self) -> dict[str, Any]:
        points = [point.to_dict() for point in self.points]
        return {"name": self.name, "style": self.style, "markers": self.markers, "labels": self.labels, "points": points}


@dataclass(frozen=True, kw_only=True)
class ChartReference:
    """A line over the whole width."""

    name: str
    y: float | None
    style: str = "dense"
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "style": self.style, "y": self.y, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    y_label: str
    y_log: bool = False
    y_unit: str | None = None
    """`share`: a number from 0 to 1."""
    xs: list[ChartAxis]
    """One of them is drawn at a time."""
    series: list[ChartSeries]
    references: list[ChartReference] = field(default_factory=list)
    choices: dict[str, Any] = field(default_factory=dict)
    """What a reader picks this chart by, such as task and length."""

    def to_dict(self) -> dict[str, Any]:
        """As assets/chart.js reads it."""
        return {
            "title": self.title,
            "choices": self.choices,
            "y": {"label": self.y_label, "log": self.y_log, "unit": self.y_unit},
            "xs": [axis.to_dict() for axis in self.xs],
            "series": [series.to_dict() for series in self.series],
            "references": [reference.to_dict() for reference in self.references],
        }


def rounded(value: float | None, digits: int = 5) -> float | None:
    """To significant digits; None for what is no finite number."""
    return float(f"{value:.{digits}g}") if value is not None and is_number(value) else None


def point_name(bias: float) -> str:
    return f"evict_bias {bias:+g}".replace("-", "−") if bias else "as trained"


def pareto_charts(rows: Sequence[ResultRow]) -> list[Chart]:
    """A chart for each task, metric and length: for each policy a curve over its operating points, dense as the reference."""
    groups: dict[tuple[str | None, str, str, int | None], list[ResultRow]] = {}
    for row in rows:
        if is_number(row.value):
            groups.setdefault((row.suite, row.task, row.metric, row.length), []).append(row)
    charts = []
    for (suite, task, metric, length), group in groups.items():
        dense = next((row for row in group if row.policy == "dense"), None)
        series = []
        for policy in _policies(group):
            # In the order of the operating points, whatever each was measured to cost.
            own = sorted((row for row in group if row.policy == policy), key=lambda row: row.evict_bias or 0.0)
            series.append(ChartSeries(name=policy, style=policy, markers=True, points=[_cost_point(row) for row in own]))
        if dense is not None:
            series.append(ChartSeries(name="dense", style="dense", markers=True, points=[_cost_point(dense)]))
        xs = _axes(COSTS, series)
        if not xs:
            continue
        charts.append(
            Chart(
                title=f"{task} at {length:,} tokens" if length else task,
                choices={"suite": suite, "task": task, "metric": metric, "length": length},
                y_label=METRICS.get(metric, metric),
                y_unit="share" if _is_share(metric) else None,
                xs=xs,
                series=series,
                references=[] if dense is None else [_dense_reference(dense)],
            )
        )
    return charts


def scaling_charts(rows: Sequence[ResultRow]) -> list[Chart]:
    """Accuracy against all that k samples read and hold; for each policy and operating point a curve, with k beside its points."""
    groups: dict[tuple[str, str, int | None], list[ResultRow]] = {}
    for row in rows:
        if is_number(row.value):
            groups.setdefault((row.task, row.metric.split("@")[0], row.length), []).append(row)
    charts = []
    for (task, metric, length), group in groups.items():
        curves = list(dict.fromkeys((row.policy, row.evict_bias) for row in group))
        several = {policy for policy, _ in curves if sum(other == policy for other, _ in curves) > 1}
        series = []
        for policy, bias in curves:
            own = sorted((row for row in group if (row.policy, row.evict_bias) == (policy, bias)), key=lambda row: row.k or 0)
            points = [_point(row, {key: rounded(getattr(row, key)) for key, *_ in SCALING_COSTS}, f"k = {row.k}") for row in own]
            name = f"{policy}, {point_name(bias)}" if policy in several and bias is not None else policy
            series.append(ChartSeries(name=name, style=policy, markers=True, labels=True, points=points))
        xs = _axes(SCALING_COSTS, series)
        if not xs:
            continue
        charts.append(
            Chart(
                title=f"{metric}, {task}" + (f" at {length:,} tokens" if length else ""),
                choices={"task": task, "metric": metric, "length": length},
                y_label=f"{metric}@k",
                y_unit="share",
                xs=xs,
                series=series,
            )
        )
    return charts


def position_charts(profile: GateProfile, target_cr: float | None) -> list[Chart]:
    """By position in the documents, beside the target: the share that the gates evict, and the ratio of tokens seen to entries alive."""
    axis = ChartAxis(key="position", name="position", label="position in the document (tokens)")

    def series(points_by_bias: Iterable[tuple[float, list[ChartPoint]]]) -> list[ChartSeries]:
        several = len(profile.points) > 1
        return [
            ChartSeries(name=point_name(bias) if several else "dms", style=f"line{number}", points=points)
            for number, (bias, points) in enumerate(points_by_bias)
        ]

    def target(y: float | None) -> list[ChartReference]:
        return [ChartReference(name=f"target {target_cr:g}", y=y)] if y else []

    shares = (
        (point.evict_bias, [ChartPoint(y=part.evicted, x={"position": (part.start + part.end) / 2}) for part in point.bins])
        for point in profile.points
    )
    ratios = (
        (point.evict_bias, [ChartPoint(y=cr, x={"position": at}) for at, cr in zip(point.positions, point.cr_at, strict=True)])
        for point in profile.points
    )
    return [
        Chart(
            title="Tokens evicted, by where they stand",
            y_label="share of tokens that the gates evict",
            y_unit="share",
            xs=[axis],
            series=series(shares),
            references=target(1 - 1 / target_cr if target_cr else None),
        ),
        Chart(
            title="Compression ratio where the document has got to",
            y_label="tokens seen over entries alive (×)",
            xs=[axis],
            series=series(ratios),
            references=target(target_cr),
        ),
    ]


def window_name(window: int | Sequence[int]) -> str:
    """`24` or `24, 96 or 384`."""
    if isinstance(window, int):
        return f"{window:,}"
    return " or ".join([", ".join(f"{w:,}" for w in window[:-1]), f"{window[-1]:,}"])


def training_charts(metrics: Sequence[LoggedStep]) -> list[Chart]:
    """Target and achieved ratio over the steps, and the divergence from the dense model. Charts without a value are left out."""
    chosen = list(metrics[:: max(1, math.ceil(len(metrics) / _MAX_POINTS))])
    if metrics and chosen[-1] is not metrics[-1]:
        chosen.append(metrics[-1])

    def line(name: str, style: str, values: Iterable[float | None]) -> list[ChartSeries]:
        steps = zip(chosen, map(rounded, values), strict=True)
        points = [ChartPoint(y=y, x={"step": row.step}) for row, y in steps if y is not None]
        return [ChartSeries(name=name, style=style, points=points)] if points else []

    def chart(title: str, label: str, log: bool, series: list[ChartSeries]) -> list[Chart]:
        axis = ChartAxis(key="step", name="step", label="optimizer step")
        return [Chart(title=title, y_label=label, y_log=log, xs=[axis], series=series)] if series else []

    target = line("target", "dense", (row.target_cr for row in chosen))
    achieved = line("achieved", "line0", (row.reached for row in chosen))
    kl = [row.kl for row in chosen if row.kl is not None]
    log = bool(kl) and min(kl) > 0 and max(kl) > 10 * min(kl)
    return [
        *chart("Compression ratio in training", "compression ratio (×)", False, target + achieved),
        *chart("Divergence from the dense model in training", "KL, nats a token", log, line("KL", "line0", (row.kl for row in chosen))),
    ]


def headline_charts(charts: Sequence[Chart], rows: Sequence[ResultRow]) -> list[Chart]:
    """Of Pareto charts one for each suite and length: that of the suite's headline."""
    chosen = headlines(rows)
    return [chart for chart in charts if chosen[chart.choices["suite"]] == (chart.choices["task"], chart.choices["metric"])]


def headlines(rows: Iterable[ResultRow]) -> dict[str | None, tuple[str, str]]:
    """The (task, metric) that stands for each suite: the accuracy with the most samples, which pools the others, or the first metric."""
    best: dict[str | None, tuple[tuple[bool, int], tuple[str, str]]] = {}
    for row in rows:
        is_accuracy = row.metric == "accuracy"
        rank = (is_accuracy, (row.num_samples or 0) if is_accuracy else 0)
        if row.suite not in best or rank > best[row.suite][0]:
            best[row.suite] = (rank, (row.task, row.metric))
    return {suite: chosen for suite, (_, chosen) in best.items()}


def _policies(rows: Iterable[ResultRow]) -> list[str]:
    """dms first, then the others in their order; dense is the reference."""
    found = list(dict.fromkeys(row.policy for row in rows if row.policy != "dense"))
    return sorted(found, key=lambda policy: policy != "dms")


def _point(row: ResultRow, x: dict[str, float | None], note: str) -> ChartPoint:
    return ChartPoint(y=rounded(row.value), low=rounded(row.ci_low), high=rounded(row.ci_high), x=x, note=note)


def _cost_point(row: ResultRow) -> ChartPoint:
    note = [point_name(row.evict_bias)] if row.evict_bias is not None else []
    note += [f"{row.entries:,.0f} entries"] if row.entries is not None else []
    note += [f"CR {row.cr:.2f}"] if row.cr is not None else []
    note += [mark.value.replace("_", " ") for mark in row.marks]
    return _point(row, {key: rounded(getattr(row, key)) for key, *_ in COSTS}, ", ".join(note))


def _dense_reference(row: ResultRow) -> ChartReference:
    return ChartReference(name="dense", y=rounded(row.value), low=rounded(row.ci_low), high=rounded(row.ci_high))


def _is_share(metric: str) -> bool:
    return metric in ("accuracy", "top1_agreement") or metric.startswith(("pass@", "majority@"))


def _axes(costs: Sequence[tuple[str, str, str]], series: Sequence[ChartSeries]) -> list[ChartAxis]:
    """An axis for each cost that was measured anywhere: logarithmic where the values span more than a factor of 4."""
    axes = []
    for key, name, label in costs:
        known = [value for line in series for point in line.points if (value := point.x[key])]
        if known:
            axes.append(ChartAxis(key=key, name=name, label=label, log=max(known) > 4 * min(known)))
    return axes

"""The tables that a run and an evaluation print."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from dms.evaluation.stats.collect import RunFigures
from dms.evaluation.stats.rows import Mark, ResultRow, Verdict


def results_table(figures: Mapping[str, RunFigures], title: str) -> Table:
    """The table at a run's end: a line for each policy."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
        caption="recall by the distance of what is asked: q1 nearest, q4 farthest; cr: entries at the end, cr mean: over all positions",
    )
    table.add_column("policy", no_wrap=True)
    for name in ("bits/byte", "recall", "q1", "q2", "q3", "q4", "cr decided", "cr mean", "cr", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for policy, found in figures.items():
        table.add_row(
            policy,
            f"{found.bits_per_byte:.4f}",
            *(_share(value) for value in (found.recall, *found.recall_by_distance)),
            "-" if found.cr_decided is None else f"{found.cr_decided:.2f}",
            "-" if found.cr_mean is None else f"{found.cr_mean:.2f}",
            f"{found.cr:.2f}",
            found.memory or "-",
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_SIGNS = {
    Mark.EVICTED_NOTHING: ("∅", "evicted nothing: its figures are those of the dense model"),
    Mark.BUDGET_MISSED: ("≠", "holds more than 3 % more or less than its budget"),
    Mark.DENSE_AT_CHANCE: ("?", "dense does no better than guessing: nothing is shown"),
    Mark.FEW_SAMPLES: ("#", "fewer than 50 samples, or than 25 documents"),
}
_LEGEND = (
    "▲ better, ▼ worse, = not told apart, at 95 %: from dense (dms), from dms (the others). What is asked comes after the prompt was read "
    "and evicted from: methods that look at the question first (snapkv) are at a disadvantage. step ms: without what the others take to choose, "
    "which is plain code here. entries, cr: at a document's end, where budgets are equal; mean: over its positions."
)
_COSTS = {
    "entries": ",.0f",
    "entries_mean": ",.0f",
    "cr": ".2f",
    "cr_mean": ".2f",
    "peak_entries": ",.0f",
    "reads": ",.0f",
    "step_ms": ".1f",
    "bytes": ",.0fk",
}
_VERDICTS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOT_DIFFERENT: "="}
# By distance: in rows.json and in the report.
_NOT_SHOWN = ("recall_q1", "recall_q2", "recall_q3", "recall_q4")


def comparison_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Rows of one length and operating point (and dense): figures down, policies across, each with its 95 % interval."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    signs = [sign for mark, sign in _SIGNS.items() if any(mark in row.marks for row in rows)]
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption_justify="left", padding=(0, 0, 0, 1))
    table.caption = " ".join([_LEGEND, *(f"{sign}: {text}." for sign, text in signs)])
    table.add_column("", no_wrap=True)
    for policy in policies:
        table.add_column("sliding" if policy == "sliding_window" else policy, justify="right", no_wrap=True)
    by_figure: dict[tuple[str, str], dict[str, ResultRow]] = {}
    for row in rows:
        if row.task not in _NOT_SHOWN:
            by_figure.setdefault((row.task, row.metric), {})[row.policy] = row
    for (task, metric), found in by_figure.items():
        name = task if metric == "accuracy" else f"{task}: {metric.replace('_', ' ')}"
        table.add_row(name, *(_cell(found.get(policy)) for policy in policies))
    table.add_section()
    for name, form in _COSTS.items():
        values = {
            policy: [value for row in rows if row.policy == policy and (value := getattr(row, name)) is not None] for policy in policies
        }
        if any(values.values()):
            table.add_row("KB held" if name == "bytes" else name.replace("_", " "), *(_span(values[policy], form) for policy in policies))
    return table


def _span(values: Sequence[float], form: str) -> str:
    """From the least to the most over suites, which have budgets of their own."""
    if not values:
        return "-"
    low, high = (format(bound / 1000 if form.endswith("k") else bound, form.removesuffix("k")) for bound in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _cell(row: ResultRow | None) -> str:
    if row is None:
        return "-"
    versus = row.vs_dense if row.policy == "dms" else row.vs_dms
    signs = (_VERDICTS[versus.verdict] if versus else "") + "".join(sign for mark, (sign, _) in _SIGNS.items() if mark in row.marks)
    is_large = row.value >= 10
    value = f"{signs}{row.value:.{1 if is_large else 3}f}"
    if row.ci_low is None or row.ci_high is None:
        return value
    # Short, for eight policies stand side by side.
    digits = 1 if is_large else 3 if row.value < 0.1 else 2
    bounds = (f"{bound:.{digits}f}".removeprefix("0") for bound in (row.ci_low, row.ci_high))
    return f"{value}\n[dim]{'–'.join(bounds)}[/]"


def scaling_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Rows of hyper-scaling: a line for each policy, operating point and number of chains."""
    caption = "entries: per KV head, of all k chains together, mean over problems; at the peak a shared prompt counts once"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption=caption)
    table.add_column("policy", no_wrap=True)
    metrics = list(dict.fromkeys(row.metric.partition("@")[0] for row in rows))
    for name in ("k", *(f"{metric}@k" for metric in metrics), "entries read", "at the peak", "cr", "marks"):
        table.add_column(name, justify="right", no_wrap=name != "marks")
    lines: dict[tuple[str, float | None, int | None], dict[str, ResultRow]] = {}
    for row in rows:
        lines.setdefault((row.policy, row.evict_bias, row.k), {})[row.metric.partition("@")[0]] = row
    for (policy, bias, k), by_metric in lines.items():
        some = next(iter(by_metric.values()))
        table.add_row(
            policy if bias is None else f"{policy} {bias:+g}",
            str(k),
            *(f"{row.value:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]" for row in map(by_metric.__getitem__, metrics)),
            f"{some.entries_read:,.0f}",
            f"{some.peak_entries:,.0f}",
            f"{some.cr:.2f}",
            ", ".join(sorted({mark.value for row in by_metric.values() for mark in row.marks})),
        )
    return table

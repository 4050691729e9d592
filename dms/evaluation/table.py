"""The tables that a run and an evaluation print."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def results_table(results: dict[str, dict], title: str) -> Table:
    """`results`: policy -> figures of result.json."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, caption="recall by the distance of what is asked: q1 nearest, q4 farthest"
    )
    table.add_column("policy", no_wrap=True)
    for name in ("bits/byte", "recall", "q1", "q2", "q3", "q4", "cr decided", "cr", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for policy, figures in results.items():
        table.add_row(
            policy,
            f"{figures['bits_per_byte']:.4f}",
            *(_share(value) for value in (figures["recall"], *figures["recall_by_distance"])),
            "-" if figures["cr_decided"] is None else f"{figures['cr_decided']:.2f}",
            f"{figures['cr']:.2f}",
            "-" if policy == "dense" else figures["memory"],
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_SIGNS = {
    "evicted_nothing": ("∅", "evicted nothing: its figures are those of the dense model"),
    "budget_missed": ("≠", "holds more than 3 % more or less than its budget"),
    "dense_at_chance": ("?", "dense does no better than guessing: nothing is shown"),
    "few_samples": ("#", "fewer than 50 samples"),
}
_VERDICTS = {"better": "▲", "worse": "▼", "not different": "="}
# By distance: in rows.json and in the report.
_NOT_SHOWN = ("recall_q1", "recall_q2", "recall_q3", "recall_q4")


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Rows of one length and operating point (and dense): figures down, policies across, each with its 95 % interval."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    signs = [sign for mark, sign in _SIGNS.items() if any(mark in row["marks"] for row in rows)]
    legend = "▲ better, ▼ worse, = not different: from dense (dms), from dms (the others). " + " ".join(
        f"{s}: {text}." for s, text in signs
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption=legend, caption_justify="left", padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for policy in policies:
        table.add_column("sliding" if policy == "sliding_window" else policy, justify="right", no_wrap=True)
    by_figure: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["task"] not in _NOT_SHOWN:
            by_figure.setdefault((row["task"], row["metric"]), {})[row["policy"]] = row
    for (task, metric), found in by_figure.items():
        name = task if metric == "accuracy" else f"{task}: {metric.replace('_', ' ')}"
        table.add_row(name, *(_cell(found.get(policy)) for policy in policies))
    table.add_section()
    first = {policy: next(row for row in rows if row["policy"] == policy) for policy in policies}
    for name, form in (("entries", ",.0f"), ("cr", ".2f"), ("peak_entries", ",.0f"), ("reads", ",.0f"), ("step_ms", ".1f")):
        table.add_row(name.replace("_", " "), *(format(first[policy][name], form) for policy in policies))
    table.add_row("KB held", *(f"{first[policy]['bytes'] / 1000:,.0f}" for policy in policies))
    return table


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    versus = row["vs_dense"] if row["policy"] == "dms" else row["vs_dms"]
    digits = 1 if row["value"] >= 10 else 3
    signs = (_VERDICTS[versus["verdict"]] if versus else "") + "".join(sign for mark, (sign, _) in _SIGNS.items() if mark in row["marks"])
    low, high = (f"{row[bound]:.{min(2, digits)}f}" for bound in ("ci_low", "ci_high"))
    # Short, for eight policies stand side by side.
    return f"{signs}{row['value']:.{digits}f}\n[dim]{low.removeprefix('0')}–{high.removeprefix('0')}[/]"

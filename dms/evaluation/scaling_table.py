"""The table of hyper-scaling."""

from rich import box
from rich.table import Table


def scaling_table(rows: list[dict], title: str) -> Table:
    """rows: of `run_scaling`. A line for each policy, operating point and number of chains."""
    caption = "entries: per KV head, of all k chains together, mean over problems; at the peak a shared prompt counts once"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption=caption)
    table.add_column("policy", no_wrap=True)
    metrics = list(dict.fromkeys(row["metric"].partition("@")[0] for row in rows))
    for name in ("k", *(f"{metric}@k" for metric in metrics), "entries read", "at the peak", "cr", "marks"):
        table.add_column(name, justify="right", no_wrap=name != "marks")
    lines: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        lines.setdefault((row["policy"], row["evict_bias"], row["k"]), {})[row["metric"].partition("@")[0]] = row
    for (policy, bias, k), by_metric in lines.items():
        some = next(iter(by_metric.values()))
        table.add_row(
            policy if bias is None else f"{policy} {bias:+g}",
            str(k),
            *(_interval(by_metric[metric]) for metric in metrics),
            f"{some['entries_read']:,.0f}",
            f"{some['peak_entries']:,.0f}",
            f"{some['cr']:.2f}",
            ", ".join(sorted({mark for row in by_metric.values() for mark in row["marks"]})),
        )
    return table


def _interval(row: dict) -> str:
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"

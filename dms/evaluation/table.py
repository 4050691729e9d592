"""The results table that a run prints."""

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

"""The results table that a run prints."""

from rich.table import Table


def results_table(results: dict[str, dict], title: str) -> Table:
    """`results`: policy -> figures of result.json."""
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for name in ("bits/byte", "recall", "nearest", "2nd", "3rd", "farthest", "cr decided", "cr", "memory"):
        table.add_column(name, justify="right")
    for policy, figures in results.items():
        table.add_row(
            policy,
            f"{figures['bits_per_byte']:.4f}",
            *(_share(value) for value in (figures["recall"], *figures["recall_by_distance"])),
            f"{figures['cr_decided']:.2f}",
            f"{figures['cr']:.2f}",
            "-" if policy == "dense" else figures["memory"],
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

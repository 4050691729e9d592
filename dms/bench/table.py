"""The table that `dms bench cache` prints."""

from rich import box
from rich.table import Table

# Whether more is better.
FIGURES = {"decode_tokens_per_second": True, "attention_ms": False, "prefill_tokens_per_second": True, "bytes": False}
_TITLES = ("decode tok/s", "attention ms", "prefill tok/s", "MiB")
_DENSE = {"dynamic": "DynamicCache", "preallocated": "preallocated"}


def cache_table(rows: list[dict], title: str) -> Table:
    """rows: of one run, as it returns them."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE,
        caption="attention: cache update and attention of one token step, all layers; prefill at the smallest batch; "
        "x: how many times better the compacted cache is",
    )
    for name in ("batch", "context", "cache", "cr", *_TITLES):
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["batch"], row["length"], row["policy"], row["evicted"]), {})[row["metric"]] = row
    before = None
    for (batch, context, policy, evicted), found in cases.items():
        if before not in (None, (batch, context)):
            table.add_section()
        where = (str(batch), f"{context:,}") if before != (batch, context) else ("", "")
        before = (batch, context)
        name = _DENSE.get(policy) or f"compacted, {evicted:.1%} evicted"
        cr = f"{found['bytes']['cr']:.2f}" if policy == "dms" else ""
        table.add_row(*where, name, cr, *(_figure(found, metric) for metric in FIGURES))
        for other in _DENSE if policy == "dms" else ():
            gains = (found.get(f"{metric}_gain_over_{other}") for metric in FIGURES)
            table.add_row(
                "", "", f"  over {_DENSE[other]}", "", *("-" if gain is None else f"{gain['value']:.2f}x" for gain in gains), style="dim"
            )
    return table


def _figure(found: dict[str, dict], metric: str) -> str:
    if metric not in found:
        return "-"
    value = found[metric]["value"]
    if metric == "bytes":
        return f"{value / 2**20:,.1f}"
    return f"{value:,.2f}" if metric == "attention_ms" else f"{value:,.1f}"

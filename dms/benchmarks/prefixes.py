"""`dms bench prefixes`: reading a document again from a `PrefixStore` beside reading it by the model."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table

import dms
from dms.benchmarks.cache import parse_window
from dms.benchmarks.model import DEFAULT, QUICK, evicting_model
from dms.benchmarks.timing import seconds_of
from dms.console import make_console
from dms.evaluation.stats.rows import describe_device
from dms.hf_compat import cache_argument


@dataclass(frozen=True)
class PrefixFigures:
    """Of a document of so many tokens."""

    context: int
    cr: float
    prefill_seconds: float
    put_seconds: float
    get_seconds: float
    """From a file that the system may still hold in memory."""
    num_bytes: int
    """Of the file."""
    dense_bytes: int
    """Of a dense cache in the model's dtype."""


@torch.no_grad()
def run(
    context: Sequence[int] = (), evicted: float = 0.875, window: str = "256", quick: bool = False, seed: int = 7
) -> list[PrefixFigures]:
    """Measure with a random model whose gates evict a given share, and print a table. context: none: 2048, 8192 and 32768."""
    shape, device = (QUICK if quick else DEFAULT), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = sorted(set(context)) or ([512] if quick else [2048, 8192, 32768])
    model = evicting_model(shape, parse_window(window), evicted, seed, device)
    generator, found = torch.Generator().manual_seed(seed), []
    with tempfile.TemporaryDirectory() as folder:
        store = dms.PrefixStore(folder, 2**50)
        for length in lengths:
            ids = torch.randint(shape.vocabulary, (length,), generator=generator).tolist()
            found.append(_measure(model, store, ids, device))
    make_console().print(_table(found, f"{shape}; {evicted:.1%} evicted, window {window}; {describe_device()}, float32"))
    return found


def _measure(model, store: dms.PrefixStore, ids: list[int], device: torch.device) -> PrefixFigures:
    cache = dms.DMSCache(model)
    ids_1N = torch.tensor([ids], device=device)
    prefill = seconds_of(lambda: model(input_ids=ids_1N, **cache_argument(model, cache), logits_to_keep=1), device)
    before = store.num_bytes
    put = seconds_of(lambda: store.put(model, ids, cache), device)
    size = store.num_bytes - before
    stats = cache.report(warn=False)
    get = sorted(seconds_of(lambda: store.get(model, ids), device) for _ in range(3))[1]
    return PrefixFigures(len(ids), stats.cr, prefill, put, get, size, stats.bytes_dense)


def _table(found: Sequence[PrefixFigures], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption="file: of the store; dense: a dense cache's bytes")
    for name in ("tokens", "cr", "prefill s", "store s", "read s", "times quicker", "file MB", "dense MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.context:,}",
            f"{one.cr:.2f}",
            f"{one.prefill_seconds:.2f}",
            f"{one.put_seconds:.3f}",
            f"{one.get_seconds:.3f}",
            f"{one.prefill_seconds / one.get_seconds:,.0f}",
            f"{one.num_bytes / 1e6:,.1f}",
            f"{one.dense_bytes / 1e6:,.1f}",
        )
    return table

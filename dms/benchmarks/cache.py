"""`dms bench cache`: what the compacted cache costs and saves beside two dense ones, in one process on one machine.

Figures of each cache: tokens/s of decoding (the whole model, one token a step for every sequence), ms of attention and cache in
one such step (all layers; queries, keys and values are ready), tokens/s of prefill, and bytes held.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar, get_args

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table

from dms.benchmarks.caches import MeasuredCache, NextToken, check_equal, fill, measured_caches, new_tokens, ratio_of
from dms.benchmarks.model import DEFAULT, QUICK, RandomLlama, build_model
from dms.benchmarks.timing import seconds_in_turns, seconds_of
from dms.cache import held_bytes
from dms.config import DMSConfig
from dms.console import make_console
from dms.errors import writing
from dms.evaluation.stats.rows import describe_device, versions
from dms.hf_compat import cache_argument

Metric = Literal["decode_tokens_per_second", "attention_ms", "prefill_tokens_per_second", "bytes"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_MORE_IS_BETTER = ("decode_tokens_per_second", "prefill_tokens_per_second")
_TITLES = ("decode tok/s", "attention ms", "prefill tok/s", "MiB")
_DENSE = {"dynamic": "DynamicCache", "preallocated": "preallocated"}
FIRST_WINDOW = "first_window"
_OTHERS = {**_DENSE, FIRST_WINDOW: "the first window"}
# Above so many tokens a prefill is measured once.
_LONG_PREFILL = 4096


@dataclass(frozen=True, kw_only=True)
class CacheBenchmark:
    """What is measured. Prefill is measured at the smallest batch alone."""

    shape: RandomLlama = DEFAULT
    window: tuple[int | tuple[int, ...], ...] = (256,)
    """One, or several in a tuple, for each compacted cache; times of the later ones are compared with the first's."""
    batch: tuple[int, ...] = (1, 4)
    context: tuple[int, ...] = (4096, 8192, 16384)
    evicted: tuple[float, ...] = (0.75, 0.875)
    repeats: int = 7
    """Turns, whose medians the figures are; in a turn each cache takes `steps` tokens, one after the other."""
    steps: int = 8
    prefill: bool = True
    seed: int = 7

    def __post_init__(self):
        longest = max(DMSConfig(window=window).windows[-1] for window in self.window)
        if min(self.context) <= longest + 1 or min(self.batch) < 1:
            raise ValueError(
                f"context is {list(self.context)} and batch {list(self.batch)}; "
                f"give contexts above {longest + 1} tokens, which the window keeps, and batches from 1"
            )

    @property
    def num_new(self) -> int:
        """Tokens that a cache takes beside its context: the turns of two figures with a warm-up each, and two checks."""
        return 2 * self.steps * (self.repeats + 1) + 2


QUICK_BENCHMARK = CacheBenchmark(shape=QUICK, window=(32,), batch=(2,), context=(768,), evicted=(0.75,), repeats=3, steps=4)


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One figure, as the JSON file has it: a result row, with what is particular to this benchmark."""

    model: str
    task: str
    length: int
    batch: int
    threads: int
    seed: int
    versions: dict[str, str]
    device: str
    policy: str
    window: int | tuple[int, ...] | None
    evicted: float | None
    memory: str
    metric: str
    value: float
    num_samples: int
    cr: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """A figure, and how it came to be."""

    value: float
    """The median of `num_samples`."""
    cr: float
    """The cache's compression meanwhile."""
    num_samples: int = 1
    seconds: float = 0.0
    """What measuring took in all."""


def benchmark_for(
    *,
    batch: Sequence[int] | None = None,
    context: Sequence[int] | None = None,
    evicted: Sequence[float] | None = None,
    window: Sequence[str] | None = None,
    layers: int | None = None,
    prefill: bool = True,
    quick: bool = False,
) -> CacheBenchmark:
    """What the command's options ask for; None: as it is by default. window: such as "128" and "32,128,512"."""
    given = QUICK_BENCHMARK if quick else CacheBenchmark()
    return replace(
        given,
        shape=given.shape if layers is None else replace(given.shape, layers=layers),
        prefill=prefill,
        window=tuple(dict.fromkeys(parse_window(text) for text in window or ())) or given.window,
        batch=_sorted(batch) or given.batch,
        context=_sorted(context) or given.context,
        evicted=_sorted(evicted) or given.evicted,
    )


def parse_window(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"window is {text!r}; give a number of tokens, or several rising ones such as 32,128,512") from None
    return numbers if len(numbers) > 1 else numbers[0]


_N = TypeVar("_N", int, float)


def _sorted(values: Sequence[_N] | None) -> tuple[_N, ...]:
    return tuple(sorted(set(values or ())))


def run(benchmark: CacheBenchmark, out: str | None = None) -> list[CacheRow]:
    """Measure, print the table, and return (and write to `out`) the rows.

    Raises:
        ValueError: a share of eviction that heads of such spread cannot have.
        RuntimeError: a cache that does not answer as attention over the same entries; it is not timed.
    """
    console, rows = make_console(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(benchmark.shape, benchmark.seed, device)
    found = measured_caches(model, benchmark.shape, benchmark.window, benchmark.evicted, benchmark.seed)
    cases = [(batch, context) for context in benchmark.context for batch in benchmark.batch]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for batch, context in progress.track(cases, description="measuring"):
            rows += _rows(benchmark, batch, context, found, _measure(benchmark, found, batch, context, device))
    console.print(cache_table(rows, f"{benchmark.shape}; {describe_device()}, float32"))
    if out:
        values = {"model": str(benchmark.shape), "rows": [asdict(row) for row in rows]}
        with writing(out):
            Path(out).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return rows


# Measuring.

_Figures = dict[Metric, Measurement]
_G = TypeVar("_G")


@torch.no_grad()
def _measure(benchmark: CacheBenchmark, found: list[MeasuredCache], batch: int, context: int, device: torch.device) -> list[_Figures]:
    """One case: the figures of each cache."""
    shape, steps, generator = benchmark.shape, benchmark.steps, torch.Generator(device).manual_seed(benchmark.seed)
    fill(found, shape, batch, context, context + benchmark.num_new, generator)
    check_equal(found, shape, batch, generator)
    attending = _in_turns(benchmark, found, lambda: new_tokens(found, shape, batch, steps, generator), _attend, device)
    check_equal(found, shape, batch, generator)
    decoding = _in_turns(benchmark, found, lambda: _ids(shape, batch, steps, generator), _decode, device)
    figures: list[_Figures] = []
    for one, attended, decoded in zip(found, attending, decoding, strict=True):
        cr = one.ratio
        figures.append(
            {
                "attention_ms": Measurement(1e3 * median(attended) / steps, cr, len(attended), sum(attended)),
                "decode_tokens_per_second": Measurement(batch * steps / median(decoded), cr, len(decoded), sum(decoded)),
                "bytes": Measurement(held_bytes(one.cache), cr),
            }
        )
        one.forget()
    if benchmark.prefill and batch == min(benchmark.batch):
        for figure, measured in zip(figures, _prefill(shape, found, batch, context, generator), strict=True):
            figure["prefill_tokens_per_second"] = measured
    return figures


def _in_turns(
    benchmark: CacheBenchmark,
    found: list[MeasuredCache],
    prepare: Callable[[], _G],
    work: Callable[[MeasuredCache, _G], None],
    device: torch.device,
) -> list[list[float]]:
    """Seconds of each cache's turns. The first turn warms up."""
    turns = []
    for turn in range(benchmark.repeats + 1):
        given = prepare()
        turns.append(seconds_in_turns([partial(work, one, given) for one in found], device, first=turn))
    return [list(seconds) for seconds in zip(*turns[1:], strict=True)]


def _attend(one: MeasuredCache, tokens: list[NextToken]) -> None:
    for n, token in enumerate(tokens):
        # All layers in turn, as in a model: between two steps a layer's entries leave the processor's cache.
        for layer, decisions in enumerate(one.decisions):
            one.attend(layer, token, decisions[n - len(tokens)] if decisions else None)


def _ids(shape: RandomLlama, batch: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(shape.vocabulary, (batch, count), generator=generator, device=generator.device)


def _decode(one: MeasuredCache, ids: torch.Tensor) -> None:
    for n in range(ids.shape[1]):
        one.model(input_ids=ids[:, n : n + 1], use_cache=True, **cache_argument(one.model, one.cache))


def _prefill(shape: RandomLlama, found: list[MeasuredCache], batch: int, context: int, generator: torch.Generator) -> list[Measurement]:
    """Each reads a context into an empty cache as `generate` does; gates decide what is evicted."""
    seconds: list[list[float]] = [[] for _ in found]
    ratios = [1.0 for _ in found]
    for _ in range(3 if context <= _LONG_PREFILL else 1):
        ids = _ids(shape, batch, context, generator)
        for place, one in enumerate(found):
            cache = one.empty_cache(context)
            read = partial(one.model, input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(one.model, cache))
            seconds[place].append(seconds_of(read, generator.device))
            ratios[place] = ratio_of(cache)
    return [Measurement(batch * context / median(s), cr, len(s), sum(s)) for s, cr in zip(seconds, ratios, strict=True)]


# Rows and table.


def _rows(benchmark: CacheBenchmark, batch: int, context: int, found: list[MeasuredCache], figures: list[_Figures]) -> list[CacheRow]:
    """One row a figure, and for a compacted cache one more beside each dense cache, and beside that of the first window: how many times
    better it is."""
    dense = {one.policy: figure for one, figure in zip(found, figures, strict=True) if one.is_dense}
    first, *later = benchmark.window
    of_first = {one.evicted: figure for one, figure in zip(found, figures, strict=True) if not one.is_dense and one.window == first}
    rows = []
    for one, figure in zip(found, figures, strict=True):
        others = {} if one.is_dense else dense
        if not one.is_dense and one.window in later:
            others = dense | {FIRST_WINDOW: of_first[one.evicted]}
        for metric, measured in figure.items():
            values: dict[str, float] = {metric: measured.value}
            for name, other in others.items():
                gain = measured.value / other[metric].value
                values[f"{metric}_gain_over_{name}"] = gain if metric in _MORE_IS_BETTER else 1.0 / gain
            rows += [
                CacheRow(
                    model=str(benchmark.shape),
                    task="bench_cache",
                    length=context,
                    batch=batch,
                    threads=torch.get_num_threads(),
                    seed=benchmark.seed,
                    versions=versions(),
                    device=describe_device(),
                    policy=one.policy,
                    window=None if one.is_dense else one.window,
                    evicted=one.evicted,
                    memory="dense" if one.is_dense else "compacted",
                    metric=name,
                    value=value,
                    num_samples=measured.num_samples,
                    cr=measured.cr,
                    bytes=figure["bytes"].value,
                    seconds=measured.seconds,
                )
                for name, value in values.items()
            ]
    return rows


def cache_table(rows: Iterable[CacheRow], title: str) -> Table:
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
    cases: dict[tuple[int, int, str, float | None, int | tuple[int, ...] | None], dict[str, CacheRow]] = {}
    for row in rows:
        cases.setdefault((row.batch, row.length, row.policy, row.evicted, row.window), {})[row.metric] = row
    before = None
    for (batch, context, policy, evicted, window), found in cases.items():
        if before not in (None, (batch, context)):
            table.add_section()
        where = (str(batch), f"{context:,}") if before != (batch, context) else ("", "")
        before = (batch, context)
        windows = ", ".join(map(str, window)) if isinstance(window, tuple) else window
        name = _DENSE.get(policy) or f"compacted, {evicted:.1%} evicted, w {windows}"
        cr = f"{found['bytes'].cr:.2f}" if policy == "dms" else ""
        table.add_row(*where, name, cr, *(_figure(found, metric) for metric in METRICS))
        for other, title in _OTHERS.items() if policy == "dms" else ():
            if f"bytes_gain_over_{other}" not in found:
                continue
            gains = (found.get(f"{metric}_gain_over_{other}") for metric in METRICS)
            table.add_row("", "", f"  over {title}", "", *("-" if gain is None else f"{gain.value:.2f}x" for gain in gains), style="dim")
    return table


def _figure(found: dict[str, CacheRow], metric: Metric) -> str:
    if metric not in found:
        return "-"
    value = found[metric].value
    if metric == "bytes":
        return f"{value / 2**20:,.1f}"
    return f"{value:,.2f}" if metric == "attention_ms" else f"{value:,.1f}"

"""`dms bench cache`: what the compacted cache costs and saves beside two dense ones, in one process on one machine.

Figures of each cache: tokens/s of decoding (the whole model, one token a step for every sequence), ms of attention and cache in
one such step (all layers; queries, keys and values are ready), tokens/s of prefill, and bytes held.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table

from dms.benchmarks.competitors import Competitor, NewToken, check_equal, competitors, fill, new_tokens
from dms.benchmarks.model import DEFAULT, QUICK, Shape, build_model
from dms.cache import held_bytes
from dms.console import make_console
from dms.errors import writing
from dms.evaluation.stats.rows import describe_device, versions
from dms.hf_compat import cache_argument

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


# Above so many tokens a prefill is measured once.
_LONG_PREFILL = 4096


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. Figures are medians of `repeats` turns; in a turn each cache takes `steps` tokens, one after the other.

    Prefill is measured at the smallest batch alone.
    """

    shape: Shape = DEFAULT
    batch: tuple[int, ...] = (1, 4)
    context: tuple[int, ...] = (4096, 8192, 16384)
    evicted: tuple[float, ...] = (0.75, 0.875)
    repeats: int = 7
    steps: int = 8
    prefill: bool = True
    seed: int = 7

    def __post_init__(self):
        if min(self.context) <= self.shape.window + 1 or min(self.batch) < 1:
            raise ValueError(
                f"context is {list(self.context)} and batch {list(self.batch)}; "
                f"give contexts above {self.shape.window + 1} tokens, which the window keeps, and batches from 1"
            )

    @property
    def num_new(self) -> int:
        """Tokens that a cache takes beside its context: the turns of two figures with a warm-up each, and two checks."""
        return 2 * self.steps * (self.repeats + 1) + 2


QUICK_PLAN = Plan(shape=QUICK, batch=(2,), context=(768,), evicted=(0.75,), repeats=3, steps=4)


@dataclass
class Sample:
    """A figure: the median of num_samples, what measuring them took in all, and the cache's compression meanwhile."""

    value: float
    num_samples: int = 1
    seconds: float = 0.0
    cr: float = 1.0


def plan_for(
    *,
    batch: Sequence[int] | None = None,
    context: Sequence[int] | None = None,
    evicted: Sequence[float] | None = None,
    layers: int | None = None,
    prefill: bool = True,
    quick: bool = False,
) -> Plan:
    """What the command's options ask for; None: as it is by default."""
    plan = QUICK_PLAN if quick else Plan()
    given = {"batch": batch, "context": context, "evicted": evicted}
    lists = {name: tuple(sorted(set(values))) for name, values in given.items() if values}
    shape = plan.shape if layers is None else replace(plan.shape, layers=layers)
    return replace(plan, shape=shape, prefill=prefill, **lists)


def run(plan: Plan, out: str | None = None) -> list[dict]:
    """Measure, print the table, and return (and write to `out`) the rows.

    Raises:
        ValueError: a share of eviction that heads of such spread cannot have.
        RuntimeError: a cache that does not answer as attention over the same entries; it is not timed.
    """
    console, rows = make_console(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = competitors(build_model(plan.shape, plan.seed, device), plan.shape, plan.evicted, plan.seed)
    cases = [(batch, context) for context in plan.context for batch in plan.batch]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for batch, context in progress.track(cases, description="measuring"):
            rows += _rows(plan, batch, context, found, _measure(plan, found, batch, context, device))
    console.print(cache_table(rows, f"{plan.shape}; {describe_device()}, float32"))
    if out:
        with writing(out):
            Path(out).write_text(json.dumps({"model": str(plan.shape), "rows": rows}, indent=1), encoding="utf-8")
    return rows


@torch.no_grad()
def _measure(plan: Plan, found: list[Competitor], batch: int, context: int, device: torch.device) -> list[dict[str, Sample]]:
    """One case: the figures of each competitor."""
    shape, generator = plan.shape, torch.Generator(device).manual_seed(plan.seed)
    figures: list[dict[str, Sample]] = [{} for _ in found]
    fill(found, shape, batch, context, context + plan.num_new, generator)
    check_equal(found, shape, batch, generator)
    seconds = _in_turns(plan, found, lambda: new_tokens(found, shape, batch, plan.steps, generator), _attend, device)
    check_equal(found, shape, batch, generator)
    for figure, turns in zip(figures, seconds, strict=True):
        figure["attention_ms"] = Sample(1e3 * median(turns) / plan.steps, len(turns), sum(turns))
    seconds = _in_turns(plan, found, lambda: _ids(plan, batch, plan.steps, generator), _decode, device)
    for one, figure, turns in zip(found, figures, seconds, strict=True):
        figure["decode_tokens_per_second"] = Sample(batch * plan.steps / median(turns), len(turns), sum(turns))
        figure["bytes"] = Sample(held_bytes(one.cache))
        for sample in figure.values():
            sample.cr = _cr(one, one.cache)
        one.cache, one.decisions = None, []
    if plan.prefill and batch == min(plan.batch):
        for figure, sample in zip(figures, _prefill(plan, found, batch, context, generator), strict=True):
            figure["prefill_tokens_per_second"] = sample
    return figures


def _cr(one: Competitor, cache) -> float:
    return cache.report().cr if one.keep_LH is not None else 1.0


def _in_turns(
    plan: Plan, found: list[Competitor], prepare: Callable[[], Any], work: Callable[[Competitor, Any], None], device: torch.device
) -> list[list[float]]:
    """Seconds of each competitor's turns: what disturbs the machine hits all alike. The first turn warms up."""
    seconds: list[list[float]] = [[] for _ in found]
    for turn in range(plan.repeats + 1):
        given = prepare()
        for i in range(len(found)):
            which = (i + turn) % len(found)
            seconds[which].append(_time(lambda which=which, given=given: work(found[which], given), device))
    return [turns[1:] for turns in seconds]


def _time(work: Callable[[], Any], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attend(one: Competitor, tokens: list[NewToken]) -> None:
    for n, token in enumerate(tokens):
        # All layers in turn, as in a model: between two steps a layer's entries leave the processor's cache.
        for layer, decisions in enumerate(one.decisions):
            one.attend(layer, token, decisions[n - len(tokens)] if decisions else None)


def _ids(plan: Plan, batch: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(plan.shape.vocabulary, (batch, count), generator=generator, device=generator.device)


def _decode(one: Competitor, ids: torch.Tensor) -> None:
    for n in range(ids.shape[1]):
        one.model(input_ids=ids[:, n : n + 1], use_cache=True, **cache_argument(one.model, one.cache))


def _prefill(plan: Plan, found: list[Competitor], batch: int, context: int, generator: torch.Generator) -> list[Sample]:
    """Each reads a context into an empty cache as `generate` does; gates decide what is evicted."""
    seconds: list[list[float]] = [[] for _ in found]
    cr = [1.0 for _ in found]
    for _ in range(3 if context <= _LONG_PREFILL else 1):
        ids = _ids(plan, batch, context, generator)
        for i, one in enumerate(found):
            cache = one.empty_cache(context)
            given = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1, **cache_argument(one.model, cache)}
            seconds[i].append(_time(lambda one=one, given=given: one.model(**given), generator.device))
            cr[i] = _cr(one, cache)
    return [Sample(batch * context / median(s), len(s), sum(s), c) for s, c in zip(seconds, cr, strict=True)]


def _rows(plan: Plan, batch: int, context: int, found: list[Competitor], figures: list[dict[str, Sample]]) -> list[dict]:
    """One row a figure, and for a compacted cache one more beside each dense cache: how many times better it is."""
    common = {"model": str(plan.shape), "task": "bench_cache", "length": context, "batch": batch, "threads": torch.get_num_threads()}
    common |= {"seed": plan.seed, "versions": versions(), "device": describe_device()}
    dense = {one.policy: figure for one, figure in zip(found, figures, strict=True) if one.keep_LH is None}
    rows = []
    for one, figure in zip(found, figures, strict=True):
        whose = {"policy": one.policy, "evicted": one.evicted, "memory": "dense" if one.keep_LH is None else "compacted"}
        for metric, sample in figure.items():
            values = {metric: sample.value}
            for name, other in dense.items() if one.keep_LH is not None else ():
                gain = sample.value / other[metric].value
                values[f"{metric}_gain_over_{name}"] = gain if FIGURES[metric] else 1.0 / gain
            rest = {"num_samples": sample.num_samples, "cr": sample.cr, "bytes": figure["bytes"].value, "seconds": sample.seconds}
            rows += [{**common, **whose, "metric": name, "value": value, **rest} for name, value in values.items()]
    return rows

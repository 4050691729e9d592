"""`dms bench idle`: conversations in turn under a bound in bytes, of which the longest idle leave the device and come back."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from rich import box
from rich.table import Table

import dms
from dms.benchmarks.cache import parse_window
from dms.benchmarks.model import DEFAULT, QUICK, evicting_model
from dms.benchmarks.timing import seconds_of
from dms.cache import held_bytes
from dms.console import make_console
from dms.evaluation.stats.rows import describe_device
from dms.hf_compat import cache_argument

# Tokens of a turn; and how often each conversation comes for two of them.
_TURN, _ROUNDS = 8, 4


@dataclass(frozen=True)
class IdleFigures:
    """Of conversations that go to one place while they are idle."""

    place: str
    """"cpu", or "disk" """
    num_conversations: int
    max_bytes: int
    most_held: int
    """Bytes of all caches on the device, the most after any turn."""
    unbounded: int
    """What they hold there without a bound."""
    away: int
    """Bytes of all caches elsewhere, after the last turn."""
    leave_seconds: float
    """Of one cache's way there."""
    return_seconds: float
    """Of one cache's way back: the median over turns of a turn that brings one back, less one whose cache is on the device."""
    prefill_seconds: float
    """Of reading one conversation again, which is what a server does that has dropped it."""
    is_same: bool
    """Whether all logits are those of caches that never left, bit by bit."""


@torch.no_grad()
def run(
    context: int | None = None,
    conversations: int = 10,
    on_device: int = 4,
    evicted: float = 0.875,
    window: str = "256",
    quick: bool = False,
) -> list[IdleFigures]:
    """Measure with a random model whose gates evict a given share, and print a table. on_device: how many conversations the bound allows.

    Raises:
        ValueError: a bound that allows all of them, or none.
    """
    if not 0 < on_device < conversations:
        raise ValueError(
            f"on_device is {on_device} of {conversations} conversations; give a number from 1 to {conversations - 1}, so that some must leave"
        )
    seed = 7
    shape, device = (QUICK if quick else DEFAULT), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = context or (256 if quick else 2048)
    model = evicting_model(shape, parse_window(window), evicted, seed, device)
    texts = torch.randint(
        shape.vocabulary, (conversations, 1, context + 2 * _ROUNDS * _TURN), generator=torch.Generator().manual_seed(seed)
    ).to(device)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for place in ("cpu", folder):
            found.append(_measure(model, texts, context, on_device, place, device))
    make_console().print(
        _table(found, f"{shape}; {context:,} tokens each, {evicted:.1%} evicted, window {window}; {describe_device()}, float32")
    )
    return found


def _measure(model, texts: torch.Tensor, context: int, on_device: int, place: str, device: torch.device) -> IdleFigures:
    def read(cache, text, first: int, last: int) -> torch.Tensor:
        return model(input_ids=text[:, first:last], **cache_argument(model, cache), logits_to_keep=1).logits

    # Two turns in a row: the second finds its cache on the device.
    turns = [(first, first + _TURN) for first in range(context, context + 2 * _ROUNDS * _TURN, _TURN)]
    stays = [dms.DMSCache(model) for _ in texts]
    prefill = [seconds_of(partial(read, cache, text, 0, context), device) for cache, text in zip(stays, texts, strict=True)]
    expected = [[read(cache, text, *turn) for turn in turns] for cache, text in zip(stays, texts, strict=True)]
    # Tables and counts of those that are away stay.
    max_bytes = int(1.1 * max(held_bytes(cache) for cache in stays) * on_device)
    budget = dms.CacheBudget(max_bytes, spill=place)
    caches = [dms.DMSCache(model, budget=budget) for _ in texts]
    most, same = 0, True
    for cache, text in zip(caches, texts, strict=True):
        read(cache, text, 0, context)
        most = max(most, held_bytes(*caches))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(_ROUNDS):
        for cache, text, logits in zip(caches, texts, expected, strict=True):
            for turn in (2 * number, 2 * number + 1):
                found: list[torch.Tensor] = []
                was_away = cache.is_offloaded
                seconds[was_away].append(seconds_of(lambda: found.append(read(cache, text, *turns[turn])), device))  # noqa: B023 - called at once
                same &= torch.equal(found[0], logits[turn])
                most = max(most, held_bytes(*caches))
    reports = [cache.report(warn=False) for cache in caches]
    away = sum(report.bytes_host + report.bytes_disk for report in reports)
    leave = median(seconds_of(partial(cache.offload_to, place), device) for cache in caches if not cache.is_offloaded)
    return IdleFigures(
        place="cpu" if place == "cpu" else "disk",
        num_conversations=len(caches),
        max_bytes=max_bytes,
        most_held=most,
        unbounded=held_bytes(*stays),
        away=away,
        leave_seconds=leave,
        return_seconds=median(seconds[True]) - median(seconds[False]),
        prefill_seconds=median(prefill),
        is_same=same,
    )


def _table(found: Sequence[IdleFigures], title: str) -> Table:
    caption = f"of {found[0].num_conversations} conversations; a return makes room for itself: another one leaves"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption=caption)
    table.add_column("idle in", no_wrap=True)
    for name in ("no bound MB", "bound MB", "most MB", "away MB", "leave s", "return s", "prefill s", "logits"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            one.place,
            *(f"{x / 1e6:,.1f}" for x in (one.unbounded, one.max_bytes, one.most_held, one.away)),
            f"{one.leave_seconds:.3f}",
            f"{one.return_seconds:.3f}",
            f"{one.prefill_seconds:.2f}",
            "same" if one.is_same else "DIFFER",
        )
    return table

"""`dms bench batching`: tokens/s of `generate_batch` beside `generate` over left-padded batches, in one process on one machine.

Prompts and continuations are of mixed lengths, which are given: how long a text becomes does not depend on how it is decoded.
Shapes: N prompts, B sequences of a batch, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import StoppingCriteria, StoppingCriteriaList

import dms
from dms.batching import Prompt, generate_batch
from dms.benchmarks.model import evict_shares, keep_shares
from dms.benchmarks.timing import seconds_in_turns
from dms.console import make_console
from dms.io import base_models
from dms.modes import Mode, set_mode

_MODES: tuple[Mode, ...] = ("dense", "evict")


@dataclass(frozen=True, kw_only=True)
class BatchingBenchmark:
    """What is measured. Lengths are drawn evenly over their logarithms."""

    model: str = "builtin:tiny"
    num_prompts: int = 24
    batch_size: int = 8
    prompt_tokens: tuple[int, int] = (16, 256)
    new_tokens: tuple[int, int] = (8, 128)
    window: int = 32
    evicted: float = 0.75
    """Share of tokens that random gates evict."""
    repeats: int = 3
    """Turns, whose medians the figures are."""
    seed: int = 7


@dataclass(frozen=True)
class BatchingFigures:
    """Of one mode."""

    mode: str
    generate: float
    """New tokens/s of `generate`, over batches of batch_size in the order of the prompts."""
    generate_batch: float
    """The same of `generate_batch`."""
    same_tokens: float
    """Share of the prompts that got the same tokens of both: decisions and choices next to their thresholds may fall otherwise."""


def run(benchmark: BatchingBenchmark) -> list[BatchingFigures]:
    """Measure, and print a table."""
    model = base_models.load_base(benchmark.model, "float32")
    model.requires_grad_(False)
    dms.retrofit(model, dms.DMSConfig(window=benchmark.window))
    heads = [layer.num_heads for layer in model.dms.layers]
    evict_shares(model, keep_shares(len(heads), heads[0], benchmark.evicted, benchmark.seed), benchmark.seed)
    prompts, num_new = _make_texts(benchmark, model.config.get_text_config().vocab_size)
    figures = [_measure(benchmark, model, mode, prompts, num_new) for mode in _MODES]
    make_console().print(_table(benchmark, figures, num_new))
    return figures


def _make_texts(benchmark: BatchingBenchmark, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Random prompts, and the lengths [N] of their continuations."""
    random = Random(benchmark.seed)

    def length(least: int, most: int) -> int:
        return round(math.exp(random.uniform(math.log(least), math.log(most))))

    prompts = [[random.randrange(vocab_size) for _ in range(length(*benchmark.prompt_tokens))] for _ in range(benchmark.num_prompts)]
    return prompts, [length(*benchmark.new_tokens) for _ in prompts]


class _AtLength(StoppingCriteria):
    """Each sequence of a batch ends at its own length [B]."""

    def __init__(self, length_B: Sequence[int]):
        self.length_B = torch.tensor(length_B)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.length_B.to(input_ids.device)


def _in_batches(benchmark: BatchingBenchmark, model: Any, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
    """Continuations as `generate` makes them for a batch after another."""
    found, size = [], benchmark.batch_size
    for first in range(0, len(prompts), size):
        batch, wanted = prompts[first : first + size], num_new[first : first + size]
        width = max(map(len, batch))
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in batch], device=model.device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
        stop = StoppingCriteriaList([_AtLength([width + length for length in wanted])])
        out = model.generate(ids_BT, attention_mask=mask_BT, stopping_criteria=stop, **_settings(num_new))
        found += [new[:length] for new, length in zip(out[:, width:].tolist(), wanted, strict=True)]
    return found


def _continuously(benchmark: BatchingBenchmark, model: Any, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
    given = [Prompt(ids, stopping_criteria=[_AtLength([len(ids) + length])]) for ids, length in zip(prompts, num_new, strict=True)]
    found = generate_batch(model, given, max_batch_size=benchmark.batch_size, **_settings(num_new))
    return [continuation.tokens for continuation in sorted(found)]


def _settings(num_new: list[int]) -> dict[str, Any]:
    return {"max_new_tokens": max(num_new), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _measure(benchmark: BatchingBenchmark, model: Any, mode: Mode, prompts: list[list[int]], num_new: list[int]) -> BatchingFigures:
    set_mode(model, mode)
    found: dict[str, list[list[int]]] = {}

    def keep(name: str, work: Callable[[], list[list[int]]]) -> None:
        found[name] = work()

    ways = {"generate": _in_batches, "generate_batch": _continuously}
    works = [partial(keep, name, partial(way, benchmark, model, prompts, num_new)) for name, way in ways.items()]
    turns = [seconds_in_turns(works, model.device, first=turn) for turn in range(benchmark.repeats)]
    rates = [sum(num_new) / median(seconds) for seconds in zip(*turns, strict=True)]
    same = [one == other for one, other in zip(*found.values(), strict=True)]
    return BatchingFigures(mode, rates[0], rates[1], sum(same) / len(same))


def _table(benchmark: BatchingBenchmark, figures: list[BatchingFigures], num_new: list[int]) -> Table:
    size = benchmark.batch_size
    batches = [num_new[first : first + size] for first in range(0, len(num_new), size)]
    idle = 1 - sum(num_new) / sum(len(batch) * max(batch) for batch in batches)
    table = Table(
        title=f"{benchmark.model}, {len(num_new)} prompts of {'-'.join(map(str, benchmark.prompt_tokens))} tokens, {min(num_new)}-{max(num_new)} "
        f"new ones each, {size} at a time, {torch.get_num_threads()} threads",
        title_justify="left",
        box=box.SIMPLE,
        caption=f"{idle:.0%} of what generate decodes belongs to sequences that have ended",
    )
    for name in ("mode", "generate tok/s", "generate_batch tok/s", "ratio", "same tokens"):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    for one in figures:
        rates = f"{one.generate:,.0f}", f"{one.generate_batch:,.0f}", f"{one.generate_batch / one.generate:.2f}"
        table.add_row(one.mode, *rates, f"{one.same_tokens:.0%}")
    return table

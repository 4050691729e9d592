"""`dms bench decode`: what decoding a retrofitted model takes of this machine beside the same model dense, context by context.

Every case runs in a process of its own, so that the memory which it is measured to take is nobody else's, and one that needs more than
there is ends alone. Shapes: B sequences, T tokens.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import DynamicCache

from dms.benchmarks.timing import seconds_of
from dms.cache import DMSCache, held_bytes
from dms.console import make_console
from dms.errors import writing
from dms.evaluation.data.text_sources import GivenText, StdlibText
from dms.evaluation.stats.rows import describe_device, versions
from dms.hf_compat import cache_argument
from dms.io import base_models, checkpoint
from dms.modes import set_mode

DTYPES = ("float32", "bfloat16", "float16")
_CHARS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """What is measured: every dtype, context and batch, dense and at each operating point."""

    model: str
    base: str | None = None
    other_base: bool = False
    dtype: tuple[str, ...] = ("float32",)
    context: tuple[int, ...] = (4096,)
    batch: tuple[int, ...] = (1, 4)
    evict_bias: tuple[float, ...] = (0.0,)
    text: str | None = None
    """A file or folder; None: held-out sources of the standard library."""
    prefill_chunk: int = 512
    """Tokens of a prompt that are read at once, dense or not."""
    steps: int = 32
    """Tokens that are decoded after the context and timed one by one."""
    seed: int = 7

    def __post_init__(self):
        if unknown := [name for name in self.dtype if name not in DTYPES]:
            raise ValueError(f"--dtype is {unknown[0]!r}; give one of {', '.join(DTYPES)}")
        if min(self.context) < 2 or min(self.batch) < 1 or self.steps < 1:
            raise ValueError(
                f"context is {list(self.context)}, batch {list(self.batch)}, steps {self.steps}; give contexts from 2, and 1 or more"
            )


@dataclass(frozen=True)
class Case:
    """One process' work. evict_bias: None: dense."""

    dtype: str
    context: int
    batch: int
    evict_bias: float | None


@dataclass(frozen=True)
class Figures:
    """Of one case. Bytes are of the process, resident, on a GPU those that torch holds there."""

    loaded_bytes: int
    """When the model was loaded."""
    bytes: int
    """While it decodes, what was freed given back."""
    peak_bytes: int
    """At most, the reading of the context included."""
    cache_bytes: int
    """Of the cache's tensors."""
    cr: float
    tokens_per_second: float
    """Of decoding, from the median step."""
    prefill_seconds: float
    seconds: float


def run(benchmark: DecodeBenchmark, out: str | None = None) -> list[tuple[Case, Figures | str]]:
    """Measure, print a table, return (and write to `out`) the rows; a case that failed has its error instead.

    Raises:
        ValueError: a context that is longer than the model's.
    """
    config = base_models.load_config(benchmark.base or benchmark.model)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max(benchmark.context) + benchmark.steps > longest:
        raise ValueError(
            f"--context has {max(benchmark.context)}, and with {benchmark.steps} new tokens it is above the model's context of {longest} tokens"
        )
    console, found = make_console(), []
    for case in _cases(benchmark):
        console.print(_words(case), highlight=False, end=" ")
        measured = _in_a_process(benchmark, case)
        console.print(measured if isinstance(measured, str) else f"{measured.tokens_per_second:,.1f} tokens/s", highlight=False)
        found.append((case, measured))
    console.print(decode_table(benchmark, found))
    if out:
        with writing(out):
            Path(out).write_text(json.dumps({"model": benchmark.model, "rows": _rows(benchmark, found)}, indent=1), encoding="utf-8")
    return found


def _cases(benchmark: DecodeBenchmark) -> list[Case]:
    biases = (None, *benchmark.evict_bias)
    return [Case(d, c, b, bias) for d in benchmark.dtype for c in benchmark.context for b in benchmark.batch for bias in biases]


def _words(case: Case) -> str:
    kind = "dense" if case.evict_bias is None else f"evict_bias {case.evict_bias:+g}"
    return f"{case.dtype}, {case.context:,} tokens, batch {case.batch}, {kind}:"


def _in_a_process(benchmark: DecodeBenchmark, case: Case) -> Figures | str:
    given = json.dumps({"benchmark": asdict(benchmark), "case": asdict(case)})
    done = subprocess.run([sys.executable, "-m", __name__, given], capture_output=True, text=True)
    if done.returncode == 0:
        return Figures(**json.loads(done.stdout.splitlines()[-1]))
    if done.returncode < 0:
        # As the kernel does it where memory is out.
        return f"killed by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or ["failed"])[-1]


# In a process of its own.


@torch.no_grad()
def measure(benchmark: DecodeBenchmark, case: Case) -> Figures:
    """One case, in this process."""
    model = checkpoint.load(
        benchmark.model, base=benchmark.base, other_base=benchmark.other_base, dtype=case.dtype, evict_bias=case.evict_bias or 0.0
    )
    device = next(model.parameters()).device
    ids_BT = _texts(benchmark, case).to(device)
    set_mode(model, "dense" if case.evict_bias is None else "evict")
    cache: Any = DynamicCache(config=model.config) if case.evict_bias is None else DMSCache(model)
    loaded = _held(device)
    last_B1 = ids_BT[:, -1:]

    def forward(ids_Bn: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids_Bn, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)).logits[:, -1:].argmax(-1)

    def read() -> None:
        nonlocal last_B1
        for part in ids_BT.split(benchmark.prefill_chunk, 1):
            last_B1 = forward(part)

    def step() -> None:
        nonlocal last_B1
        last_B1 = forward(last_B1)

    prefill = seconds_of(read, device)
    seconds = [seconds_of(step, device) for _ in range(benchmark.steps)]
    cr = 1.0 if case.evict_bias is None else cache.report(warn=False).cr
    return Figures(
        loaded_bytes=loaded,
        bytes=_held(device),
        peak_bytes=_peak(device),
        cache_bytes=held_bytes(cache),
        cr=cr,
        tokens_per_second=case.batch / median(seconds),
        prefill_seconds=prefill,
        seconds=sum(seconds),
    )


def _texts(benchmark: DecodeBenchmark, case: Case) -> torch.Tensor:
    """[B, T]: running text from places of its own for each sequence, the same for every kind of case."""
    tokenizer = base_models.load_tokenizer(benchmark.base or benchmark.model)
    text = StdlibText(held_out=True) if benchmark.text is None else GivenText([benchmark.text])
    rows = []
    for row in range(case.batch):
        rng = Random(f"decode:{benchmark.seed}:{case.context}:{row}")
        ids = tokenizer("".join(text.lines(rng, _CHARS_PER_TOKEN * case.context)))["input_ids"][: case.context]
        if len(ids) < case.context:
            raise ValueError(f"the text has {len(ids)} tokens from one place on, fewer than a context of {case.context}; give more text")
        rows.append(ids)
    return torch.tensor(rows)


def _held(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        # What the allocator keeps for later is no need of the model's.
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# What is shown.


def _rows(benchmark: DecodeBenchmark, found: Sequence[tuple[Case, Figures | str]]) -> list[dict[str, Any]]:
    shared = {
        "model": benchmark.model,
        "task": "bench_decode",
        "threads": torch.get_num_threads(),
        "seed": benchmark.seed,
        "versions": versions(),
        "device": describe_device(),
        "num_samples": benchmark.steps,
    }
    rows = []
    for case, measured in found:
        dense = case.evict_bias is None
        about = shared | {"policy": "dense" if dense else "dms", "memory": "dense" if dense else "compacted", "length": case.context}
        about |= {"batch": case.batch, "dtype": case.dtype, "evict_bias": case.evict_bias}
        if isinstance(measured, str):
            rows.append(about | {"metric": "error", "value": measured})
            continue
        figures = asdict(measured)
        about |= {"cr": figures.pop("cr"), "seconds": figures.pop("seconds")}
        rows += [about | {"metric": name, "value": value} for name, value in figures.items()]
    return rows


def decode_table(benchmark: DecodeBenchmark, found: Sequence[tuple[Case, Figures | str]]) -> Table:
    table = Table(
        title=f"{benchmark.model}, {torch.get_num_threads()} threads, {describe_device()}",
        title_justify="left",
        box=box.SIMPLE,
        caption="beyond: resident while decoding, less the loaded model; x: how many times better than dense",
    )
    for name in ("dtype", "context", "batch", "cache", "cr", "tokens/s", "x", "cache MB", "x", "resident MB", "beyond MB", "x", "peak MB"):
        table.add_column(name, justify="left" if name in ("dtype", "cache") else "right", no_wrap=True)
    dense = {replace(case, evict_bias=None): measured for case, measured in found if case.evict_bias is None}
    for case, measured in found:
        where = case.dtype, f"{case.context:,}", str(case.batch), "dense" if case.evict_bias is None else f"bias {case.evict_bias:+g}"
        if isinstance(measured, str):
            table.add_row(*where, measured)
            continue
        beside = dense.get(replace(case, evict_bias=None))
        other = measured if beside is None or isinstance(beside, str) else beside
        beyond, of_other = measured.bytes - measured.loaded_bytes, other.bytes - other.loaded_bytes
        table.add_row(
            *where,
            f"{measured.cr:.2f}",
            f"{measured.tokens_per_second:,.1f}",
            f"{measured.tokens_per_second / other.tokens_per_second:.2f}",
            f"{measured.cache_bytes / 1e6:,.0f}",
            f"{other.cache_bytes / measured.cache_bytes:.2f}",
            f"{measured.bytes / 1e6:,.0f}",
            f"{beyond / 1e6:,.0f}",
            f"{of_other / max(1, beyond):.2f}",
            f"{measured.peak_bytes / 1e6:,.0f}",
        )
    return table


def main(given: str) -> None:
    values = json.loads(given)
    benchmark: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values["benchmark"].items()}
    print(json.dumps(asdict(measure(DecodeBenchmark(**benchmark), Case(**values["case"])))))


if __name__ == "__main__":
    main(sys.argv[1])

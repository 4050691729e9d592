"""Time the kernels under other launch parameters than they pick for themselves, on this machine's GPU.

All variants are compiled first, by several processes, into Triton's cache. Each result is printed as soon as it is known.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from multiprocessing import active_children, get_context
from pathlib import Path
from unittest.mock import patch

from bench.shapes import MODELS, Shape

SWEEPS = ("decode", "int8", "attention", "append")
# Of one call of training attention: those with a choice of tiles, and those without.
_PRODUCTS = {"forward": "forward_kernel", "queries": "queries_kernel", "keys": "keys_kernel"}
_OTHERS = ("measure_kernel", "list_kernel", "gather_kernel", "delta_kernel")
# How far a variant may be from the default, in half precision.
_SAME = 1e-2
# Tokens of a shape that is only compiled for: multiples of 16, as compiled code depends on it.
_FEW = 1024


@dataclass(frozen=True)
class Variant:
    """changes: to the launch parameters (`DecodeLaunch`, `AppendLaunch`, `Tile`) that are picked, none for the default. kernel: of attention, whose
    tile changes."""

    sweep: str
    shape: Shape
    kernel: str = ""
    changes: dict[str, int | bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = ", ".join(f"{name} {value}" for name, value in self.changes.items())
        return " ".join(filter(None, (self.sweep, self.shape.name, self.kernel, changed or "default")))

    @property
    def group(self) -> tuple[str, Shape]:
        return self.sweep, self.shape


def _tiles(kernel: str, *tiles: tuple[int, int, int, int]) -> list[tuple[str, dict]]:
    names = ("rows", "keys", "warps", "stages")
    return [(kernel, dict(zip(names, tile, strict=True))) for tile in tiles]


# The default's row first in each. What a launch costs that has next to nothing to read is the "1K" of decoding.
_DECODE_ONE = [
    {},
    # A head of half of all entries is cut into 60 parts: 4 rounds of a merge that nobody else helps with.
    {"tree": True},
    {"tree": True, "parts": 8},
    {"parts": 32, "num_warps": 8},
    {"num_warps": 8},
    # Fewer parts of each head, longer runs.
    {"num_programs": 66, "waves": 1},
    {"num_programs": 132, "waves": 1},
    # More programs, shorter runs.
    {"share": 2},
    {"tree": True, "share": 2},
    {"tree": True, "share": 1},
    # Equal runs come out more equal, and three programs fit a processor.
    {"tile": 32, "num_stages": 5, "share": 8},
    {"tree": True, "tile": 32, "num_stages": 5, "share": 8},
    {"tree": True, "tile": 32, "num_stages": 5, "share": 4},
    {"tree": True, "tile": 32, "num_stages": 5, "share": 4, "parts": 8},
    {"tile": 32, "num_stages": 4, "share": 2, "waves": 3, "num_programs": 396},
    {"num_stages": 3},
    {"tree": True, "num_stages": 6},
]
_DECODE_FEW = [
    {},
    # One program a processor, with all of its memory.
    {"waves": 1, "num_programs": 132, "num_stages": 7},
    {"waves": 1, "num_programs": 132, "num_stages": 7, "num_warps": 8},
    # Programs hide each other's changes of head.
    {"waves": 3, "num_programs": 396, "num_stages": 4, "tile": 32},
    {"tree": True},
    {"tile": 32, "num_stages": 6},
    {"num_stages": 3},
    {"share": 8},
    {"parts": 8},
]
# Bound by instructions: more warps to issue them, or tiles that take fewer.
_INT8 = [
    {},
    {"num_warps": 8},
    {"num_warps": 8, "waves": 1, "num_programs": 132, "num_stages": 6},
    {"tile": 32, "num_stages": 6},
    {"tile": 128, "num_warps": 8, "num_stages": 3, "waves": 1, "num_programs": 132},
    {"num_stages": 3},
    {"waves": 1, "num_programs": 132, "num_stages": 6},
]
# What the compiler says at head dim 128: 8 warps fill a processor's registers with one block, 4 warps leave room for two, and one's
# exponentials run beside the other's products. 128 rows on 4 warps, or 128 x 128 tiles of the backward, spill too much to be tried.
_ATTENTION = [
    ("", {}),
    *_tiles("keys", (32, 128, 8, 3), (32, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (64, 64, 8, 3), (32, 64, 4, 2), (32, 128, 8, 4)),
    *_tiles("forward", (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 4), (64, 32, 4, 4)),
    *_tiles("queries", (64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 4), (128, 32, 8, 4)),
]
_APPEND = [
    {},
    {"num_warps": 8},
    {"num_warps": 2},
    {"num_warps": 8, "block": 2048},
    {"num_warps": 4, "block": 1024},
    {"num_warps": 16},
]


def _shape(operation: str, batch: int, tokens: int, ratio: float) -> Shape:
    return Shape(operation=operation, model="8B", tokens=1024 * tokens, batch=batch, ratio=ratio, **MODELS["8B"])


def all_variants() -> list[Variant]:
    """What is worth most to know first: a budget cuts off the end."""

    def decode(batch: int, tokens: int, ratio: float, changes: list[dict], sweep: str = "decode") -> list[Variant]:
        return [Variant(sweep, _shape("decode", batch, tokens, ratio), changes=change) for change in changes]

    def attention(tokens: int, ratio: float, only: tuple[str, ...] = ("", *_PRODUCTS)) -> list[Variant]:
        shape = _shape("attention", 1, tokens, ratio)
        return [Variant("attention", shape, kernel, change) for kernel, change in _ATTENTION if kernel in only]

    return [
        *decode(1, 32, 8, _DECODE_ONE),
        *attention(32, 8),
        *decode(8, 32, 8, _DECODE_FEW),
        *decode(64, 32, 8, _INT8, "int8"),
        *(Variant("append", _shape("append", 1, 32, 8), changes=change) for change in _APPEND),
        *attention(32, 1),
        *decode(1, 1, 8, _DECODE_ONE[:3]),
        *attention(8, 8),
        *decode(4, 8, 16, _DECODE_FEW[:5]),
        *decode(1, 32, 1, _DECODE_ONE),
        *decode(1, 128, 8, _DECODE_ONE[:5]),
        *decode(64, 32, 8, _DECODE_FEW[:5]),
        *(Variant("append", _shape("append", 64, 32, 8), changes=change) for change in _APPEND[:4]),
        *attention(8, 1),
        *decode(8, 32, 8, _INT8[:4], "int8"),
    ]


@contextmanager
def launching(variant: Variant) -> Iterator[None]:
    """Inside, launches take the variant's parameters."""
    from dms_kernels.append import fused as append
    from dms_kernels.gated_attention import launch as attention
    from dms_kernels.paged_decode import fused as decode

    with ExitStack() as stack:
        if variant.changes and variant.sweep == "attention":
            pick = attention.pick_tile

            def pick_tile(kernel, *arguments):
                tile = pick(kernel, *arguments)
                return replace(tile, **variant.changes) if kernel == variant.kernel else tile

            stack.enter_context(patch.object(attention, "pick_tile", pick_tile))
        elif variant.changes:
            module = append if variant.sweep == "append" else decode
            launch = module.launch
            stack.enter_context(patch.object(module, "launch", lambda *a, **options: replace(launch(*a, **options), **variant.changes)))
        yield


class Launches:
    """Stands between the package and Triton: what was launched under which name, and the time of each on the GPU if timed."""

    def __init__(self, *, timed: bool = False, compile_only: str | None = None):
        """compile_only: compile this kernel, skip the others and launch none of them."""
        self.timed, self.compile_only = timed, compile_only
        self.kernels: dict[str, object] = {}
        self._events: list[tuple] = []

    @contextmanager
    def watched(self) -> Iterator["Launches"]:
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def watch(kernel, *arguments, grid, warmup, **options):
            name = kernel.fn.__name__
            if self.compile_only is not None:
                return run(kernel, *arguments, grid=grid, warmup=True, **options) if self.compile_only in ("", name) else None
            if not self.timed:
                self.kernels[name] = run(kernel, *arguments, grid=grid, warmup=warmup, **options)
                return self.kernels[name]
            import torch

            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.kernels[name] = run(kernel, *arguments, grid=grid, warmup=warmup, **options)
            end.record()
            self._events.append((name, start, end))
            return self.kernels[name]

        with patch.object(JITFunction, "run", watch):
            yield self

    def milliseconds(self, calls: int) -> dict[str, float]:
        """Of each kernel in one call, after `calls` of them."""
        found: dict[str, float] = {}
        for name, start, end in self._events:
            found[name] = found.get(name, 0.0) + start.elapsed_time(end) / calls
        return found


def decode_calls(shape: Shape, device: str, dtype, *, int8: bool, sets: int | None = None) -> list[Callable]:
    from bench import decode

    competitor = decode.competitors(shape, device, dtype)[1 if int8 else 0]
    if sets is None:
        return competitor.prepare()
    with patch.object(decode, "num_sets", lambda num_bytes: sets):
        return competitor.prepare()


def append_results(shape: Shape, device: str, dtype) -> list:
    """The queries and the state after a few steps."""
    from bench import append

    layer = append.Layer(shape, device, dtype, 8)
    for _ in range(3):
        q = layer.step()
    return [q, layer.state()]


def attention_call(shape: Shape, device: str, dtype) -> Callable[[], list]:
    """out and the gradients of q, k, v and log_keep."""
    import torch

    from bench import attention

    x = attention._inputs(shape, device, dtype)
    leaves = [x[name] for name in ("q", "k", "v", "log_keep")]

    def call():
        out = attention.gated_attention(*leaves, window=shape.window, scale=shape.scale, segment_ids=None)
        return [out.detach(), *torch.autograd.grad(out, leaves, x["grad"])]

    return call


class Bench:
    """One sweep at one shape: its inputs, and the default's results to compare with."""

    def __init__(self, sweep: str, shape: Shape, device: str = "cuda", dtype=None):
        import torch

        self.sweep, self.shape, self.device, self.dtype = sweep, shape, device, dtype or torch.bfloat16
        self.calls: list[Callable] = []
        if sweep == "attention":
            self.calls = [attention_call(shape, device, self.dtype)]
        elif sweep in ("decode", "int8"):
            self.calls = decode_calls(shape, device, self.dtype, int8=sweep == "int8")
        self.wanted = self.results()

    def results(self) -> list:
        if self.sweep == "append":
            return append_results(self.shape, self.device, self.dtype)
        found = self.calls[0]()
        return found if isinstance(found, list) else [found.clone()]

    def error(self) -> float:
        from bench.inputs import relative_error

        return max(relative_error(found, wanted) for found, wanted in zip(self.results(), self.wanted, strict=True))

    def time(self) -> dict[str, float]:
        """Milliseconds on the GPU: of each kernel, of all under "whole"."""
        from bench.measuring import milliseconds

        if self.sweep == "attention":
            return self._time_kernels()
        if self.sweep == "append":
            from bench import append

            return {"whole": milliseconds([append.steps(self.shape, self.device, self.dtype)], graph=True, seconds=0.03)}
        return {"whole": milliseconds(self.calls, graph=True, seconds=0.1)}

    def _time_kernels(self) -> dict[str, float]:
        import torch

        call, spans = self.calls[0], []
        launches = Launches(timed=True)
        # A GPU that has something to do when the first call comes lets the host run ahead, so that its time shows nowhere.
        torch.cuda._sleep(20_000_000)
        call()
        repeats = 4
        with launches.watched():
            for _ in range(repeats):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                spans.append((start, end))
        torch.cuda.synchronize()
        whole = statistics.median(start.elapsed_time(end) for start, end in spans)
        return {"whole": whole, **launches.milliseconds(repeats)}


def measure(bench: Bench, variant: Variant, default: dict[str, float]) -> dict:
    """One row. default: what the default's `Bench.time` gave, empty for the default itself."""
    from bench.run import FAILURES

    row = {"sweep": variant.sweep, "shape": variant.shape.name, "kernel": variant.kernel, "changes": variant.changes}
    counted = _PRODUCTS.get(variant.kernel, "whole")
    try:
        with launching(variant):
            launches = Launches()
            with launches.watched():
                row["error"] = bench.error()
            row["compiled"] = {name: compiled_size(kernel) for name, kernel in launches.kernels.items()}
            row["same"] = row["error"] <= _SAME
            row["all_ms"] = bench.time()
    except FAILURES as failure:
        return row | {"ms": None, "problem": f"{type(failure).__name__}: {failure}".splitlines()[0]}
    row["ms"] = row["all_ms"][counted]
    row["of_default"] = row["ms"] / default[counted] if default else 1.0
    return row | {"problem": None if row["same"] else f"{row['error']:.2g} from the default's results"}


def compiled_size(kernel) -> dict[str, int]:
    return {"registers": getattr(kernel, "n_regs", 0), "spills": getattr(kernel, "n_spills", 0), "shared": kernel.metadata.shared}


def line(row: dict) -> str:
    changed = ", ".join(f"{name} {value}" for name, value in row["changes"].items()) or "default"
    text = f"{row['sweep']:9} {row['shape']:22} {row['kernel']:8} {changed:60}"
    if row["ms"] is None:
        return f"{text} {row['problem']}"
    sizes = [size for name, size in row["compiled"].items() if row["kernel"] in ("", name.removesuffix("_kernel"))]
    biggest = max(sizes, key=lambda size: size["registers"], default={"registers": 0, "spills": 0, "shared": 0})
    parts = (
        "".join(f"\n{'':12}{name} {ms:.4f}" for name, ms in row["all_ms"].items())
        if row["sweep"] == "attention" and not row["changes"]
        else ""
    )
    said = f"{text} {row['ms']:.5f} ms {row['of_default']:6.3f} of default, error {row['error']:.1e}, {biggest['registers']} registers, "
    return f"{said}{biggest['spills']} spilled, {biggest['shared'] // 1024} KB{'' if row['same'] else '  DIFFERS'}{parts}"


def run(variants: list[Variant], *, out: Path | None, end: float, make: Callable[[str, Shape], Bench]) -> list[dict]:
    """Rows. make: the bench of a sweep and a shape. end: on time.monotonic's clock."""
    from bench.measuring import machine
    from bench.rows import write_row
    from bench.run import FAILURES

    where, rows = machine(), []
    defaults: dict[tuple[str, Shape], dict[str, float]] = {}
    for group, members in groupby(variants, lambda variant: variant.group):
        bench = None
        for variant in members:
            if time.monotonic() > end:
                print(f"dropped for lack of time: from {variant.name} on", flush=True)
                return rows
            try:
                bench = bench or make(*group)
                row = measure(bench, variant, defaults.get(group, {}))
            except FAILURES as failure:
                # The default itself fails: nothing here has a measure.
                print(f"{group[0]} {group[1].name}: {type(failure).__name__}: {failure}", flush=True)
                break
            if not variant.changes and row["ms"] is not None:
                defaults[group] = row["all_ms"]
            rows.append(row)
            print(line(row), flush=True)
            write_row(out, row | where)
        bench = None
        _free()
    return rows


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def best(rows: list[dict]) -> str:
    """A line for each kernel and shape: its fastest variant."""
    fastest: dict[tuple, dict] = {}
    for row in rows:
        key = row["sweep"], row["shape"], row["kernel"]
        if row["ms"] is not None and row["same"] and (key not in fastest or row["ms"] < fastest[key]["ms"]):
            fastest[key] = row
    return "\n".join(f"best: {line(row)}" for row in fastest.values())


def compile_all(variants: list[Variant], *, seconds: float, workers: int) -> set[str]:
    """Into Triton's cache; what is not done in time is compiled when its turn comes. Names of variants that crash the compiler."""
    jobs: dict[str, tuple[Variant, str]] = {}
    for variant in variants:
        defaults = [*_PRODUCTS.values(), *_OTHERS] if variant.sweep == "attention" else [""]
        for kernel in [_PRODUCTS[variant.kernel]] if variant.kernel else defaults:
            # Other lengths are the same code.
            jobs.setdefault(f"{variant.sweep} {variant.shape.batch} {kernel} {variant.changes}", (variant, kernel))
    start = time.monotonic()
    # A process that dies takes what was handed to its pool with it, so that each has a pool of its own.
    pools = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(min(workers, len(jobs)))]
    queues = [
        [(variant, pool.submit(_compile, variant, kernel)) for variant, kernel in list(jobs.values())[i :: len(pools)]]
        for i, pool in enumerate(pools)
    ]
    done, left = wait([future for queue in queues for _, future in queue], timeout=seconds)
    crashed = {}
    for queue in queues:
        broken = [variant for variant, future in queue if future in done and isinstance(future.exception(), BrokenProcessPool)]
        if broken:
            crashed[broken[0].name] = f"{broken[0].name}: the compiler crashed"
    problems = [future.result() for future in done if future.exception() is None and future.result()]
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)
    if left:
        for process in active_children():
            process.kill()
    print(f"compiled {len(done)} of {len(jobs)} in {time.monotonic() - start:.0f} s", *problems, *crashed.values(), sep="\n", flush=True)
    return set(crashed)


def _compile(variant: Variant, kernel: str) -> str | None:
    """What went wrong, if anything."""
    from bench.run import FAILURES

    os.environ["DMS_KERNELS"] = "triton"
    try:
        call = _call_to_compile(variant.sweep, variant.shape)
        with launching(variant), Launches(compile_only=kernel).watched():
            call()
    except FAILURES as failure:
        return f"{variant.name}: {type(failure).__name__}: {failure}".splitlines()[0]
    return None


@cache
def _call_to_compile(sweep: str, shape: Shape, device: str = "cuda") -> Callable:
    import torch

    dtype = torch.bfloat16
    if sweep == "attention":
        return attention_call(replace(shape, tokens=_FEW), device, dtype)
    if sweep == "append":
        return lambda: append_results(replace(shape, tokens=_FEW), device, dtype)
    return decode_calls(replace(shape, tokens=_FEW), device, dtype, int8=sweep == "int8", sets=1)[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--only", metavar="NAMES", default=",".join(SWEEPS), help="sweeps, comma-separated (default: %(default)s)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=float("inf"), help="drop what is left after so long")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append rows to this file, as lines of JSON")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, min(12, (os.cpu_count() or 1) - 2)),
        help="processes that compile; 0: what is in the cache will do (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="fill the cache, measure nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    only = options.only.split(",")
    unknown = sorted(set(only) - set(SWEEPS))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(SWEEPS)}")

    import torch

    if not torch.cuda.is_available():
        print("bench.tune: no GPU here, and there is nothing to measure without one", file=sys.stderr)
        return 2
    os.environ["DMS_KERNELS"] = "triton"
    variants = [variant for variant in all_variants() if variant.sweep in only]
    if options.workers:
        share = 1.0 if options.compile else 0.4
        crashed = compile_all(variants, seconds=min(600.0, share * options.budget), workers=options.workers)
        variants = [variant for variant in variants if variant.name not in crashed]
    if options.compile:
        return 0
    rows = run(variants, out=options.out, end=end, make=Bench)
    print(best(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

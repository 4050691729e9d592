"""Runs shapes one after another: parity first, then every competitor, each failure a row of its own."""

import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.inputs import relative_error
from bench.measuring import Ceilings, Competitor, Parity, machine, measure_ceilings, milliseconds
from bench.rows import make_row, table, write_row
from bench.shapes import Shape

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

# What compilers, allocators and other people's libraries raise. An interruption is none of these.
FAILURES = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError, TritonError)
# How far a competitor that computes the same may be from ours, in half precision.
_SAME = 3e-2


def run_on_gpu(shapes: list[Shape], *, out: Path | None, budget: float) -> int:
    """0 if every parity was good, else 1. Prints the table."""
    end = time.monotonic() + budget
    ceilings = measure_ceilings()
    rows, dropped = run(
        shapes,
        device="cuda",
        dtype=torch.bfloat16,
        ceilings=ceilings,
        measure=lambda competitor, calls: milliseconds(calls, graph=competitor.graph),
        out=out,
        time_is_over=lambda: time.monotonic() > end,
    )
    print(f"copy {ceilings.copy_gbps:,.0f} GB/s, bf16 matrix product {ceilings.gemm_tflops:,.0f} TFLOP/s\n{table(rows)}")
    if dropped:
        print(f"dropped for lack of time: {'; '.join(dropped)}")
    return 1 if any((row["problem"] or "").startswith("parity") for row in rows) else 0


def run(
    shapes: list[Shape],
    *,
    device: str,
    dtype: torch.dtype,
    ceilings: Ceilings,
    measure: Callable[[Competitor, list[Callable]], float],
    out: Path | None = None,
    time_is_over: Callable[[], bool] = lambda: False,
) -> tuple[list[dict], list[str]]:
    """Rows, and names of what time was too short for."""
    where = machine()
    rows: list[dict] = []
    dropped: list[str] = []
    parities: dict[Shape, Parity | str] = {}

    def add(shape: Shape, competitor: Competitor, **results) -> None:
        row = make_row(shape, competitor, where, ceilings, **results)
        rows.append(row)
        write_row(out, row)
        said = f"{row['ms']:.4g} ms" if row["ms"] is not None else row["problem"]
        print(f"{shape.operation}, {shape.name}, {competitor.name}: {said}", file=sys.stderr, flush=True)

    for shape in shapes:
        if time_is_over():
            dropped.append(f"{shape.operation} {shape.name}")
            continue
        operation = importlib.import_module(f"bench.{shape.operation}")
        small = shape.small() if device != "cpu" else shape
        if small not in parities:
            parities[small] = _parity(operation, small, device, dtype)
            _free()
        found = parities[small]
        if isinstance(found, str) or not found.good:
            error = None if isinstance(found, str) else found.error
            problem = (
                found if isinstance(found, str) else f"parity: error {found.error:.2g} above {found.bound:.2g} at {small.name}, not timed"
            )
            add(shape, Competitor("ours", list), parity_error=error, problem=problem)
            continue
        ours_ms = ours_out = None
        for number, competitor in enumerate(operation.competitors(shape, device, dtype)):
            if time_is_over():
                dropped.append(f"{shape.operation} {shape.name}: {competitor.name}")
                continue
            if competitor.needs_gpu and device == "cpu":
                add(shape, competitor, problem="needs a GPU")
                continue
            calls: list[Callable] = []
            try:
                calls = competitor.prepare()
                result = calls[0]()
                error = found.error if number == 0 else None
                if number == 0:
                    ours_out = result
                elif competitor.same and ours_out is not None:
                    error = relative_error(result, ours_out)
                if competitor.same and error is not None and not error <= _SAME:
                    add(shape, competitor, parity_error=error, problem=f"parity: {error:.2g} from ours, not timed")
                    continue
                result = None
                ms = measure(competitor, calls)
            except FAILURES as failure:
                add(shape, competitor, problem=f"{type(failure).__name__}: {failure}")
            else:
                ours_ms = ms if number == 0 else ours_ms
                add(shape, competitor, ms=ms, ours_ms=ours_ms, parity_error=error)
            finally:
                calls = result = None
                _free()
        ours_out = None
        _free()
    return rows, dropped


def _parity(operation, shape: Shape, device: str, dtype: torch.dtype) -> Parity | str:
    try:
        return operation.parity(shape, device, dtype)
    except FAILURES as failure:
        return f"parity: {type(failure).__name__}: {failure}"


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        # After an illegal access everything raises; the table of what was measured is still to be printed.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

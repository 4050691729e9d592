"""Measure every operation against its competitors on this machine's GPU, within a time.

Parity of a few cases of each operation, then ours, then the others, then the rest of parity: the GPU tests, where pytest is.
"""

import argparse
import importlib.util
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench import dry
from bench.children import python, run_together
from bench.rows import table
from bench.session import Limits, NoDevice, Session
from bench.shapes import OPERATIONS, Shape, all_shapes

_ROOT = Path(__file__).parents[2]
_TESTS = {
    "attention": ("gated_attention",),
    "prefill": ("sparse_prefill",),
    "decode": ("paged_decode", "windows"),
    "append": ("append", "windows"),
    "loss": ("distill_loss",),
}
# What the tests have of the time, and what ending and printing take.
_SHARE_OF_TESTS, _SECONDS_TO_END = 0.25, 4.0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 on")
    return seconds


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("budget", nargs="?", type=_seconds, default=480.0, metavar="BUDGET", help="seconds that all may take (480)")
    parser.add_argument("--quick", action="store_true", help="the short list of shapes, and no tests")
    parser.add_argument("--only", metavar="NAMES", default=",".join(OPERATIONS), help="operations, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append rows to this file, as lines of JSON; table.txt, tests and logs of processes lie beside it",
    )
    options = parser.parse_intermixed_args(arguments)
    options.only = options.only.split(",")
    unknown = sorted(set(options.only) - set(OPERATIONS))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(OPERATIONS)}")
    try:
        options.dry = dry.mode()
    except ValueError as problem:
        parser.error(str(problem))
    return options


def _tests(only: list[str]) -> dict[str, list[str]]:
    """Commands by name: a process for each file, so that a crash costs one."""
    found = {}
    workers = ["-n", str(max(1, min(3, (os.cpu_count() or 1) // 5)))] if importlib.util.find_spec("xdist") else []
    for name in dict.fromkeys(name for operation in only for name in _TESTS[operation]):
        file = _ROOT / "tests" / "dms_kernels" / f"test_{name}_gpu.py"
        if file.exists():
            found[f"parity_{name}"] = python("-m", "pytest", str(file), "-m", "gpu", "-q", "-p", "no:cacheprovider", *workers)
    return found


class Run:
    """From the first parity to the table."""

    def __init__(self, options: argparse.Namespace, start: float):
        self.options, self.start = options, start
        self.end = start + max(0.9 * options.budget, options.budget - _SECONDS_TO_END)
        has_tests = not options.quick and options.dry is None and importlib.util.find_spec("pytest") is not None
        self.tests = _tests(options.only) if has_tests else {}
        times_end = self.end - (_SHARE_OF_TESTS * options.budget if self.tests else 0.0)
        shapes = [shape for shape in all_shapes() if shape.operation in options.only and (shape.quick or not options.quick)]
        if options.dry:
            tiny: dict[Shape, bool] = {}
            for shape in shapes:
                tiny.setdefault(shape.tiny(), shape.quick)
            shapes = [replace(shape, quick=quick) for shape, quick in tiny.items()]
        self.shapes = shapes
        self.session = Session(
            Limits.of_budget(options.budget), end=times_end, out=options.out, say=_say, compared=_itself if options.dry else Shape.small
        )
        self.failed_tests: list[str] = []

    def measure(self) -> None:
        session, quick = self.session, [shape for shape in self.shapes if shape.quick]
        rest = [shape for shape in self.shapes if not shape.quick]
        stages = [
            ("parity", lambda: session.check(quick)),
            ("ceilings", session.measure_ceilings),
            ("ours", lambda: session.time(quick + rest, "ours")),
            ("others", lambda: session.time(quick + rest, "others")),
            ("tests", self._run_tests),
        ]
        for name, stage in stages:
            before = time.monotonic()
            stage()
            _say(f"-- {name}: {time.monotonic() - before:.1f} s")

    def _run_tests(self) -> None:
        self.session.close()
        folder = self.options.out.parent if self.options.out else Path("bench-results")
        for name, status in run_together(self.tests, folder, at_once=len(self.tests) or 1, end=self.end):
            said = (folder / f"{name}.txt").read_text(errors="replace").strip().splitlines()
            for line in said:
                if line.startswith(("FAILED", "ERROR")):
                    _say(line)
            _say(f"{name}: {'not done in time' if status is None else said[-1] if said else f'ended with status {status}'}")
            if status:
                self.failed_tests.append(name)

    def close(self) -> None:
        """Ends what runs; the table, what is missing, what failed."""
        self.session.close()
        session, ceilings = self.session, self.session.ceilings
        parts = []
        if ceilings:
            parts.append(f"copy {ceilings['copy_gbps']:,.0f} GB/s, bf16 matrix product {ceilings['gemm_tflops']:,.0f} TFLOP/s")
        parts.append(table(session.rows))
        if session.dropped:
            parts.append(f"dropped for lack of time: {'; '.join(session.dropped)}")
        if session.lost:
            parts.append(f"not measured after a crash or a hang: {'; '.join(session.lost)}")
        parts += [f"FAILED: {name}: {reason}" for name, reasons in session.failures.items() for reason in reasons]
        parts += [f"FAILED: {name}" for name in self.failed_tests]
        parts.append(f"{len(session.rows)} rows in {time.monotonic() - self.start:.1f} of {self.options.budget:.0f} s")
        text = "\n".join(parts)
        _say("\n" + text)
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            (self.options.out.parent / "table.txt").write_text(text + "\n", encoding="utf-8")

    def status(self) -> int:
        """0, or 1 with the names of what failed on standard error."""
        failed = [*self.session.failures, *self.failed_tests]
        if failed:
            print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0


def _itself(shape: Shape) -> Shape:
    return shape


def _say(text: str) -> None:
    print(text, flush=True)


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    # What `timeout` and job queues send is as Ctrl-C: what is known is still printed.
    for number in (signal.SIGTERM, signal.SIGINT):
        # A shell that starts this in the background has SIGINT ignored.
        signal.signal(number, _interrupt)
    run = Run(_options(arguments), start)
    interrupted = False
    try:
        run.measure()
    except NoDevice as problem:
        run.session.close()
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupted = True
    run.close()
    status = run.status()
    if interrupted:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())

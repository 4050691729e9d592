"""Measure one retrofit step of a large random model: a process for ours, then one for each of the others, within a time.

`python -m bench.retrofit OUT [BUDGET] [arguments of dms bench retrofit]`. The steps are taken by `dms_train.bench_retrofit`. What is known is
printed at once and appended to OUT/retrofit.jsonl; OUT/retrofit.json and OUT/retrofit.txt have all of it at the end, also after an interrupt.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench import dry
from bench.children import Child, Crashed, Hung, python

_ROOT = Path(__file__).parents[2]
# The packages, where an installation would have them.
_LAYOUT = {"dms": "dms", "train/dms_train": "dms_train", "recipes": "dms/recipes", "kernels/dms_kernels": "dms_kernels"}
_BUDGET = 300.0
# Of the time: what ours may take, and what one of the others leaves for those after it.
_SHARE_OF_OURS, _SHARE_LEFT = 0.6, 0.15
# What ending and printing take.
_SECONDS_TO_END = 4.0


class Run:
    """From the first process to the table."""

    def __init__(self, out: Path, budget: float, arguments: list[str], start: float):
        self.out, self.budget, self.arguments, self.start = out, budget, arguments, start
        self.end = start + max(0.9 * budget, budget - _SECONDS_TO_END)
        self.about: dict = {}
        self.expected: dict = {}
        self.rows: dict[str, dict] = {}
        """By name, each with all the steps that are done."""
        self.failures: list[str] = []
        self.dropped: list[str] = []
        self._child: Child | None = None

    def measure(self) -> None:
        """Raises ValueError where nothing could begin: what the process said."""
        self._measure("ours", self.start + _SHARE_OF_OURS * self.budget)
        others = [name for name in self.about.get("contenders", []) if name != "ours"]
        for number, name in enumerate(others, 1):
            self._measure(name, self.end - _SHARE_LEFT * self.budget * (len(others) - number))

    def _measure(self, name: str, end: float) -> None:
        log = self.out / "retrofit.err"
        if time.monotonic() >= min(end, self.end):
            self.dropped.append(name)
            return
        fake = dry.mode() == "fake"
        command = python("-m", "bench.dry", name) if fake else python("-m", "dms_train.bench_retrofit", "--answer", name, *self.arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._child = Child(command, log)
        try:
            while "done" not in (answer := self._child.answer(min(end, self.end))):
                self._take(answer)
        except Crashed as failure:
            if self._child.process.returncode == 2 and not self.about:
                raise ValueError(_last_line(log)) from None
            self._fail(name, str(failure))
        except Hung:
            self._fail(name, f"it did not end in {end - self.start:.0f} s from the start")
        self.stop()

    def _take(self, answer: dict) -> None:
        self.about |= answer.get("about", {})
        self.expected |= answer.get("expected", {})
        if "row" in answer:
            self._add(answer["row"])

    def _add(self, row: dict) -> None:
        self.rows[row["name"]] = row
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "retrofit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"device": self.about.get("device"), **row}) + "\n")
        seconds = row.get("problem") or f"{row['seconds']:.3g} s, median of {row['steps']}"
        print(f"{row['name']}: {seconds}", flush=True)

    def _fail(self, name: str, reason: str) -> None:
        steps = self.rows.get(name, {}).get("steps", 0)
        self.failures.append(f"{name}: {reason}, {steps} steps timed")
        print(f"FAILED: {self.failures[-1]}", flush=True)
        if name not in self.rows:
            self._add({"name": name, "seconds": None, "peak_bytes": None, "kl": None, "steps": 0, "problem": reason})

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = None

    def close(self) -> None:
        """The table, what is missing, what failed."""
        lines = [_table(list(self.rows.values()), self.about, self.expected)]
        if self.dropped:
            lines.append(f"dropped for lack of time: {', '.join(self.dropped)}")
        lines += [f"FAILED: {failure}" for failure in self.failures]
        lines.append(f"{len(self.rows)} rows in {time.monotonic() - self.start:.1f} of {self.budget:.0f} s")
        text = "\n".join(lines)
        print(text, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "retrofit.txt").write_text(text + "\n", encoding="utf-8")
        about = {name: value for name, value in self.about.items() if name != "contenders"}
        expected = {name: value for name, value in self.expected.items() if value is not None}
        everything = {**about, "expected": expected, "rows": list(self.rows.values())}
        (self.out / "retrofit.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")


def _table(rows: list[dict], about: dict, expected: dict) -> str:
    """FLOPs are those of the plan: ours without what is evicted, the others' with all."""
    length, lines = (
        about.get("settings", {}).get("length"),
        [("step", "seconds", "steps", "tokens/s", "TFLOP/s", "of the GPU's", "peak GiB", "KL")],
    )
    for row in rows:
        if row["seconds"] is None:
            lines.append((row["name"], row["problem"], *[""] * 6))
            continue
        flops = expected.get("flops" if row["name"] == "ours" else "dense_flops")
        rate = flops / row["seconds"] if flops else None
        peak = expected.get("peak_flops")
        lines.append(
            (
                row["name"],
                f"{row['seconds']:.3g}",
                str(row["steps"]),
                f"{length / row['seconds']:,.0f}" if length else "-",
                f"{rate / 1e12:.4g}" if rate else "-",
                f"{rate / peak:.0%}" if rate and peak else "-",
                f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-",
                f"{row['kl']:.3g}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(8)]
    text = "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    title = f"one retrofit step on {about.get('device', 'nothing')}"
    plan = f"\nplanned peak {expected['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in expected else ""
    return f"{title}\n{text}{plan}"


def _last_line(log: Path) -> str:
    said = log.read_text(errors="replace").strip().splitlines()
    return said[-1] if said else "it said nothing"


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A shell that starts this in the background has SIGINT ignored.
        signal.signal(number, _interrupt)
    out, *rest = arguments
    budget = _BUDGET
    if rest and not rest[0].startswith("-"):
        given = rest.pop(0)
        budget = float(given) if given.replace(".", "", 1).isdigit() else 0.0
        if budget < 1:
            print(f"bench_retrofit: {given!r} is no number of seconds from 1 on", file=sys.stderr)
            return 2
    try:
        dry.mode()
    except ValueError as problem:
        print(f"bench_retrofit: {problem}", file=sys.stderr)
        return 2
    run = Run(Path(out).resolve(), budget, rest, start)
    interrupted = False
    try:
        with tempfile.TemporaryDirectory() as site:
            for source, target in _LAYOUT.items():
                shutil.copytree(_ROOT / source, Path(site) / target, ignore=shutil.ignore_patterns("__pycache__"))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
            try:
                run.measure()
            finally:
                run.stop()
    except ValueError as problem:
        print(f"bench_retrofit: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupted = True
    run.close()
    if interrupted:
        print("bench_retrofit: interrupted", file=sys.stderr)
        return 130
    if run.failures:
        print(f"bench_retrofit: failed: {', '.join(failure.partition(':')[0] for failure in run.failures)}", file=sys.stderr)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One run of the benchmarks: a process for each operation, ours before any competitor, each row out the moment it is known."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from threading import Lock

from bench.children import Child, Crashed, Hung, python
from bench.rows import line_of, make_row, write_row
from bench.shapes import Shape, is_main, is_ours

# A process is started again after a crash so often; after a hang, whose time is lost, never.
_MOST_CRASHES = 2


@dataclass(frozen=True)
class Limits:
    """Seconds that one job may take, the start of its process included in the first."""

    check: float
    ceilings: float
    ours: float
    others: float

    @classmethod
    def of_budget(cls, seconds: float) -> "Limits":
        """Compiling is most of a check and of what others do first, and one hang may not eat up the rest."""
        return cls(
            check=min(120.0, seconds / 4), ceilings=min(40.0, seconds / 8), ours=min(60.0, seconds / 8), others=min(90.0, seconds / 5)
        )


@dataclass
class Operation:
    """What is known of one operation."""

    name: str
    child: Child | None = None
    machine: dict | None = None
    parities: dict[Shape, dict] = field(default_factory=dict)
    """By the small shape that was checked."""
    ours_ms: dict[Shape, float] = field(default_factory=dict)
    crashes: int = 0
    hung: bool = False

    @property
    def is_over(self) -> bool:
        return self.hung or self.crashes >= _MOST_CRASHES


class OutOfTime(Exception):
    """A job was cut short because the time for all of them is over."""


class NoDevice(Exception):
    """There is nothing to measure on."""


class Session:
    """Jobs of all operations, and the rows that they gave."""

    def __init__(self, limits: Limits, *, end: float, out: Path | None, say: Callable[[str], None], compared: Callable[[Shape], Shape]):
        """end: on time.monotonic's clock. compared: the shape that stands for another where results are compared with float64 ones."""
        self.limits, self.end, self.out, self._say, self._compared = limits, end, out, say, compared
        self.rows: list[dict] = []
        self.failures: dict[str, list[str]] = {}
        self.dropped: list[str] = []
        """For lack of time."""
        self.lost: list[str] = []
        """Because of an earlier crash or hang of the operation."""
        self.ceilings: dict = {}
        self._operations: dict[str, Operation] = {}
        self._lock = Lock()
        self._stopped = False

    # What happens with one job.

    def _operation(self, name: str) -> Operation:
        with self._lock:
            return self._operations.setdefault(name, Operation(name))

    def _fail(self, name: str, reason: str) -> None:
        with self._lock:
            self.failures.setdefault(name, []).append(reason.splitlines()[0])
            self._say(f"FAILED: {name}: {reason.splitlines()[0]}")

    def _ask(self, operation: Operation, job: dict, limit: float, take: Callable[[dict], None]) -> None:
        """Starts the process if there is none. Raises Crashed, Hung or OutOfTime, and there is none then."""
        now = time.monotonic()
        if now >= self.end:
            raise OutOfTime
        end = min(now + limit, self.end)
        is_cut = now + limit > self.end
        try:
            if operation.child is None:
                log = None if self.out is None else self.out.parent / "logs" / f"{operation.name}.txt"
                operation.child = Child(python("-m", "bench.worker", operation.name), log)
                ready = operation.child.answer(end)
                if ready["problem"]:
                    raise NoDevice(ready["problem"])
                operation.machine = ready["machine"]
            for answer in operation.child.answers(job, end):
                take(answer)
        except Crashed:
            operation.child = None
            if self._stopped:
                raise OutOfTime from None
            operation.crashes += 1
            raise
        except Hung:
            operation.child = None
            if is_cut:
                raise OutOfTime from None
            operation.hung = True
            raise Hung(f"it did not end in {limit:.0f} s") from None

    def _check(self, operation: Operation, shape: Shape) -> None:
        small = self._compared(shape)
        if small in operation.parities or operation.is_over:
            return
        found: dict = {}
        try:
            self._ask(operation, {"do": "check", "shape": asdict(small)}, self.limits.check, lambda answer: found.update(answer["check"]))
        except (Crashed, Hung) as failure:
            found = found or {"error": None, "problem": f"parity: {failure}, at {small.name}"}
        operation.parities[small] = found
        if found["problem"]:
            self._fail(operation.name, found["problem"])
        else:
            self._say(f"{operation.name}, {small.name}: parity {found['error']:.1e}")

    def _time(self, operation: Operation, shape: Shape, side: str) -> None:
        """Competitors of one side at one shape; after a crash those that are left, in a new process."""
        parity = operation.parities.get(self._compared(shape))
        if parity is None or parity["problem"]:
            if side == "ours":
                reason = parity["problem"] if parity else "parity: not known after crash or hang"
                self._add(operation, shape, _without_time("ours", f"{reason}, not timed"))
            return
        done: list[str] = []
        begun: list[str] = []

        def take(answer: dict) -> None:
            if "begins" in answer:
                begun.append(answer["begins"])
                return
            result = answer["result"]
            done.append(result["competitor"])
            if is_main(result["competitor"]) and result["ms"] is not None:
                result["parity_error"] = parity["error"]
                operation.ours_ms[shape] = result["ms"]
            self._add(operation, shape, result)
            if is_ours(result["competitor"]) and result["problem"]:
                self._fail(operation.name, f"{result['problem']} in {result['competitor']} at {shape.name}")

        if operation.is_over:
            self.lost.append(f"{operation.name} {shape.name}: {side}")
        limit = self.limits.ours if side == "ours" else self.limits.others
        while not operation.is_over:
            job = {"do": "time", "shape": asdict(shape), "side": side, "skip": done, "compare": shape in operation.ours_ms}
            try:
                self._ask(operation, job, limit, take)
                return
            except (Crashed, Hung) as failure:
                name = begun[-1] if begun else side
                self._fail(operation.name, f"{failure} in {name} at {shape.name}")
                # After an error that nothing can follow its row is there already.
                if name not in done:
                    done.append(name)
                    self._add(operation, shape, _without_time(name, str(failure)))
                if not begun:
                    return

    def _add(self, operation: Operation, shape: Shape, result: dict) -> None:
        row = make_row(shape, result, machine=operation.machine or {}, ceilings=self.ceilings, ours_ms=operation.ours_ms.get(shape))
        with self._lock:
            self.rows.append(row)
            write_row(self.out, row)
            self._say(line_of(row))

    # What happens in which order.

    def check(self, shapes: list[Shape]) -> None:
        """Parity, all operations at once: most of it is compiling."""
        by_operation = {
            name: [shape for shape in shapes if shape.operation == name] for name in {shape.operation: None for shape in shapes}
        }

        def check_all(name: str) -> None:
            for shape in by_operation[name]:
                try:
                    self._check(self._operation(name), shape)
                except OutOfTime:
                    self.dropped.append(f"{name} {shape.name}: parity")

        with ThreadPoolExecutor(len(by_operation) + 1) as pool:
            try:
                for future in [pool.submit(self._start_ceilings), *(pool.submit(check_all, name) for name in by_operation)]:
                    future.result()
            except BaseException:
                self._stop()
                raise

    def _start_ceilings(self) -> None:
        """While others compile, so that its process does not have to be waited for. What goes wrong will do so again when it measures."""
        with contextlib.suppress(Crashed, Hung, OutOfTime):
            self._ask(self._operation("ceilings"), {"do": "nothing"}, self.limits.check, lambda answer: None)

    def measure_ceilings(self) -> None:
        operation = self._operation("ceilings")
        try:
            self._ask(operation, {"do": "ceilings"}, self.limits.ceilings, lambda answer: self.ceilings.update(answer["ceilings"]))
        except OutOfTime:
            self.dropped.append("ceilings")
        except (Crashed, Hung) as failure:
            self._fail("ceilings", f"{failure}; rows have no share of them")
        if operation.child is not None:
            operation.child.kill()
        operation.child = None

    def time(self, shapes: list[Shape], side: str) -> None:
        """Operations in turn, so that a short time leaves the first shapes of each."""
        by_operation: dict[str, list[Shape]] = {}
        for shape in shapes:
            by_operation.setdefault(shape.operation, []).append(shape)
        for turn in zip_longest(*by_operation.values()):
            for shape in turn:
                if shape is None:
                    continue
                operation = self._operation(shape.operation)
                try:
                    if side == "ours":
                        self._check(operation, shape)
                    self._time(operation, shape, side)
                except OutOfTime:
                    self.dropped.append(f"{shape.operation} {shape.name}: {side}")

    def _stop(self) -> None:
        """Ends what other threads wait for, and they do not start it again."""
        self._stopped, self.end = True, 0.0
        for operation in self._operations.values():
            if operation.child is not None:
                operation.child.end()

    def close(self) -> None:
        for operation in self._operations.values():
            if operation.child is not None:
                operation.child.kill()
                operation.child = None


def _without_time(name: str, problem: str) -> dict:
    return {"competitor": name, "bytes": 0, "flops": 0, "ms": None, "parity_error": None, "problem": problem}

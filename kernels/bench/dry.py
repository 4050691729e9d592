"""Dry runs, for tests of what a crash or a hang costs: the same processes and the same order without a GPU.

`python -m bench.dry NAME` stands for the process that takes retrofit steps.

DMS_BENCH_DRY_RUN is "cpu" (tiny shapes, plain PyTorch) or "fake" (no PyTorch and no arithmetic), then faults, each after a comma:
KIND@OPERATION:PLACE:NUMBER, such as "fake,crash@decode:ours:2". KIND is crash, segfault, hang, wrong (parity that fails) or poison (an
error after which all others fail, such as an illegal access on a GPU); PLACE is check, ours, others or ceilings; NUMBER counts what a process does there, from 1.
"""

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from bench.shapes import OPERATIONS, Shape

VARIABLE = "DMS_BENCH_DRY_RUN"
_KINDS = ("crash", "segfault", "hang", "wrong", "poison")
_PLACES = ("check", "ours", "others", "ceilings")


def mode() -> str | None:
    """None: no dry run.

    Raises:
        ValueError: the variable is none of what it may be.
    """
    given = os.environ.get(VARIABLE, "")
    if not given:
        return None
    name, *faults = given.split(",")
    if name not in ("cpu", "fake"):
        raise ValueError(f"{VARIABLE} begins with {name!r}; it should be cpu or fake")
    for fault in faults:
        kind, _, where = fault.partition("@")
        operation, place, number, *more = [*where.split(":"), "", "", ""]
        known = kind in _KINDS and operation in (*OPERATIONS, "ceilings", "retrofit") and place in _PLACES and number.isdigit()
        if not known or any(more[:-3]):
            raise ValueError(f"{VARIABLE} has {fault!r}; a fault is KIND@OPERATION:PLACE:NUMBER, such as crash@decode:ours:2")
    return name


class Faults:
    """Those planted in one operation's process."""

    def __init__(self, operation: str):
        given = os.environ.get(VARIABLE, "").split(",")[1:]
        planted = (fault.split("@") for fault in given)
        self._planted = {where.removeprefix(f"{operation}:"): kind for kind, where in planted if where.startswith(f"{operation}:")}
        self._count: Counter[str] = Counter()
        if self._planted:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reach(self, place: str) -> str | None:
        """Crashes or hangs where that is planted; gives the kind of what the caller is to do."""
        self._count[place] += 1
        kind = self._planted.get(f"{place}:{self._count[place]}")
        if kind == "crash":
            os.abort()
        elif kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        while kind == "hang":
            time.sleep(60)
        return kind


class Fake:
    """In place of `run.Measurement`: it measures nothing, and its rows have no GPU's name."""

    def machine(self) -> dict:
        return {"gpu": None, "dry_run": True}

    def no_device(self) -> str | None:
        return None

    def is_alive(self) -> bool:
        return True

    def ceilings(self) -> dict:
        return {"copy_gbps": 1000.0, "gemm_tflops": 100.0}

    def check(self, shape: Shape) -> dict:
        return {"error": 1e-3, "problem": None}

    def time(
        self,
        shape: Shape,
        side: str,
        *,
        compare: bool = True,
        skip: Collection[str] = (),
        before: Callable[[str], None] = lambda name: None,
    ) -> Iterator[dict]:
        for name, ms in {"ours": (("ours", 2.0), ("ours, again", 2.5)), "others": (("one", 3.0), ("another", 4.0))}[side]:
            if name not in skip:
                before(name)
                yield {"competitor": name, "bytes": 1e6, "flops": 1e9, "ms": ms, "parity_error": None, "problem": None}


def _retrofit() -> None:
    faults, name = Faults("retrofit"), sys.argv[1]
    names = ["ours", "one", "another"]
    events = [{"about": {"settings": {"length": 1000}, "device": "none", "contenders": names}}]
    events += [{"row": {"name": name, "seconds": 2.0, "peak_bytes": None, "kl": 0.5, "steps": steps}} for steps in (1, 2)]
    if name == "ours":
        events.append({"expected": {"peak_bytes": 2**30, "flops": 1e12, "dense_flops": 2e12, "peak_flops": None}})
    for event in [*events, {"done": True}]:
        faults.reach("ours" if name == "ours" else "others")
        print(json.dumps(event), flush=True)


if __name__ == "__main__":
    _retrofit()

"""DeepSpeed's compiled operators: built once a machine, by processes that wait for each other and outlive one that was killed."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dms_train import compat


def build_operator(name: str, *, patience: float = 600.0, tell: Callable[[str], object] = lambda text: None) -> None:
    """Build or load an operator of DeepSpeed's, such as "CPUAdam" (about a minute the first time).

    PyTorch builds under a lock file, waits for one without an end, and leaves its own where the process is killed.

    patience: seconds after which a lock was left by a process that is gone, and is removed.
    tell: hears of each lock that is waited for or removed.

    Raises:
        Exception: whatever the compiler, PyTorch or DeepSpeed raises.
    """
    builder = compat.op_builder(name)
    waited_for: set[Path] = set()
    while locks := compat.build_locks(builder):
        for lock in locks:
            with suppress(FileNotFoundError):
                age = time.time() - lock.stat().st_mtime
                if age > patience:
                    lock.unlink()
                    tell(f"removed {lock}: {age:.0f} s old, so the process that built DeepSpeed's {name} is gone")
                elif lock not in waited_for:
                    waited_for.add(lock)
                    tell(
                        f"waiting at most {patience - age:.0f} s for another process that builds DeepSpeed's {name}; if none does, delete {lock}"
                    )
        time.sleep(0.2)
    builder.load(verbose=False)

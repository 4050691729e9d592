"""Processes that may crash or hang, and what comes back of them. Neither torch nor a GPU is touched here."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_KERNELS = Path(__file__).parents[1]
# How long a hanging process has to say where it is.
_LAST_WORDS = 0.3
_LOOK_AGAIN = 0.5


class Crashed(Exception):
    """The process ended without having said that it is done."""


class Hung(Exception):
    """The process did not say in time that it is done, and was ended."""


class Child:
    """A process in a group of its own that answers on standard output with lines of JSON."""

    def __init__(self, command: list[str], log: Path | None = None):
        """log: gets its standard error; None: ours."""
        errors: IO | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            errors = log.open("ab")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(),
            start_new_session=True,
        )
        if errors is not None:
            errors.close()
        self._unread = b""

    def tell(self, job: dict) -> None:
        """Raises Crashed where nobody listens."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Crashed(self._ended()) from None

    def answer(self, end: float) -> dict:
        """The next one. end: on time.monotonic's clock.

        Raises:
            Crashed: there is none, because the process has ended.
            Hung: there was none in time.
        """
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            has_ended = self.process.poll() is not None
            left = 0.0 if has_ended else min(end - time.monotonic(), _LOOK_AGAIN)
            if left < 0:
                self.kill(say_where=True)
                raise Hung("it did not end in time")
            if select.select([self.process.stdout], [], [], left)[0]:
                found = os.read(self.process.stdout.fileno(), 65536)
                if not found:
                    raise Crashed(self._ended())
                self._unread += found
            elif has_ended:
                # What it has started may hold the pipe open.
                raise Crashed(self._ended())
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def answers(self, job: dict, end: float) -> Iterator[dict]:
        """To one job, without the last, which says that it is done."""
        self.tell(job)
        while "done" not in (found := self.answer(end)):
            yield found

    def end(self) -> None:
        """Without waiting: whoever waits for an answer finds that there is none."""
        self._signal(signal.SIGKILL)

    def kill(self, *, say_where: bool = False) -> None:
        """With all that it has started."""
        if say_where and self.process.poll() is None:
            self._signal(signal.SIGUSR1)
            time.sleep(_LAST_WORDS)
        self.end()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _ended(self) -> str:
        code = self.process.wait()
        self.kill()
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        return f"it ended with status {code}"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(_KERNELS), os.environ.get("PYTHONPATH")]))}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def run_together(commands: dict[str, list[str]], folder: Path, *, at_once: int, end: float) -> Iterator[tuple[str, int | None]]:
    """Runs commands, some at once, the output of each in a file of its name; gives name and status as each ends, None: not in time."""
    waiting, running = list(commands.items()), {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, command = waiting.pop(0)
                with (folder / f"{name}.txt").open("wb") as output:
                    running[name] = subprocess.Popen(
                        command, stdout=output, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
                    )
            for name in [name for name, process in running.items() if process.poll() is not None]:
                yield name, running.pop(name).returncode
            if time.monotonic() > end:
                yield from ((name, None) for name in [*running, *(name for name, _ in waiting)])
                return
            time.sleep(0.05)
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

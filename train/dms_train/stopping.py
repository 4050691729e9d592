"""Stopping a run: SIGTERM, SIGUSR1 and the first Ctrl-C save and end it; the same command continues it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

# EX_TEMPFAIL of sysexits.h: not done, worth starting again. Launchers and job scripts restart on it.
STOPPED_CODE = 75
# What shells report for an end by SIGINT. After Ctrl-C no launcher should restart the run, so this is used even where all is saved.
INTERRUPTED_CODE = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """The run was asked to stop and did, after saving. Not an Exception: it is no error and must not be caught as one."""

    def __init__(self, text: str, by: str | None):
        """by: the name of the signal, None where another process got it."""
        super().__init__(text)
        self.code = INTERRUPTED_CODE if by == signal.SIGINT.name else STOPPED_CODE


@dataclass
class StopRequest:
    """Set by signal handlers, and read by the loop at the end of each step."""

    signal: str | None = None
    """The name of the first signal that came."""


@contextmanager
def listening() -> Iterator[StopRequest]:
    """A context in which a signal is only recorded; a second Ctrl-C ends the process."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number).name
        if number == signal.SIGINT:
            _end_at_the_next("saving after this step")

    with _handling(remember):
        yield request


def ignoring() -> AbstractContextManager:
    """A context in which signals are ignored, except a second Ctrl-C: so close to the end, finishing loses less than stopping."""

    def ignore(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            _end_at_the_next("all steps are done, and what comes of them is not yet written")

    return _handling(ignore)


def _end_at_the_next(what: str) -> None:
    # The system's default handler: a process that hangs runs no Python handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not os.environ.get("DMS_LAUNCHED"):
        # Not by print, which may be what was interrupted.
        os.write(2, f"\ndms: {what}; Ctrl-C again ends the run at once\n".encode())


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    for number in SIGNALS:
        if number == signal.SIGINT and signal.getsignal(number) in (signal.SIG_IGN, signal.SIG_DFL):
            # Ignored, as in a shell's background jobs, or default already after a first Ctrl-C.
            continue
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:
            # Not the main thread: the program that embeds the run handles signals.
            break
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def end_by_sigint() -> NoReturn:
    """End as a process that does not handle SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(INTERRUPTED_CODE)


def is_launched() -> bool:
    """Whether other processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

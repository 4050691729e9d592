"""Being asked to stop: SIGTERM and SIGUSR1 save and end the run, to be continued by the same command."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, worth starting again. Launchers and job scripts go by it.
STOPPED_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The run was asked to stop and did, with everything saved that there was to save. No error, and not to be caught as one."""


@dataclass
class StopRequest:
    """The name of the signal that came, for the loop to ask about at the end of each step."""

    signal: str | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """A context in which a signal is only remembered."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name

    with _handling(remember):
        yield request


def ignoring() -> AbstractContextManager:
    """A context in which the run is not to be stopped: ending what is left of it loses less."""
    return _handling(signal.SIG_IGN)


@contextmanager
def _handling(handler: Callable | signal.Handlers) -> Iterator[None]:
    before = {}
    for number in SIGNALS:
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:
            # Not the main thread: whoever embeds the run handles signals.
            break
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def is_launched() -> bool:
    """Whether other processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

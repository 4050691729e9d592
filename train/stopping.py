"""Being asked to stop: SIGTERM and SIGUSR1 save and end the run, to be continued by the same command."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, worth starting again. Launchers and job scripts go by it.
STOPPED_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The run was asked to stop and did, with everything saved that there was to save. No error, and not to be caught as one."""


class StopRequest:
    """While its context lasts, a signal is only remembered, until the loop asks at the end of a step."""

    def __init__(self):
        self.signal: str | None = None

    def __enter__(self) -> "StopRequest":
        self._handling = _handling(self._on_signal)
        self._handling.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handling.__exit__(*error)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name


@contextmanager
def _handling(handler) -> Iterator[None]:
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


def ignoring() -> object:
    """A context in which the run is not to be stopped: ending what is left of it loses less."""
    return _handling(signal.SIG_IGN)


def is_launched() -> bool:
    """Whether other processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

"""Being asked to stop: SIGTERM and SIGUSR1 save and end the run, to be continued by the same command."""

import os
import signal
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, worth starting again. Launchers and job scripts go by it.
STOPPED_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop and did, with everything saved that there was to save."""


class StopRequest:
    """Remembers that a signal came, until the loop asks at the end of a step. `at_once()`: from then on it raises where it comes."""

    def __init__(self):
        self.signal: str | None = None
        self._immediate = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:
                # Not the main thread: whoever embeds the run handles signals.
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at_once(self) -> None:
        self._immediate = True
        if self.signal is not None:
            raise Stopped(f"stopped by {self.signal}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if self._immediate:
            raise Stopped(f"stopped by {self.signal}")


def is_launched() -> bool:
    """Whether other processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

"""How the `dms` command ends: with one line on standard error and an exit code, whatever went wrong.

0: done; 1: failed; 2: bad input; 75: stopped after saving, to be started again; 130: Ctrl-C.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from dms.console import replace_unprintable
from dms.errors import describe
from dms.requirements import explain
from dms_train.stopping import INTERRUPTED_CODE, Stopped, end_by_sigint

# Repeated after Ctrl-C, these take up what they had written.
_RESUMABLE = ("cache-teacher", "pretrain", "generate-data", "evaluate")


def run_command(app: typer.Typer) -> None:
    """Run what the command line names, and end the process if it does not come to its end."""
    replace_unprintable()
    if os.environ.get("DMS_LAUNCHED"):
        # The launcher asks every process where it is when one of them has failed.
        faulthandler.register(signal.SIGUSR2, all_threads=True)
    with _noting_ctrl_c() as interrupts:
        try:
            app()
        except BaseException as error:
            code = _interrupted() if interrupts else _explained(error)
            if code is None:
                raise
            sys.exit(code)


@contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """A context in which each Ctrl-C that interrupts leaves a mark: on its way up it may become any error, such as of a failed import."""
    marks: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        marks.append(number)
        raise KeyboardInterrupt

    is_default = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield marks
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted() -> int:
    if os.environ.get("DMS_LAUNCHED"):
        # From this, and not from an exit code, the launcher can tell that nothing was saved.
        end_by_sigint()
    sys.stderr.write("\n")
    _say("interrupted" + "; the same command goes on from what is saved" * any(command in _RESUMABLE for command in sys.argv[1:2]))
    return INTERRUPTED_CODE


def _explained(error: BaseException) -> int | None:
    """Say what went wrong; the exit code. None: for Python to show as it is."""
    # Where several processes share a run, the one that failed first shows where.
    shows_where = bool(os.environ.get("DMS_DEBUG") or os.environ.get("DMS_LAUNCHED"))
    match error:
        case Stopped():
            _say(str(error))
            return error.code
        case ValueError() if not os.environ.get("DMS_DEBUG"):
            _say(f"error: {describe(error)}")
            return 2
        case ModuleNotFoundError() if not shows_where and (needed := explain(error, " ".join(["dms", *sys.argv[1:2]]))):
            _say(f"failed: {needed}")
            return 1
        case RuntimeError() | FloatingPointError() | OSError() if not shows_where:
            _say(f"failed: {describe(error)} (DMS_DEBUG=1 shows where)")
            return 1
    return None


def _say(text: str) -> None:
    print(f"dms: {text}", file=sys.stderr)

"""Exit codes of the `dms` command; whatever went wrong is one line on standard error.

0: done; 1: failed; 2: bad input; 75: stopped after saving, to be started again; 130: Ctrl-C.
"""

import faulthandler
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from dms import errors
from dms.console import replace_unprintable
from dms.errors import describe
from dms.requirements import explain
from dms_train.stopping import INTERRUPTED_CODE, Stopped, end_by_sigint

# Repeated after Ctrl-C, these continue from what they had written.
_RESUMABLE = ("cache-teacher", "pretrain", "generate-data", "evaluate")


def run_command(app: typer.Typer) -> None:
    """Run the command line; end the process with an exit code where that fails."""
    replace_unprintable()
    if os.environ.get("DMS_LAUNCHED"):
        # When one process fails, the launcher has the others print their stacks.
        faulthandler.register(signal.SIGUSR2, all_threads=True)
    with _noting_ctrl_c() as interrupts, _plain_warnings():
        try:
            app()
        except BaseException as error:
            code = _interrupted() if interrupts else _explained(error)
            if code is None:
                raise
            sys.exit(code)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """A context in which warnings at lines of ours are one line each: where the command called what warns says nothing to its user."""
    before, ours = warnings.formatwarning, tuple(str(Path(file).parent) + os.sep for file in (__file__, errors.__file__))

    def plain(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        return f"dms: warning: {message}\n" if filename.startswith(ours) else before(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """A context that records each Ctrl-C: on its way up KeyboardInterrupt may become another error, such as that of a failed import."""
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
        # A death by SIGINT, unlike an exit code, tells the launcher that nothing was saved.
        end_by_sigint()
    sys.stderr.write("\n")
    _say("interrupted" + "; the same command continues from what is saved" * any(command in _RESUMABLE for command in sys.argv[1:2]))
    return INTERRUPTED_CODE


def _explained(error: BaseException) -> int | None:
    """Print what went wrong -> the exit code, or None to let Python show the traceback."""
    # Where several processes share a run, the traceback of the one that failed first is needed.
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

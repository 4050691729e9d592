"""Where commands print: the console, its progress bars, and an encoding that never fails."""

import io
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def replace_unprintable() -> None:
    """Have standard output and error replace letters that their encoding lacks, so that a finished run does not fail at its last line.

    An error handler that the user chose, as in PYTHONIOENCODING=ascii:backslashreplace, stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def make_console() -> Console:
    """A console as wide as the terminal, or 110 columns wide in files and pipes, where rich would assume 80 and cut tables."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def make_progress(console: Console) -> Progress:
    """A progress bar with the time that is left; nothing in files and pipes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal)

"""The console that commands print to."""

import io
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def replace_unprintable() -> None:
    """Have standard output and error replace letters that their encoding lacks, for a finished run must not fail at its last line.

    A way to replace them that was chosen, as in PYTHONIOENCODING=ascii:backslashreplace, stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def make_console() -> Console:
    """As wide as the terminal; 110 columns in files and pipes, where rich would assume 80 and cut the table."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def make_progress(console: Console) -> Progress:
    """What is running, how far it is, and how long it will take; nothing in files and pipes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal)

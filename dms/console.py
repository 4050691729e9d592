"""The console that commands print to."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def make_console() -> Console:
    """As wide as the terminal; 110 columns in files and pipes, where rich would assume 80 and cut the table."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def make_progress(console: Console) -> Progress:
    """What is running, how far it is, and how long it will take; nothing in files and pipes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal)

"""The console that commands print to."""

from rich.console import Console


def make_console() -> Console:
    """As wide as the terminal; 110 columns in files and pipes, where rich would assume 80 and cut the table."""
    console = Console()
    return console if console.is_terminal else Console(width=110)

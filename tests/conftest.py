"""What holds for all tests: kernels are interpreted unless there is a GPU to compile them for, and one kind of terminal."""

import os
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

# Triton reads this when it is imported, which other conftests do; `-m gpu` wants kernels compiled. Said either way, so that xdist's
# workers hear it too.
os.environ.setdefault("TRITON_INTERPRET", "0" if "gpu" in sys.argv else "1")


@pytest.fixture
def distribution(monkeypatch):
    """distribution(lines): the requirements that our installed distribution has for the rest of a test."""
    from dms import requirements

    def has(lines: list[str]) -> None:
        stands_in = SimpleNamespace(**{**vars(metadata), "requires": lambda name: lines})
        monkeypatch.setattr(requirements, "metadata", stands_in)
        requirements._ranges.cache_clear()

    yield has
    requirements._ranges.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def same_terminal():
    """What the commands print in tests, here and in processes of their own, is as wide as in a file and has no colours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "110")
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        yield


def pytest_terminal_summary(terminalreporter):
    largest = sys.modules.get("largest")
    for line in largest.lines() if largest else ():
        terminalreporter.write_line(line)

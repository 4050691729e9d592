"""Triton decides when it is imported, which other conftests do, whether kernels are compiled or interpreted."""

import os
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

# A CPU can only interpret them; `-m gpu` wants them compiled. Said either way, so that xdist's workers hear it too.
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


def pytest_terminal_summary(terminalreporter):
    largest = sys.modules.get("largest")
    for line in largest.lines() if largest else ():
        terminalreporter.write_line(line)

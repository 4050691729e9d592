"""Triton decides when it is imported, which other conftests do, whether kernels are compiled or interpreted."""

import os
import sys

# A CPU can only interpret them; `-m gpu` wants them compiled. Said either way, so that xdist's workers hear it too.
os.environ.setdefault("TRITON_INTERPRET", "0" if "gpu" in sys.argv else "1")


def pytest_terminal_summary(terminalreporter):
    largest = sys.modules.get("largest")
    for line in largest.lines() if largest else ():
        terminalreporter.write_line(line)

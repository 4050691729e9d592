"""Compiled kernels on the emulator. Where Triton is interpreted nothing is compiled: there `test_emulated.py`, next to this folder, runs
these tests in a process of their own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "kernels"))
collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def capability(request) -> int:
    return request.param

"""Compiled kernels on the emulator (`kernels/emulate`), in a process that does not interpret them: all the tests of `emulated/`.

By themselves, and without those that are slow: `TRITON_INTERPRET=0 scripts/test.sh tests/dms_kernels/emulated`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "DMS_KERNELS"} | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "tests/dms_kernels/emulated"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

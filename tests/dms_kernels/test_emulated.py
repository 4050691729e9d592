"""Compiled kernels on the emulator (`kernels/emulate`), in a process that does not interpret them: the tests of `emulated/`.

A few of them here, all of them in the slow test. By themselves: `TRITON_INTERPRET=0 scripts/test.sh tests/dms_kernels/emulated`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def run_emulated(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DMS_KERNELS"} | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/dms_kernels/emulated", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_few_kernels():
    run_emulated()


@pytest.mark.slow
def test_all_kernels():
    run_emulated("-m", "slow")

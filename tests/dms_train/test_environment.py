"""What commands set before torch is imported, unless it is set already."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["GOMP_SPINCOUNT = '1000'"]),
        pytest.param({"GOMP_SPINCOUNT": "7"}, ["GOMP_SPINCOUNT = '7'"], marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "passive"}, ["OMP_WAIT_POLICY = 'PASSIVE'", "GOMP_SPINCOUNT = '0'"], marks=pytest.mark.slow),
    ],
)
def test_threads_spin_little_unless_the_user_says_otherwise(own, expected):
    """As the OpenMP library that torch has loaded tells itself."""
    code = "from dms_train.environment import prepare; prepare('auto'); import torch; torch.ones(1)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**environment, "OMP_DISPLAY_ENV": "verbose", **own}, capture_output=True, text=True, check=True)
    assert all(line in done.stderr for line in expected), done.stderr

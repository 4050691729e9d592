"""What commands set before torch is imported, unless it is set already."""

import os
import subprocess
import sys

import pytest
from dms_train import environment

from dms import doctor


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
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**variables, "OMP_DISPLAY_ENV": "verbose", **own}, capture_output=True, text=True, check=True)
    assert all(line in done.stderr for line in expected), done.stderr


@pytest.mark.parametrize(
    ("found", "says", "cured"),
    [
        ({"": 0.4}, None, False),
        ({"": 8.4}, "takes 8 times as long as float32: that (precision=fp32 of a recipe", False),
        ({"": None, "cured": 0.5}, None, True),
        ({"": None, "cured": None}, RuntimeError, False),
    ],
)
def test_a_cpu_that_emulates_bfloat16_is_named(found, says, cured, monkeypatch, capsys):
    monkeypatch.setattr(environment, "_has_no_gpu", lambda: True)

    def tried(variables=None, has_gpu=False):
        times = found["cured" if variables else ""]
        return None if times is None else doctor.Bfloat16(times, has_gpu)

    monkeypatch.setattr(doctor, "try_bfloat16", tried)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    # What it sets goes with the test.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    if says is RuntimeError:
        with pytest.raises(RuntimeError, match="bfloat16 matmul does not work on this CPU"):
            environment.prepare_bfloat16()
    else:
        environment.prepare_bfloat16()
    said = capsys.readouterr().err
    assert says is RuntimeError or (says in said if says else not said)
    assert ("ONEDNN_MAX_CPU_ISA" in os.environ) == cured
    # With a GPU that only torch knows of.
    monkeypatch.setattr(doctor, "try_bfloat16", lambda variables=None: doctor.Bfloat16(8.4, has_gpu=True))
    os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
    environment.prepare_bfloat16()
    assert not capsys.readouterr().err

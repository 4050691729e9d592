"""A decode step's kernels as compiled, launched again as a cache launches them."""

import pytest
import torch
from launched_steps import follow_two_ways

from bench.host import measure, stubbed
from emulate.launching import emulating


@pytest.mark.parametrize(
    "slot", [None, pytest.param(torch.tensor([2, 0], dtype=torch.int32), marks=pytest.mark.slow)], ids=["rows", "slots"]
)
def test_steps_that_launch_as_before(capability, slot):
    """Triton promises nothing about how a compiled kernel is called by itself: this is where it is tried."""
    with emulating(capability) as emulation:
        follow_two_ways(slot, num_steps=9, dtype=torch.bfloat16)
    assert len(emulation.launches) == 4 * 9


@torch.no_grad()
def test_launching_again_takes_the_host_less():
    """Loosely, for busy machines: a third was asked for, and a tenth is what it takes."""
    with stubbed():
        found = measure((4,), batch=2, num_layers=2, repeats=15)
    assert list(found) == ["append", "paged_decode", "decode step, 2 layers"]
    assert all(0 < kept < operators / 2 for operators, kept in found.values()), found

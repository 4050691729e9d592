"""A decode step's kernels as compiled, launched again as a cache launches them."""

import pytest
import torch
from launched_steps import follow_two_ways

from emulate.launching import emulating


@pytest.mark.parametrize(
    "slot", [None, pytest.param(torch.tensor([2, 0], dtype=torch.int32), marks=pytest.mark.slow)], ids=["rows", "slots"]
)
def test_steps_that_launch_as_before(capability, slot):
    """Triton promises nothing about how a compiled kernel is called by itself: this is where it is tried."""
    with emulating(capability) as emulation:
        follow_two_ways(slot, num_steps=9, dtype=torch.bfloat16)
    assert len(emulation.launches) == 4 * 9

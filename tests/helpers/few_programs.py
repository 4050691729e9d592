"""paged_decode's kernel with a handful of programs, and with what it is given to write to poisoned."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

_EMPTY = torch.empty


def with_few_programs(
    call: Callable[[], torch.Tensor], num_programs: int = 3, waves: int = 1, tile: int | None = None, merge: dict | None = None
) -> torch.Tensor:
    """What a call gives on the kernel: how many programs there are, how many entries a tile has (None: as on a GPU), and how parts merge."""
    from dms_kernels.paged_decode import fused

    as_on_a_gpu = fused.launch

    def launch(*args, **kwargs):
        chosen = as_on_a_gpu(*args, **kwargs)
        return replace(chosen, num_programs=num_programs, waves=waves, share=1, tile=tile or chosen.tile, **(merge or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMS_KERNELS", "triton")
        patch.setattr(fused, "launch", launch)
        patch.setattr(torch, "empty", _poisoned)
        return call()


def _poisoned(*shape, **options):
    """The workspace and the output, as memory that held something else."""
    made = _EMPTY(*shape, **options)
    return made.fill_(float("nan")) if made.is_floating_point() else made

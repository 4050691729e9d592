"""Faults planted in compiled kernels, each of which the emulator must find; and kernels that are as they were, in which it finds none."""

import re
from collections.abc import Callable

import pytest
import torch
from decode_cases import make_case as decode_case
from few_programs import with_few_programs
from sparse_prompts import make_case as prefill_case

from dms_kernels.paged_decode import paged_decode
from dms_kernels.sparse_prefill import sparse_prefill
from emulate.findings import Finding
from emulate.launching import emulating

pytestmark = pytest.mark.slow


def decode(capability: int, edit: Callable[[str], str]) -> torch.Tensor:
    case = decode_case(3, D=64, B=1, P=16, window=5, kept=[[150, 3]], length=[40]).cast(torch.bfloat16)
    with emulating(capability, edit=edit):
        return with_few_programs(lambda: case.run(paged_decode), 2)


def prefill(capability: int, edit: Callable[[str], str]) -> torch.Tensor:
    case = prefill_case(T=40, S=150, H=1, D=64, window=100).cast(torch.bfloat16)
    with emulating(capability, edit=edit):
        return case.run(sparse_prefill)


RUNS = {"paged_decode": decode, "sparse_prefill": prefill}


def looser(pattern: str, ptx: str) -> str:
    """Waits that let one group more be on its way."""
    changed, count = re.subn(rf"({pattern}\s+)(\d+)", lambda match: f"{match[1]}{int(match[2]) + 1}", ptx)
    assert count or ("prefill_kernel" not in ptx and "decode_kernel" not in ptx)
    return changed


@pytest.mark.parametrize("kernel", RUNS)
def test_a_loosened_wait(capability, kernel):
    with pytest.raises(Finding, match=r"asynchronous copy to it has not been waited for|nobody has written"):
        RUNS[kernel](capability, lambda ptx: looser(r"cp\.async\.wait_group", ptx))


def test_a_loosened_wait_for_a_product():
    """The registers are not there yet, or the matrix is gone."""
    clean = prefill(90, lambda ptx: ptx)
    try:
        loosened = prefill(90, lambda ptx: looser(r"wgmma\.wait_group\.sync\.aligned", ptx))
    except Finding:
        return
    assert not torch.equal(clean, loosened) and loosened.isnan().any()


def without_barrier(number: int) -> Callable[[str], str]:
    """Without one of the barriers that stand behind a wait for copies, where each warp comes to see what the others have copied."""

    def edit(ptx: str) -> str:
        places = list(re.finditer(r"(cp\.async\.wait_group\s+\d+;\s*)bar\.sync\s+0;", ptx))[number : number + 1]
        return ptx[: places[0].start()] + places[0][1] + ptx[places[0].end() :] if places else ptx

    return edit


@pytest.mark.parametrize("kernel", RUNS)
def test_a_dropped_barrier(capability, kernel):
    """Not every one is met in this case: loops have others before and behind them."""
    found = []
    for number in range(6):
        try:
            RUNS[kernel](capability, without_barrier(number))
        except Finding as error:
            found.append(str(error))
    assert found and all("that another warp has" in error for error in found)


@pytest.mark.parametrize("kernel", RUNS)
def test_a_shifted_mask(capability, kernel):
    """One more key than there are: rows behind the last are read, out of bounds or such as nobody has written."""

    def shift(ptx: str) -> str:
        # `at < n` becomes `at <= n`.
        return re.sub(r"setp\.lt\.s32", "setp.le.s32", ptx)

    with pytest.raises(Finding, match=r"out of bounds|nobody has written"):
        RUNS[kernel](capability, shift)


@pytest.mark.parametrize("kernel", RUNS)
def test_nothing_is_found_where_nothing_was_planted(capability, kernel):
    assert RUNS[kernel](capability, lambda ptx: ptx).isfinite().all()

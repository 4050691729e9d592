"""sparse_prefill and store_survivors as compiled, on the emulator: at most twice plain PyTorch's error; what is stored bit by bit."""

import copy

import pytest
import torch
from cache_arguments import paged_of
from parity import assert_as_precise
from sparse_prompts import in_float64, make_case
from window_caches import WindowsCase, make_windows_case, recent_of

from dms_kernels.arguments import PagedKV
from dms_kernels.quantization import scales_of_pages, stored_width
from dms_kernels.sparse_prefill import attend, fused, reference, sparse_prefill, store_survivors
from dms_kernels.sparse_prefill.reference import store_survivors_reference
from emulate.launching import emulating

SHAPES = {
    "several tiles": {"T": 80, "S": 150, "window": 20, "kept": [40, 3]},
    "padding and sinks": {"B": 2, "T": 20, "S": 40, "H": 1, "start": [3, 25], "window": 6, "sinks": True},
    "softcap": {"T": 20, "S": 50, "H": 1, "softcap": 2.0, "kept": [20]},
    "int8": {"T": 20, "S": 50, "H": 1, "kept": [40], "quantized": torch.int8},
    "int4": {"T": 20, "S": 50, "H": 1, "kept": [40], "quantized": torch.uint8},
    "head dim 80, three heads": {"T": 20, "S": 50, "H": 1, "G": 3, "D": 80, "kept": [17]},
    "head dim 128": {"T": 70, "S": 80, "H": 1, "D": 128, "kept": [70], "window": 30},
    "head dim 256": {"T": 20, "S": 40, "H": 1, "D": 256, "window": 10},
}


def check(capability: int, dtype: torch.dtype, kernels=("list_kept_kernel", "prefill_kernel"), resident=1, **shape) -> None:
    case = make_case(**({"D": 64} | shape)).cast(dtype)
    with emulating(capability, resident=resident) as emulation:
        out = case.run(sparse_prefill)
    assert [launch.kernel for launch in emulation.launches] == list(kernels)
    assert_as_precise("sparse_prefill", out, case.run(reference), case.run(in_float64(reference)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(capability, shape):
    check(capability, torch.bfloat16, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ["padding and sinks", "int8", "int4"])
def test_other_dtypes(capability, shape, dtype):
    check(capability, dtype, **SHAPES[shape])


def test_one_tile_by_warp_groups():
    check(90, torch.bfloat16, T=40, S=70, H=1, window=20, kept=[20])


@pytest.mark.slow
def test_pages_of_fp8():
    check(90, torch.bfloat16, T=20, S=50, H=1, kept=[40], quantized=torch.float8_e4m3fn)


@pytest.mark.slow
def test_parts_that_are_merged(capability, monkeypatch):
    monkeypatch.setattr(fused, "num_parts", lambda *_: 2)
    kernels = ("list_kept_kernel", "prefill_kernel", "merge_kernel")
    check(capability, torch.bfloat16, kernels, T=20, S=150, H=1, window=20, kept=[90], resident=2)


WINDOWS = {
    "a chunk": {"num_new": 20},
    "a chunk that outlives the lists": {"length": [60, 70], "num_new": 30, "windows": (0, 5, 20)},
    "int8": {"num_new": 12, "quantized": torch.int8, "length": [80, 60]},
    "int4": {"num_new": 12, "quantized": torch.uint8, "length": [80, 60]},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", WINDOWS.values(), ids=WINDOWS)
def test_several_windows(capability, dtype, shape):
    case = make_windows_case(1, D=64, H=1, **shape)
    q = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)

    def read(case: WindowsCase, q: torch.Tensor) -> torch.Tensor:
        position = case.new["position"][:, -5:]
        return attend(q, position, paged_of(case.stored), recent_of(case), window=case.stored["windows"], scale=0.25)

    narrow = case.cast(dtype)
    with emulating(capability) as emulation:
        out = read(narrow, q)
    assert [launch.kernel for launch in emulation.launches] == ["list_kept_kernel", "prefill_kernel"]
    assert_as_precise("sparse_prefill of several windows", out, read(narrow, q), read(narrow.widened(), q.double()))


def store(capability: int, K: int, page_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    B, H, S, D, P = 2, 2, 30, 64, 16
    k, v = torch.randn(2, B, H, S, D, generator=generator).bfloat16()
    keep = torch.randint(0, K + 1, (B, H, S), generator=generator).to(torch.uint8 if K > 1 else torch.bool)
    position = torch.arange(100, 100 + S, dtype=torch.int32).repeat(B, 1) if K > 1 else None
    num_kept = torch.randint(0, 2 * P, (B, H * K), generator=generator, dtype=torch.int32)
    table = torch.randperm(B * H * K * 5, generator=generator).int().view(B, H * K, 5)
    several = {"positions": torch.full((table.numel(), P), -7, dtype=torch.int32), "windows": (1, 2, 3)} if K > 1 else {}
    beside = scales_of_pages((table.numel(), 2, P), D, page_dtype)
    scales = None if beside is None else torch.zeros(beside[0], dtype=beside[1])
    pages = torch.zeros(table.numel(), 2, P, stored_width(D, page_dtype), dtype=page_dtype)
    ours = PagedKV(pages, table, num_kept, scales, **several)
    theirs = copy.deepcopy(ours)
    with emulating(capability):
        store_survivors(k, v, keep, ours, position)
    store_survivors_reference(k, v, keep, theirs, position)
    # A number half-way between two of int8 may be rounded either way.
    assert (ours.pages.float() - theirs.pages.float()).abs().max() <= (1 if page_dtype == torch.int8 else 0)
    if scales is not None:
        exact = {"rtol": 0.0, "atol": 0.0} if page_dtype == torch.uint8 else {}
        torch.testing.assert_close(ours.page_scales, theirs.page_scales, **exact)
    if K > 1:
        assert torch.equal(ours.positions, theirs.positions)


def test_survivors(capability):
    store(capability, 1, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("K", [1, 3])
def test_survivors_of_several_windows_and_quantised(capability, K, page_dtype):
    store(capability, K, page_dtype)

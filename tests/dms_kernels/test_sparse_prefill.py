"""sparse_prefill: its kernel against the plain one in float64, and that against the rule spelled out in loops."""

import pytest
import torch
from cache_arguments import prefill_over
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from largest import note

from dms_kernels import dispatch
from dms_kernels.quantization import scales_of_pages, stored_width
from dms_kernels.sparse_prefill import reference, sparse_prefill

pytest.importorskip("triton")
from sparse_prompts import TOLERANCE, Case, by_loops, error, in_float64, make_case, use_tiles

from dms_kernels.sparse_prefill import fused

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")

LAUNCH = fused.launch
# An example takes a second: one that fails is small enough.
NO_SHRINKING = (Phase.explicit, Phase.generate)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Few numbers make many tiles, and memory that is given out is poisoned."""
    monkeypatch.setenv("DMS_KERNELS", "triton")
    use_tiles(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, dtype=torch.float32) -> float:
    case = case.cast(dtype)
    before = dispatch.calls().get("sparse_prefill", {}).get("triton", 0)
    found = case.run(sparse_prefill)
    assert dispatch.calls()["sparse_prefill"]["triton"] == before + 1
    assert found.dtype == dtype
    worst = error(found, case.cast(torch.float64).run(in_float64(reference)))
    note(f"sparse_prefill {dtype}", out=worst)
    assert worst <= TOLERANCE[dtype]
    return worst


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"B": 2, "start": (0, 20), "kept": (17, 0)},
        {"kept": (5, 30), "quantized": torch.int8, "softcap": 2.0, "sinks": True},
        {"kept": (5, 30), "quantized": torch.uint8},
        {"T": 32, "window": 0},
    ],
    ids=["entries", "padding", "int8", "int4", "prompt"],
)
def test_the_reference_is_the_rule(shape):
    case = make_case(**shape)
    torch.testing.assert_close(case.run(reference), by_loops(case))


SHAPES = {
    "prompt": {"T": 40, "S": 40},
    "chunk, pages, padding": {"B": 2, "H": 1, "start": (0, 13), "kept": (35, 16)},
    "a row of padding": {"B": 2, "H": 1, "start": (32, 31), "kept": (7,)},
    "pages of 32": {"P": 32, "kept": (0, 70)},
    "pages of 64": {"P": 64, "kept": (1, 64)},
    "no window": {"window": 0, "kept": (16,)},
    "a window of one": {"window": 1, "S": 40},
    "a wide window": {"window": 100},
    "all evicted": {"evicted": (1.0,), "S": 40},
    "all kept": {"evicted": (0.0,), "S": 40},
    "one query": {"T": 1, "G": 1, "S": 40, "kept": (33, 0)},
    "groups of three": {"G": 3, "D": 20, "H": 1, "kept": (20,)},
    "groups of four": {"G": 4, "D": 64, "H": 1, "contiguous": True},
    "a group larger than a tile": {"G": 20, "H": 1, "T": 3, "kept": (20,)},
    "softcap and sinks": {"softcap": 2.0, "sinks": True, "kept": (20, 3)},
    "int8": {"quantized": torch.int8, "kept": (20, 32)},
    "float8": {"quantized": torch.float8_e4m3fn, "kept": (20, 32)},
    "int4": {"quantized": torch.uint8, "kept": (20, 32)},
    "int4, padded heads": {"quantized": torch.uint8, "kept": (20,), "D": 80, "H": 1, "T": 9},
}


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_equals_reference(shape):
    check(make_case(**shape))


@interpreted
@pytest.mark.parametrize("block_m, block_n, parts", [(32, 16, 3), (16, 32, 1), (64, 32, 2)])
def test_other_tiles_and_parts(monkeypatch, block_m, block_n, parts):
    use_tiles(monkeypatch, block_m, block_n, parts)
    check(make_case(B=2, S=60, start=(0, 30), kept=(40, 5), sinks=True))


@interpreted
def test_float16():
    check(make_case(kept=(20, 0)), torch.float16)
    check(make_case(kept=(20, 32), quantized=torch.int8), torch.float16)
    check(make_case(kept=(20, 32), quantized=torch.uint8, T=9), torch.float16)


@interpreted
def test_small_scales_in_float16():
    """Weights times scales would be subnormal."""
    case = make_case(kept=(32,), window=0, evicted=(1.0,), quantized=torch.int8)
    case.options["page_scales"] /= 1000
    case.tensors[2] = case.tensors[2] / 1000
    check(case, torch.float16)


def test_tiles_are_powers_of_two():
    for shared in (101_376, 166_912, 232_448):
        target = dispatch.Target(capability=90, num_processors=132, shared_bytes=shared)
        for D in (16, 64, 80, 128, 256):
            for rows in (1, 64, 65, 4096):
                for dtype in (torch.float16, torch.float32):
                    block_m, block_n, num_warps, _ = LAUNCH(target, D, rows, dtype)
                    assert all(n & (n - 1) == 0 for n in (block_m, block_n, num_warps)) and min(block_m, block_n) >= 16


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 9999),
        "B": st.integers(1, 2),
        "H": st.integers(1, 2),
        "G": st.sampled_from([1, 2, 3, 5]),
        "T": st.integers(1, 30),
        "D": st.sampled_from([16, 20, 32]),
        "P": st.sampled_from([16, 32, 64]),
        "window": st.one_of(st.integers(0, 2), st.integers(3, 70)),
        "kept": st.one_of(st.none(), st.lists(st.integers(0, 70), min_size=1, max_size=4)),
        "evicted": st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=1, max_size=3),
        "softcap": st.sampled_from([None, 3.0]),
        "sinks": st.booleans(),
        "quantized": st.sampled_from([None, torch.int8, torch.uint8]),
        "contiguous": st.booleans(),
    }
)


def check_random(shape, more, padding, tiles, dtype):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiles(monkeypatch, *tiles)
        S = shape["T"] + more
        start = [min(S, n) for n in padding[: shape["B"]]]
        if shape["kept"] is None:
            shape = shape | {"quantized": None}
        if shape["quantized"] == torch.uint8 and shape["D"] == 20:
            shape = shape | {"D": 48}
        return check(make_case(**shape, S=S, start=start if any(start) else None), dtype)


any_case = given(
    shape=shapes,
    more=st.integers(0, 40),
    padding=st.tuples(st.integers(0, 50), st.sampled_from([0, 0, 3])),
    tiles=st.sampled_from([(16, 16, 1), (32, 16, 2), (16, 32, 1), (64, 16, 3)]),
    dtype=st.sampled_from(list(TOLERANCE)),
)


@interpreted
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=NO_SHRINKING)
@any_case
def test_any_case(shape, more, padding, tiles, dtype):
    check_random(shape, more, padding, tiles, dtype)


@interpreted
@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@any_case
def test_many_cases(shape, more, padding, tiles, dtype):
    check_random(shape, more, padding, tiles, dtype)


# As operators, and what is refused.


@interpreted
def test_operators_hold_what_they_promise():
    case = make_case(B=2, start=(0, 3), kept=(20, 3), softcap=2.0, sinks=True).cast(torch.float32)
    case.tensors[5] = case.tensors[5].nan_to_num()
    case.tensors[:3] = [x.nan_to_num() for x in case.tensors[:3]]
    options = case.options
    tests = ("test_schema", "test_faketensor")
    torch.use_deterministic_algorithms(False)
    arguments = (*case.tensors, options["sink_logits"], None, None, None, [options["window"]], options["scale"], options["softcap"])
    torch.library.opcheck(fused.prefill, arguments, test_utils=tests)
    k, v, leaves = case.tensors[1:4]
    num_kept = torch.zeros(2, 2, dtype=torch.int32)
    table = torch.arange(12, dtype=torch.int32).view(2, 2, 3)
    for dtype in (torch.float32, torch.int8, torch.uint8):
        beside = scales_of_pages((12, 2, 16), 16, dtype)
        pages = torch.zeros(12, 2, 16, stored_width(16, dtype), dtype=dtype)
        scales = None if beside is None else torch.zeros(beside[0], dtype=beside[1])
        torch.library.opcheck(fused.store, (k, v, ~leaves, num_kept, table, pages, scales, None, None), test_utils=tests)


def test_plain_pytorch_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "reference")
    dispatch.reset_calls()
    case = make_case(kept=(20,))
    torch.testing.assert_close(case.run(sparse_prefill), by_loops(case))
    assert dispatch.calls() == {"sparse_prefill": {"reference": 1}}


@interpreted
def test_what_the_kernel_cannot_take():
    for case, problem in ((make_case(), "float64"), (make_case(D=272, S=24).cast(torch.float32), "head dims up to 256")):
        with pytest.raises(RuntimeError, match=problem):
            case.run(sparse_prefill)


WRONG = {
    "more queries than entries": (
        lambda c: c | {"k": c["k"][:, :, :20], "v": c["v"][:, :, :20], "evicted": c["evicted"][:, :, :20]},
        "24 queries",
    ),
    "heads": (lambda c: c | {"q": c["q"][:, :3]}, "multiple of KV heads"),
    "dtypes": (lambda c: c | {"v": c["v"].half()}, "one dtype"),
    "decisions": (lambda c: c | {"evicted": c["evicted"].int()}, "must be bool"),
    "start": (lambda c: c | {"start": torch.zeros(2, dtype=torch.int32)}, "start must be int32"),
    "pages": (lambda c: c | {"pages": c["pages"][:, :1]}, "pages is .* and should be"),
    "strided pages": (lambda c: c | {"pages": c["pages"].flip(3).transpose(2, 3).contiguous().transpose(2, 3)}, "pages is not contiguous"),
    "no table": (lambda c: c | {"page_table": None}, "page_table is missing"),
    "counts": (lambda c: c | {"num_kept": c["num_kept"].long()}, "num_kept is torch.int64 and should be"),
    "no scales": (lambda c: c | {"pages": c["pages"].to(torch.int8)}, "page_scales is missing"),
    "scales": (lambda c: c | {"page_scales": torch.zeros(2)}, "page_scales belong to pages of one of torch.int8"),
    "pages of another dtype": (lambda c: c | {"pages": c["pages"].half()}, "pages are torch.float16 beside entries of torch.float32"),
    "window": (lambda c: c | {"window": -1}, "window must be"),
    "scale": (lambda c: c | {"scale": 0.0}, "scale must be"),
    "sinks": (lambda c: c | {"sink_logits": torch.zeros(3)}, "sink_logits must be"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(change, message):
    case = make_case(kept=(20,)).cast(torch.float32)
    names = ("q", "k", "v", "evicted", "start", "pages", "page_table", "num_kept")
    with pytest.raises(ValueError, match=message):
        prefill_over(sparse_prefill, **change(dict(zip(names, case.tensors, strict=True)) | case.options))

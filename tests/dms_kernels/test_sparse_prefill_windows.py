"""sparse_prefill and store_survivors with several windows: the kernels and the plain ones against the rule spelled out in loops."""

import copy

import pytest
import torch
from cache_arguments import paged_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest import note
from window_caches import WindowsCase, make_windows_case, recent_of

from dms_kernels import dispatch
from dms_kernels.arguments import PagedKV
from dms_kernels.quantization import scales_of_pages, stored_width
from dms_kernels.sparse_prefill import attend, sparse_prefill, store_survivors

pytest.importorskip("triton")
from sparse_prompts import use_tiles

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")

SHAPES = {
    "a prompt": {"length": [0, 0], "num_new": 40, "padding": 0.0, "windows": (3, 9, 21)},
    "a prompt with padding": {"length": [0, 0], "num_new": 40, "windows": (0, 6)},
    "a chunk": {"num_new": 20},
    "a chunk that outlives the lists": {"length": [60, 70], "num_new": 50, "windows": (0, 5, 20)},
    "four windows": {"num_new": 30, "windows": (0, 1, 17, 40), "H": 1},
    "windows longer than all": {"num_new": 20, "windows": (4, 500, 900), "H": 1},
    "pages of 32": {"num_new": 12, "P": 32, "H": 1},
    "int8": {"num_new": 20, "quantized": torch.int8, "length": [80, 60]},
    "int4": {"num_new": 20, "quantized": torch.uint8, "length": [80, 60]},
}


def run(monkeypatch, how: str, case: WindowsCase, T: int, G=2, seed=0, softcap=None, sinks=False) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries of the last T new tokens: what `attend` gives, and what it should."""
    generator = torch.Generator().manual_seed(seed)
    B, H = case.text_class.shape[:2]
    q = torch.randn(B, H * G, T, case.text_kv.shape[-1], generator=generator, dtype=torch.float64)
    options = {"scale": 0.25, "softcap": softcap, "sink_logits": torch.randn(H * G, generator=generator) if sinks else None}
    position = case.new["position"][:, -T:]
    expected = case.by_loops(q, position, **options)
    monkeypatch.setenv("DMS_KERNELS", how)
    q = q.to(case.stored["ring_kv"].dtype)
    found = attend(q, position, paged_of(case.stored), recent_of(case), window=case.stored["windows"], **options)
    assert found.isfinite().all()
    return found, expected


def check(monkeypatch, case: WindowsCase, **how) -> None:
    found, expected = run(monkeypatch, "triton", case.cast(torch.float32), **how)
    worst = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    note("sparse_prefill of several windows", out=worst)
    assert worst <= 5e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_reference_is_the_rule(monkeypatch, shape):
    case = make_windows_case(1, **shape)
    found, expected = run(monkeypatch, "reference", case, T=min(24, shape["num_new"]), sinks=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_is_the_rule(monkeypatch, shape):
    use_tiles(monkeypatch)
    check(monkeypatch, make_windows_case(2, **shape), T=min(24, shape["num_new"]))


@interpreted
@pytest.mark.parametrize("block_m, block_n, parts", [(32, 16, 3), (16, 32, 2)])
def test_other_tiles_and_parts(monkeypatch, block_m, block_n, parts):
    use_tiles(monkeypatch, block_m, block_n, parts)
    check(monkeypatch, make_windows_case(3, length=[90, 70], num_new=40, windows=(2, 25, 60)), T=20, softcap=2.0, sinks=True)


@interpreted
@pytest.mark.parametrize("page_dtype", [torch.float32, torch.int8, torch.uint8])
def test_survivors_go_to_their_lists(monkeypatch, page_dtype):
    use_tiles(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    B, H, K, S, D, P = 2, 2, 3, 50, 16, 16
    k, v = torch.randn(2, B, H, S, D, generator=generator)
    keep = torch.randint(0, K + 1, (B, H, S), generator=generator).to(torch.uint8)
    position = torch.arange(100, 100 + S, dtype=torch.int32).repeat(B, 1) * torch.tensor([[1], [3]], dtype=torch.int32)
    num_kept = torch.randint(0, 2 * P, (B, H * K), generator=generator, dtype=torch.int32)
    table = torch.randperm(B * H * K * 6, generator=generator).int().view(B, H * K, 6)
    beside = scales_of_pages((table.numel(), 2, P), D, page_dtype)
    pages = torch.zeros(table.numel(), 2, P, stored_width(D, page_dtype), dtype=page_dtype)
    scales = None if beside is None else torch.zeros(beside[0], dtype=beside[1])
    positions = torch.full((table.numel(), P), -7, dtype=torch.int32)
    stored = []
    for how in ("triton", "reference"):
        monkeypatch.setenv("DMS_KERNELS", how)
        mine = copy.deepcopy(PagedKV(pages, table, num_kept, scales, positions=positions, windows=(1, 2, 3)))
        store_survivors(k, v, keep, mine, position)
        stored.append(mine)
    for name in ("pages", "page_scales", "positions"):
        left, right = (getattr(x, name) for x in stored)
        atol = 1.0 if left is not None and left.dtype == torch.int8 else 0.0 if page_dtype == torch.uint8 else 1e-6
        torch.testing.assert_close(left, right, rtol=0, atol=atol)
    for b in range(B):
        for number in range(H * K):
            h, c = divmod(number, K)
            at = (keep[b, h] == c + 1).nonzero()[:, 0]
            places = num_kept[b, number] + torch.arange(len(at))
            page = table[b, number, places // P].long()
            assert torch.equal(stored[0].positions[page, places % P], position[b, at])
            if scales is None:
                assert torch.equal(stored[0].pages[page, :, places % P], torch.stack([k[b, h, at], v[b, h, at]], 1))
    assert int((stored[0].positions != -7).sum()) == int((keep > 0).sum())


def test_what_does_not_go_together_is_refused():
    case = make_windows_case(1, num_new=4)
    paged = paged_of(case.stored)
    q, k = torch.zeros(2, 2, 4, 16, dtype=torch.float64), torch.zeros(2, 2, 4, 16, dtype=torch.float64)
    state, last = torch.zeros(2, 2, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    for window, states, pages, where, message in (
        ((3, 20), state, paged, last, r"the pages are of windows \(3, 20, 33\), and window is \(3, 20\); give both the same"),
        ((3, 20, 33), state, paged, None, "last_position goes with pages of several windows, and with those alone"),
        ((3, 20, 33), state, None, last, "last_position goes with pages of several windows, and with those alone"),
        ((3, 20, 33), state.bool(), paged, last, "evicted must be uint8"),
        ((20, 3), state, None, None, r"window must be one number of tokens, or up to 4 rising ones, got \(20, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_prefill(q, k, k, states, None, pages, window=window, scale=1.0, last_position=where)
    with pytest.raises(ValueError, match="position goes with pages of several windows"):
        store_survivors(k, k, state, paged)


@interpreted
@pytest.mark.slow
@settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 9999), B=st.integers(1, 2), H=st.integers(1, 2), D=st.sampled_from([16, 20]), P=st.sampled_from([16, 32]),
    windows=st.sampled_from([(0, 1), (2, 30), (5, 6, 7), (0, 3, 40, 50)]), num_new=st.integers(1, 40), quantized=st.sampled_from([None, torch.int8, torch.uint8]),
    most=st.sampled_from([0, 90]), padding=st.sampled_from([0.0, 0.2]), T=st.integers(1, 40), parts=st.integers(1, 3),
)  # fmt: skip
def test_any_cache(monkeypatch, T, parts, num_new, **shape):
    use_tiles(monkeypatch, parts=parts)
    if shape["quantized"] == torch.uint8 and shape["D"] == 20:
        shape["D"] = 48
    check(monkeypatch, make_windows_case(num_new=num_new, **shape), T=min(T, num_new))

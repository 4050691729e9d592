"""paged_decode over the lists of several windows: its kernel and the plain one against the rule spelled out in loops."""

import pytest
import torch
from cache_arguments import decode_over
from few_programs import with_few_programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest import note
from window_caches import WindowsCase, make_windows_case

from dms_kernels import dispatch
from dms_kernels.paged_decode import paged_decode, reference

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")

SHAPES = {
    "step": {},
    "two windows": {"windows": (0, 5)},
    "four windows": {"windows": (0, 1, 17, 40), "H": 1},
    "short rows": {"most": 5},
    "long rows": {"length": [89, 150], "P": 32},
    "a growing ring": {"windows": (9, 30), "grown": 4},
    "int8": {"quantized": torch.int8, "length": [80, 60]},
    "int4": {"quantized": torch.uint8, "length": [80, 60]},
}


def run(attend, case: WindowsCase, T=1, G=2, seed=0, softcap=None, sinks=False, ruled=False, **launch):
    """The queries of the last T new tokens, or the newest stored token's: what `attend` gives, and what it should."""
    generator = torch.Generator().manual_seed(seed)
    B, H = case.text_class.shape[:2]
    q = torch.randn(B, H * G, T, case.text_kv.shape[-1], generator=generator, dtype=torch.float64)
    options = {"scale": 0.25, "softcap": softcap, "sink_logits": torch.randn(H * G, generator=generator) if sinks else None}
    position = torch.tensor(case.length)[:, None].int() - 1
    more = {}
    if case.new:
        position = case.new["position"][:, -T:].contiguous()
        more = {f"new_{name}": x for name, x in case.new.items()} | {"q_position": position}
    stored = case.stored
    if ruled:
        # The ring's last token has its state from the call.
        at = (stored["seq_len"].long() - 1).clamp(min=0) % (stored["windows"][0] + 1)
        at = at[:, None, None].expand(B, H, 1).clamp(max=stored["ring_state"].shape[2] - 1)
        more["last_state"] = stored["ring_state"].gather(2, at)[..., 0].contiguous()
        stored = stored | {"ring_state": stored["ring_state"].scatter(2, at, 2)}
    expected = case.by_loops(q, position, **options)
    if attend is reference:
        return decode_over(reference, q, stored, window=stored["windows"][0], **options, **more), expected

    def call():
        return decode_over(paged_decode, q.float(), stored, window=stored["windows"][0], **options, **more)

    return with_few_programs(call, **launch), expected


def check(case: WindowsCase, **how) -> None:
    found, expected = run(paged_decode, case.cast(torch.float32), **how)
    assert not found.isnan().any()
    worst = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    note("paged_decode of several windows", out=worst)
    assert worst <= 5e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("num_new", [0, 5])
def test_the_reference_is_the_rule(shape, num_new):
    case = make_windows_case(3, num_new=num_new, **shape)
    found, expected = run(reference, case, T=min(3, num_new) or 1, ruled=num_new > 0, sinks=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step(shape):
    check(make_windows_case(1, **shape), tile=16)


@interpreted
@pytest.mark.parametrize("shape", [SHAPES["step"], SHAPES["four windows"], SHAPES["int8"]], ids=str)
def test_queries_of_tokens_that_are_not_stored(shape):
    check(make_windows_case(2, num_new=7, **shape), T=4, ruled=True, tile=16)


@interpreted
@pytest.mark.parametrize("how", [{"num_programs": 1}, {"num_programs": 13}, {"tile": 32}, {"softcap": 2.0, "sinks": True}], ids=str)
def test_whoever_reads_what(how):
    """Lists that one program reads, that several do, and tiles of more than a page."""
    check(make_windows_case(4, length=[120, 50]), **({"tile": 16} | how))


@interpreted
def test_rows_without_a_query():
    """A row that is not real has no tiles, whatever its lists hold."""
    case = make_windows_case(5, length=[70, 80]).cast(torch.float32)
    q, real = torch.randn(2, 2, 1, 16), torch.tensor([True, False])

    def over(attend):
        return decode_over(attend, q, case.stored, window=3, scale=0.25, real=real)

    found = with_few_programs(lambda: over(paged_decode), tile=16)
    assert (found[1] == 0).all() and (found[0] != 0).any()
    torch.testing.assert_close(found, over(reference), atol=1e-5, rtol=1e-5)


def test_pages_and_ring_of_different_windows_are_refused():
    case = make_windows_case(5)
    with pytest.raises(ValueError, match=r"the pages are of windows \(3, 20, 33\) and the ring of \(4, 20, 33\); give both the same"):
        decode_over(paged_decode, torch.zeros(2, 2, 1, 16), case.stored, window=4, scale=1.0)


@interpreted
@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 9999), B=st.integers(1, 3), H=st.integers(1, 2), D=st.sampled_from([16, 20]), P=st.sampled_from([16, 32]),
    windows=st.sampled_from([(0, 1), (2, 30), (5, 6, 7), (0, 3, 40, 50)]), num_new=st.integers(0, 5), quantized=st.sampled_from([None, torch.int8, torch.uint8]),
    T=st.integers(1, 4), G=st.sampled_from([1, 3]), num_programs=st.integers(1, 9), tile=st.sampled_from([16, 32]),
)  # fmt: skip
def test_any_cache(T, G, num_programs, tile, num_new, **shape):
    if shape["quantized"] == torch.uint8 and shape["D"] == 20:
        shape["D"] = 48
    case = make_windows_case(num_new=num_new, **shape)
    check(case, T=min(T, max(num_new, 1)), G=G, ruled=num_new > 0, num_programs=num_programs, tile=tile)

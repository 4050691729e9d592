"""Sequences in slots of a cache: `append` and `paged_decode` of some rows, in any order, against each row by itself."""

import pytest
import torch
from append_steps import empty_cache, kept, normals
from cache_arguments import append_to, decode_over
from decode_cases import make_case
from launched_steps import follow_two_ways

from dms_kernels import dispatch
from dms_kernels.append import append
from dms_kernels.append.reference import reference
from dms_kernels.paged_decode import paged_decode

pytest.importorskip("triton")

ROWS, H, D, P = 5, 2, 16, 16
ROUTES = [
    "reference",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")
    ),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("windows", [pytest.param(None, marks=pytest.mark.slow), (2, 9, 20)], ids=str)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_rows_that_a_step_names_go_on_and_no_others(monkeypatch, route, windows, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = empty_cache(ROWS, H, D, P, window=2, windows=windows)
    alone = [empty_cache(1, H, D, P, window=2, windows=windows) for _ in range(ROWS)]
    monkeypatch.setenv("DMS_KERNELS", route)
    for step in range(60 if seed else 32):
        B = int(torch.randint(1, ROWS + 1, (1,), generator=generator))
        slot = torch.randperm(ROWS, generator=generator)[:B].int()
        slot[torch.rand(B, generator=generator) < 0.2] = -1
        token = {"k": normals(B, H, D, seed=step), "v": normals(B, H, D, seed=step + 100), "q": normals(B, 2 * H, D, seed=step + 200)}
        angle = torch.rand(B, D, generator=generator)
        shape = (B, H) if windows is None else (B, H, 3)
        token |= {"evict": torch.rand(*shape, generator=generator) < 0.25, "cos": angle.cos(), "sin": angle.sin()}
        token["real"] = torch.rand(B, generator=generator) < 0.9
        how = {"window": 2, "sinks": 1, "alignment": "next" if seed else "own"}
        rotated = append_to(append, whole, slot=slot, **token, **how)
        for b, row in enumerate(slot.tolist()):
            part = {name: x[b : b + 1] for name, x in token.items()}
            cache = alone[row] if row >= 0 else empty_cache(1, H, D, P, window=2, windows=windows)
            torch.testing.assert_close(rotated[b : b + 1], append_to(reference, cache, **part, **how), rtol=1e-6, atol=1e-6)
        for row, cache in enumerate(alone):
            for name in ("ring_kv", "ring_state", "seq_len", "num_kept", "evicted", "decided"):
                torch.testing.assert_close(whole[name][row : row + 1], cache[name], equal_nan=True, rtol=1e-6, atol=1e-6)
            for number in range(cache["num_kept"].shape[1]):
                torch.testing.assert_close(kept(whole, row, number), kept(cache, 0, number), rtol=1e-6, atol=1e-6)
    assert (
        whole["seq_len"].min() > 2
        and whole["num_kept"].max() > (P if windows is None and seed else 4)
        and not whole["overflow"]
        and not whole["ticket"].any()
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [{}, {"sinks": True, "softcap": 3.0}, {"most_pages": 0}, {"T": 2, "trial": True}], ids=str)
def test_queries_of_rows_that_a_step_names(monkeypatch, route, shape):
    case = make_case(1, B=ROWS, D=D, P=P, **shape).cast(torch.float32)
    slot = torch.tensor([3, -1, 0, 4], dtype=torch.int32)
    monkeypatch.setenv("DMS_KERNELS", "reference")
    expected = case.run(paged_decode)[slot.long()]
    expected[1] = 0
    stored = case.stored | {"q": case.stored["q"][slot.long()].contiguous()}
    changes = {} if "q_position" not in case.options else {"q_position": case.options["q_position"][slot.long()].contiguous()}
    monkeypatch.setenv("DMS_KERNELS", route)
    out = decode_over(paged_decode, stored["q"], stored, **(case.options | changes), slot=slot)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_what_slots_may_be():
    cache, token = empty_cache(2, H, D, P), {"k": normals(3, H, D), "v": normals(3, H, D), "evict": torch.zeros(3, H, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"slot is torch.int64 and should be torch.int32"):
        append_to(append, cache, window=3, slot=torch.arange(3), **token)
    with pytest.raises(ValueError, match="slot is of 3 sequences and the cache has 2 rows"):
        append_to(append, cache, window=3, slot=torch.arange(3).int(), **token)
    with pytest.raises(ValueError, match=r"slot is \(2,\) and should be \(3,\)"):
        decode_over(paged_decode, normals(3, H, 1, D), empty_cache(4, H, D, P), window=3, scale=1.0, slot=torch.arange(2).int())


@pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")
@pytest.mark.parametrize(
    "slot", [pytest.param(None, marks=pytest.mark.slow), torch.tensor([2, 0], dtype=torch.int32)], ids=["rows", "slots"]
)
def test_steps_that_launch_as_before(monkeypatch, slot):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    follow_two_ways(slot)

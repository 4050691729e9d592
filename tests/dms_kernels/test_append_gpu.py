"""append on a GPU: as the plain one in bfloat16, over captured launches, at large batches, under torch.compile."""

import copy

import pytest
import torch
from cache_arguments import append_to, decode_over

from dms_kernels.append import append, reference
from dms_kernels.arguments import GateInputs
from dms_kernels.paged_decode import paged_decode
from dms_kernels.paged_decode import reference as plain_decode
from dms_kernels.quantization import scales_of_pages, stored_width

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

B, H, G, D, M, P = 3, 8, 4, 128, 4096, 64


def empty_cache(B=B, window=20, num_pages=200, max_pages=8, page_dtype=None, D=D) -> dict:
    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    cache = {
        "ring_kv": zeros(B, H, 2, window + 1, D, dtype=torch.bfloat16),
        "ring_state": zeros(B, H, window + 1, dtype=torch.uint8),
        "seq_len": zeros(B),
        "num_kept": zeros(B, H),
        "page_table": zeros(B, H, max_pages),
        "pages": zeros(num_pages, 2, P, stored_width(D, page_dtype or torch.bfloat16), dtype=page_dtype or torch.bfloat16),
        "references": zeros(num_pages + 1),
        "free": torch.arange(num_pages, dtype=torch.int32, device="cuda").flip(0),
        "num_free": torch.tensor(num_pages, device="cuda"),
        "evicted": zeros(B, H, dtype=torch.int64),
        "decided": zeros(B, dtype=torch.int64),
        "overflow": zeros(1),
        "ticket": zeros(B),
    }
    scales = scales_of_pages((num_pages, 2, P), D, cache["pages"].dtype)
    return cache | ({} if scales is None else {"page_scales": zeros(*scales[0], dtype=scales[1])})


def kept(cache: dict) -> list[torch.Tensor]:
    """Of each head the entries in pages, oldest first, as stored, and their scales."""
    found = []
    for table, n in zip(cache["page_table"].flatten(0, 1), cache["num_kept"].flatten().tolist(), strict=True):
        for name in ("pages", "page_scales"):
            if name in cache:
                found.append(cache[name][table[: -(-n // P)].long()].transpose(0, 1).flatten(1, 2)[:, :n])
    return found


def assert_same(left: dict, right: dict, rtol=0.0, atol=0.0) -> None:
    for name in left.keys() - {"pages", "page_scales", "page_table", "references", "free"}:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(kept(left), kept(right), strict=True):
        if left["pages"].dtype == torch.uint8:
            assert torch.equal(ours, theirs), "int4 is not the same bit by bit"
        # A number on the border of two is rounded either way.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-6 + rtol, atol=1.0 if ours.dtype == torch.int8 else atol)
    used = torch.arange(left["page_table"].shape[2], device="cuda") * P < left["num_kept"][..., None]
    numbers = left["page_table"][used].sort().values
    assert torch.equal(numbers, numbers.unique()), "a page stands in one table"
    assert len(numbers) + int(left["num_free"]) == len(left["free"])
    assert torch.equal(left["references"].nonzero()[:, 0], numbers.long())


def inputs(seed: int, B=B, D=D) -> dict:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    angle = normal(B, D // 2).repeat(1, 2)
    return {
        "k": normal(B, H, D).bfloat16(), "v": normal(B, H, D).bfloat16(), "evict": normal(B, H) > 0.5, "real": normal(B) > -1.5,
        "q": normal(B, H * G, D).bfloat16(), "cos": angle.cos().bfloat16(), "sin": angle.sin().bfloat16(),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "triton")


@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.uint8])
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("window", [0, 1, 20])
def test_step_by_step(window, alignment, page_dtype):
    """Bit for bit without norms; all heads take pages at once, again and again."""
    ours = empty_cache(window=window, page_dtype=page_dtype)
    theirs = copy.deepcopy(ours)
    for step in range(200):
        options = inputs(step) | {"window": window, "alignment": alignment, "sinks": 2}
        if step % 2:
            options["evict"].zero_()
        rotated, expected = append_to(append, ours, **options), append_to(reference, theirs, **options)
        assert torch.equal(rotated, expected)
    assert_same(ours, theirs)
    assert ours["overflow"] == 0 and ours["num_kept"].max() > 64 and (ours["ticket"] == 0).all()


def test_norms_and_gates():
    """Sums in another order move norms by a rounding, and decisions not at all unless they are close."""
    torch.manual_seed(0)
    ours = empty_cache()
    theirs = copy.deepcopy(ours)
    weights = torch.randn(H, M, device="cuda") / 64
    for step in range(100):
        hidden = torch.randn(B, M, device="cuda").bfloat16()
        gate = GateInputs(hidden, weights, torch.zeros(H, device="cuda"), scale=100.0, offset=5.0, normalize=True, evict_bias=0.25)
        options = inputs(step) | {"window": 20, "evict": gate}
        options |= {name: torch.randn(D, device="cuda").bfloat16() for name in ("q_norm", "k_norm")}
        rotated, expected = append_to(append, ours, **options), append_to(reference, theirs, **options)
        torch.testing.assert_close(rotated, expected, rtol=2e-2, atol=6e-2)
    # A sum in another order may round the other way before the rotation, where large terms cancel.
    assert_same(ours, theirs, rtol=2e-2, atol=6e-2)
    assert 0 < ours["evicted"].sum() < ours["decided"].sum() * H


def test_heads_that_want_the_last_pages_at_once():
    """128 heads and 50 pages: 50 get one each, the others are told, and no page is given twice."""
    cache = empty_cache(B=16, window=0, num_pages=50)
    for step in range(3):
        options = inputs(step, B=16) | {"window": 0, "real": None}
        options["evict"].zero_()
        append_to(append, cache, **options)
    assert cache["overflow"] == 1 and cache["num_free"] == 0
    assert sorted(cache["num_kept"].flatten().tolist()) == [0] * 78 + [2] * 50
    assert len(set(cache["page_table"][:, :, 0][cache["num_kept"] > 0].tolist())) == 50


def test_a_captured_step_over_growing_lengths():
    """Append and attention in one graph, replayed from an empty cache on, against the plain ones."""
    window, ours = 20, empty_cache()
    theirs, options = copy.deepcopy(ours), inputs(0) | {"window": window}
    fresh = copy.deepcopy(ours)

    def step():
        q = append_to(append, ours, **options)
        return decode_over(paged_decode, q[:, :, None], ours, window=window, scale=D**-0.5)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for name, tensor in fresh.items():
        ours[name].copy_(tensor)
    for number in range(300):
        new = inputs(number)
        for name, tensor in new.items():
            options[name].copy_(tensor)
        graph.replay()
        q = append_to(reference, theirs, **new, window=window)
        if number % 20 == 0:
            wide = theirs | {name: theirs[name].double() for name in ("ring_kv", "pages")}
            expected = decode_over(plain_decode, q[:, :, None].double(), wide, window=window, scale=D**-0.5)
            torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    assert_same(ours, theirs)
    assert ours["num_kept"].max() > 128 and ours["overflow"] == 0


def test_batch_256():
    ours = empty_cache(B=256, window=4, num_pages=256 * H * 2)
    theirs = copy.deepcopy(ours)
    for step in range(80):
        options = inputs(step, B=256) | {"window": 4}
        append_to(append, ours, **options), append_to(reference, theirs, **options)
    assert_same(ours, theirs)


def test_compiled():
    ours = empty_cache()
    theirs = copy.deepcopy(ours)

    def step(cache, options):
        return append_to(append, cache, **(options | {"k": options["k"] * 2.0}), window=20) + 0.0

    compiled = torch.compile(step, fullgraph=True)
    for number in range(30):
        assert torch.equal(compiled(ours, inputs(number)), step(theirs, inputs(number)))
    assert_same(ours, theirs)

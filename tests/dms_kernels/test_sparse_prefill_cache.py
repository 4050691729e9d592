"""sparse_prefill as the cache uses it: rings, padding anywhere, and survivors on their way into pages."""

from dataclasses import replace

import pytest
import torch

from dms_kernels import dispatch
from dms_kernels.arguments import Keys, PagedKV
from dms_kernels.cached_attention import reference as cached_reference
from dms_kernels.quantization import dequantize, scales_of_pages, stored_width
from dms_kernels.sparse_prefill import _align, attend, reference, store_survivors

pytest.importorskip("triton")
from decode_cases import STALE_SCALE
from sparse_prompts import STALE, TOLERANCE, error, in_float64, make_case, use_tiles

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Few numbers make many tiles, and memory that is given out is poisoned."""
    monkeypatch.setenv("DMS_KERNELS", "triton")
    use_tiles(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# What is stored.


def empty_pages(num_pages, P, D, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    beside = scales_of_pages((num_pages, 2, P), D, dtype)
    if beside is None:
        return torch.full((num_pages, 2, P, D), STALE, dtype=dtype), None
    pages = torch.full((num_pages, 2, P, stored_width(D, dtype)), 99, dtype=dtype)
    return pages, torch.full(beside[0], STALE_SCALE[beside[1]], dtype=beside[1])


@interpreted
@pytest.mark.parametrize("P, page_dtype", [(16, torch.float32), (32, torch.float16), (64, torch.int8), (16, torch.uint8)])
def test_survivors_lie_where_the_reference_puts_them(monkeypatch, P, page_dtype):
    generator = torch.Generator().manual_seed(0)
    B, H, S, D = 2, 2, 50, 80 if page_dtype == torch.uint8 else 20
    dtype = torch.float16 if page_dtype == torch.float16 else torch.float32
    k, v = (torch.randn(B, S, H, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    k[0, 0, 3] = 0.0
    keep = torch.rand(B, H, S, generator=generator) < torch.tensor([0.1, 0.8]).view(1, H, 1)
    keep[1, 0] = False
    num_kept = torch.tensor([[5, 0], [P, P - 1]], dtype=torch.int32)
    table = torch.randperm(40, generator=generator)[: B * H * 5].view(B, H, 5).int()
    stored = {}
    for name in ("reference", "triton"):
        monkeypatch.setenv("DMS_KERNELS", name)
        pages, scales = empty_pages(40, P, D, page_dtype)
        store_survivors(k, v, keep, PagedKV(pages, table, num_kept, scales))
        stored[name] = (pages, scales)
    (expected, expected_scales), (pages, scales) = stored.values()
    if page_dtype == torch.int8:
        torch.testing.assert_close(scales, expected_scales, equal_nan=True)
        assert int((pages.int() - expected.int()).abs().max()) <= 1
    else:
        torch.testing.assert_close(pages, expected, rtol=0, atol=0, equal_nan=True)
    # Entry by entry, in order, behind what was there; and nothing else.
    written = 0
    for b in range(B):
        for h in range(H):
            for n, s in enumerate(keep[b, h].nonzero()[:, 0].tolist()):
                place = int(num_kept[b, h]) + n
                page, entry = int(table[b, h, place // P]), place % P
                found, bound = pages[page, :, entry], torch.zeros(2)
                if scales is not None:
                    beside = scales[page, :, entry]
                    # Of int4 the least component, which comes after the scale, is rounded too.
                    bound = beside[:, 0].view(torch.float16).float().amax(1) * 0.52 if found.dtype == torch.uint8 else beside * 0.5001
                    found = dequantize(found, beside, 0)
                for one, x, most in zip(found, (k, v), bound.tolist(), strict=True):
                    torch.testing.assert_close(one.float(), x[b, h, s].float(), rtol=0, atol=most)
                written += 1
    assert int((pages != 99).any(-1).sum() if scales is not None else pages.isfinite().all(-1).sum()) in range(
        2 * written - 2, 2 * written + 1
    )


@interpreted
def test_nothing_survives():
    pages, _ = empty_pages(1, 16, 16, torch.float32)
    k, none = torch.randn(1, 1, 8, 16), torch.zeros(1, 1, dtype=torch.int32)
    paged = PagedKV(pages, torch.zeros(1, 1, 0, dtype=torch.int32), none)
    store_survivors(k, k, torch.zeros(1, 1, 8, dtype=torch.bool), paged)
    store_survivors(k[:, :, :0], k[:, :, :0], torch.zeros(1, 1, 0, dtype=torch.bool), paged)
    assert pages.isnan().all()


# Rings, holes, padding.


def make_recent(
    seed=0, B=2, H=2, T=20, N=None, D=16, window=6, ring=True, padding="anywhere"
) -> tuple[torch.Tensor, list[Keys], torch.Tensor]:
    """Positions of the queries, ring and new tokens, and how many tokens each row has seen before them. Rows have seen nothing, less
    than a window, more. padding: "anywhere", "left" or "none"; N: new tokens, of which the last T have queries."""
    generator = torch.Generator().manual_seed(seed)
    N = T if N is None else N
    R = window + 1
    seen = torch.tensor([0, 3, 3 * R + 2])[torch.randperm(3, generator=generator)][:B] if ring else torch.zeros(B, dtype=torch.long)
    if padding == "anywhere":
        real = torch.rand(B, N, generator=generator) < 0.8
    else:
        real = torch.arange(N) >= torch.randint(0, N // 2 if padding == "left" else 1, (B, 1), generator=generator)
    position = torch.where(real, seen[:, None] + real.cumsum(1) - 1, -1).int()
    end = seen[:, None] - 1
    slots = (end - (end - torch.arange(R)) % R).clamp(min=-1).int()

    def keys(position):
        k, v = (torch.randn(B, H, position.shape[1], D, generator=generator, dtype=torch.float64) for _ in range(2))
        for x in (k, v):
            x.masked_fill_((position < 0)[:, None, :, None], STALE)
        return Keys(k, v, position, torch.rand(B, H, position.shape[1], generator=generator) < 0.6)

    return position[:, -T:], [keys(slots), keys(position)] if ring else [keys(position)], seen


def check_attend(recent, q_position, pages=None, G=2, window=6, **options) -> None:
    H, D = recent[-1].k.shape[1], recent[-1].k.shape[3]
    q = torch.randn(len(q_position), H * G, q_position.shape[1], D, generator=torch.Generator().manual_seed(1))
    options = {"window": window, "scale": D**-0.5, "softcap": None, "sink_logits": None} | options
    # There, what is hidden may not be NaN.
    finite = [keys._replace(k=keys.k.nan_to_num(), v=keys.v.nan_to_num()) for keys in recent]
    if pages is not None:
        table = pages.page_table.clamp(max=len(pages.pages) - 1)
        wide = replace(pages, pages=pages.pages.double().nan_to_num(), page_table=table)
    else:
        wide = None
    expected = cached_reference(q.double(), q_position, wide, finite, **{name: x for name, x in options.items() if name != "holes"})
    found = attend(q, q_position, pages, [keys._replace(k=keys.k.float(), v=keys.v.float()) for keys in recent], **options)
    assert error(found, expected) <= TOLERANCE[torch.float32]
    assert (found[q_position < 0] == 0).all()


def make_pages(B, H, D, P=16) -> PagedKV:
    case = make_case(B=B, H=H, T=1, S=1, D=D, P=P, kept=(20, 0, 16))
    return case.cast(torch.float32).paged()


@interpreted
@pytest.mark.parametrize("padding", ["anywhere", "left", "none"])
@pytest.mark.parametrize("ring", [False, True], ids=["no ring", "ring"])
def test_attend_equals_cached_attention(ring, padding):
    q_position, recent, _ = make_recent(ring=ring, padding=padding)
    check_attend(recent, q_position, make_pages(2, 2, 16))


@interpreted
def test_attend_to_tokens_on_trial():
    """More new tokens than queries, the first of which may be padding."""
    for seed in range(2):
        q_position, recent, _ = make_recent(seed=seed, T=5, N=20)
        check_attend(recent, q_position, softcap=3.0, sink_logits=torch.randn(4))
    q_position, recent, _ = make_recent(T=5, N=20, ring=False, padding="left")
    check_attend(recent, q_position, holes=False)


@interpreted
def test_attend_reads_tokens_in_place():
    """Without ring and holes nothing is gathered, whether that is known or asked."""
    q_position, recent, _ = make_recent(ring=False, padding="left")
    for holes in (None, False):
        aligned = _align(recent[0].k, q_position, recent, holes)
        assert aligned.k is recent[0].k and aligned.v is recent[0].v and aligned.column is None
    assert _align(recent[0].k, q_position, recent, True).column is not None
    turned = [recent[0]._replace(position=recent[0].position.flip(1))]
    assert _align(recent[0].k, turned[0].position, turned, None).column is not None


def test_attend_needs_positions():
    q_position, recent, _ = make_recent()
    with pytest.raises(ValueError, match="positions and decisions"):
        attend(recent[1].k, q_position, None, [recent[0]._replace(evicted=None), recent[1]], window=6, scale=1.0)


@interpreted
@pytest.mark.parametrize("page_dtype", [torch.float32, torch.int8, pytest.param(torch.uint8, marks=pytest.mark.slow)])
def test_chunks_equal_the_whole(page_dtype):
    """A text read at once, and in chunks through a ring and pages: what leaves the ring is stored if it is kept."""
    B, H, G, S, D, P, window = 2, 2, 2, 60, 16, 16, 6
    R = window + 1
    case = make_case(B=B, H=H, G=G, T=S, S=S, D=D, window=window).cast(torch.float32)
    q, k, v, evicted = case.tensors[:4]
    expected = case.cast(torch.float64).run(in_float64(reference))
    pages, scales = empty_pages(B * H * 4, P, D, page_dtype)
    table = torch.randperm(B * H * 4, generator=torch.Generator().manual_seed(0)).view(B, H, 4).int()
    num_kept = torch.zeros(B, H, dtype=torch.int32)
    slots = torch.arange(R)
    out, seen = [], 0
    for length in (1, 4, 25, 30):
        new = slice(seen, seen + length)
        recent = [Keys(k[:, :, new], v[:, :, new], torch.arange(seen, seen + length).int().expand(B, -1), evicted[:, :, new])]
        if seen:
            position = (seen - 1 - (seen - 1 - slots) % R).clamp(min=-1)
            ring = Keys(k[:, :, position], v[:, :, position], position.int().expand(B, -1), evicted[:, :, position])
            recent.insert(0, ring)
        options = {"window": window, "scale": D**-0.5}
        out.append(attend(q[:, :, new], recent[-1].position, PagedKV(pages, table, num_kept, scales), recent, **options))
        leaving = slice(max(0, seen - R), max(0, seen + length - R))
        keep = ~evicted[:, :, leaving]
        store_survivors(k[:, :, leaving], v[:, :, leaving], keep, PagedKV(pages, table, num_kept, scales))
        num_kept = num_kept + keep.sum(2, dtype=torch.int32)
        seen += length
    assert int(num_kept.max()) > P
    assert error(torch.cat(out, 1), expected) <= {torch.float32: TOLERANCE[torch.float32], torch.int8: 2e-2, torch.uint8: 0.2}[page_dtype]

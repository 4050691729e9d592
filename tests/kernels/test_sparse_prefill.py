"""sparse_prefill, its attend and store_survivors: kernels against the plain ones in float64, and those against the rule in loops."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dms_kernels import picking
from dms_kernels.append.reference import quantize
from dms_kernels.cached_attention import Keys, Pages
from dms_kernels.cached_attention import reference as cached_reference
from dms_kernels.sparse_prefill import attend, reference, sparse_prefill, store_survivors

pytest.importorskip("triton")
from dms_kernels.sparse_prefill import fused

interpreted = pytest.mark.skipif(not picking.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")

LAUNCH = fused.launch
# An example takes a second: one that fails is small enough.
NO_SHRINKING = (Phase.explicit, Phase.generate)
# What stands where nothing may be read.
STALE = float("nan")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Few numbers make many tiles, and memory that is given out is poisoned."""
    monkeypatch.setenv("DMS_KERNELS", "triton")
    use_tiles(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def use_tiles(monkeypatch, block_m=16, block_n=16, parts=1):
    monkeypatch.setattr(fused, "launch", lambda *_: fused.Launch(block_m, block_n, 4, 2))
    monkeypatch.setattr(fused, "num_parts", lambda *_: parts)
    monkeypatch.setattr(fused, "LIST_BLOCK", 16)
    monkeypatch.setattr(fused, "STORE_BLOCK", 16)


@dataclass
class Case:
    """Arguments of sparse_prefill, in float64."""

    tensors: list
    options: dict

    def cast(self, dtype: torch.dtype) -> "Case":
        def to(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x

        return Case([to(x) for x in self.tensors], {name: to(x) for name, x in self.options.items()})

    def run(self, attention) -> torch.Tensor:
        return attention(*self.tensors, **self.options)


def make_case(
    seed=0,
    B=1,
    H=2,
    G=2,
    T=24,
    S=32,
    D=16,
    P=16,
    window=6,
    start=None,
    kept=None,
    evicted=(0.5, 0.95),
    softcap=None,
    sinks=False,
    quantized=None,
    contiguous=False,
) -> Case:
    """Heads with the shares `evicted` of their entries, in turn; kept: entries in pages of each head, in turn, None: no pages.
    Padding and what lies in pages behind the last entry is NaN, tables end in numbers that no page has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def laid_out(heads, length):
        x = normal(B, heads, length, D) if contiguous else normal(B, length, heads, D).transpose(1, 2)
        if start is not None:
            for b in range(B):
                x[b, :, : max(0, start[b] - (S - length))] = STALE
        return x

    q, k, v = laid_out(H * G, T), laid_out(H, S), laid_out(H, S)
    share = torch.tensor(evicted, dtype=torch.float64).repeat(B * H)[: B * H].view(B, H, 1)
    leaves = torch.rand(B, H, S, generator=generator, dtype=torch.float64) < share
    first = None if start is None else torch.tensor(start, dtype=torch.int32)
    options = {"window": window, "scale": D**-0.5, "softcap": softcap, "sink_logits": normal(H * G) if sinks else None}
    if kept is None:
        return Case([q, k, v, leaves, first, None, None, None], options)
    num_kept = torch.tensor(kept).repeat(B * H)[: B * H].view(B, H)
    num_pages = -(-num_kept // P)
    total = int(num_pages.sum()) + 1
    pages = torch.full((total, 2, P, D), STALE, dtype=torch.float64)
    numbers = torch.randperm(total, generator=generator).tolist()
    table = torch.full((B, H, int(num_pages.max()) + 1), 10**6, dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            for place in range(int(num_pages[b, h])):
                table[b, h, place] = numbers.pop()
                filled = min(P, int(num_kept[b, h]) - place * P)
                pages[table[b, h, place], :, :filled] = normal(2, filled, D)
    if quantized is not None:
        stale = pages.isnan().any(-1)
        pages, scales = quantize(pages.nan_to_num(), quantized)
        options["page_scales"] = scales.masked_fill(stale, STALE)
    return Case([q, k, v, leaves, first, pages, table, num_kept.int()], options)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest, relative to the largest number expected."""
    assert found.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def check(case: Case, dtype=torch.float32) -> float:
    case = case.cast(dtype)
    before = picking.calls().get("sparse_prefill", {}).get("triton", 0)
    found = case.run(sparse_prefill)
    assert picking.calls()["sparse_prefill"]["triton"] == before + 1
    assert found.dtype == dtype
    worst = error(found, case.cast(torch.float64).run(_in_float64(reference)))
    assert worst <= TOLERANCE[dtype]
    return worst


def _in_float64(attention):
    def run(*tensors, **options):
        def widened(x):
            return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize in (2, 4) else x

        return attention(*map(widened, tensors), **{name: widened(x) for name, x in options.items()})

    return run


def by_loops(case: Case) -> torch.Tensor:
    q, k, v, evicted, start, pages, table, num_kept = case.tensors
    B, Hq, T, D = q.shape
    H, S = k.shape[1:3]
    window, scales = case.options["window"], case.options.get("page_scales")
    out = torch.zeros(B, T, Hq, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            i, first = S - T + t, 0 if start is None else int(start[b])
            for head in range(Hq) if i >= first else ():
                h = head // (Hq // H)
                seen = [(k[b, h, s], v[b, h, s]) for s in range(first, i + 1) if i - s <= window or not evicted[b, h, s]]
                for n in range(0 if pages is None else int(num_kept[b, h])):
                    page, entry = int(table[b, h, n // pages.shape[2]]), n % pages.shape[2]
                    scale = 1.0 if scales is None else scales[page, :, entry].double()[:, None]
                    seen.append(tuple(pages[page, :, entry].double() * scale))
                logits = torch.stack([q[b, head, t] @ key for key, _ in seen]) * case.options["scale"]
                if case.options["softcap"] is not None:
                    logits = case.options["softcap"] * torch.tanh(logits / case.options["softcap"])
                if case.options["sink_logits"] is not None:
                    logits = torch.cat([logits, case.options["sink_logits"][head, None]])
                weights = logits.softmax(0)
                out[b, t, head] = sum(weight * value for weight, (_, value) in zip(weights, seen, strict=False))
    return out


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"B": 2, "start": (0, 20), "kept": (17, 0)},
        {"kept": (5, 30), "quantized": torch.int8, "softcap": 2.0, "sinks": True},
        {"T": 32, "window": 0},
    ],
    ids=["entries", "padding", "int8", "prompt"],
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


@interpreted
def test_small_scales_in_float16():
    """Weights times scales would be subnormal."""
    case = make_case(kept=(32,), window=0, evicted=(1.0,), quantized=torch.int8)
    case.options["page_scales"] /= 1000
    case.tensors[2] = case.tensors[2] / 1000
    check(case, torch.float16)


def test_tiles_are_powers_of_two():
    for shared in (101_376, 166_912, 232_448):
        target = picking.Target(capability=90, num_processors=132, shared_bytes=shared)
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
        "quantized": st.sampled_from([None, torch.int8]),
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


# What is stored.


def empty_pages(num_pages, P, D, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype == torch.int8:
        return torch.full((num_pages, 2, P, D), 99, dtype=dtype), torch.full((num_pages, 2, P), STALE)
    return torch.full((num_pages, 2, P, D), STALE, dtype=dtype), None


@interpreted
@pytest.mark.parametrize("P, page_dtype", [(16, torch.float32), (32, torch.float16), (64, torch.int8)])
def test_survivors_lie_where_the_reference_puts_them(monkeypatch, P, page_dtype):
    generator = torch.Generator().manual_seed(0)
    B, H, S, D = 2, 2, 50, 20
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
        store_survivors(k, v, keep, num_kept, table, pages, scales)
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
                for i, x in enumerate((k, v)):
                    found = pages[page, i, entry].float()
                    scale = 1.0 if scales is None else scales[page, i, entry]
                    bound = 0.0 if scales is None else float(scale) * 0.5001
                    torch.testing.assert_close(found * scale, x[b, h, s].float(), rtol=0, atol=bound)
                written += 1
    assert int((pages != 99).any(-1).sum() if scales is not None else pages.isfinite().all(-1).sum()) in range(
        2 * written - 2, 2 * written + 1
    )


@interpreted
def test_nothing_survives():
    pages, _ = empty_pages(1, 16, 16, torch.float32)
    k, none = torch.randn(1, 1, 8, 16), torch.zeros(1, 1, dtype=torch.int32)
    store_survivors(k, k, torch.zeros(1, 1, 8, dtype=torch.bool), none, torch.zeros(1, 1, 0, dtype=torch.int32), pages)
    store_survivors(k[:, :, :0], k[:, :, :0], torch.zeros(1, 1, 0, dtype=torch.bool), none, torch.zeros(1, 1, 0, dtype=torch.int32), pages)
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
        wide = pages._replace(pages=pages.pages.double().nan_to_num(), page_table=table)
    else:
        wide = None
    expected = cached_reference(q.double(), q_position, wide, finite, **{name: x for name, x in options.items() if name != "holes"})
    found = attend(q, q_position, pages, [keys._replace(k=keys.k.float(), v=keys.v.float()) for keys in recent], **options)
    assert error(found, expected) <= TOLERANCE[torch.float32]
    assert (found[q_position < 0] == 0).all()


def make_pages(B, H, D, P=16) -> Pages:
    case = make_case(B=B, H=H, T=1, S=1, D=D, P=P, kept=(20, 0, 16))
    pages, table, num_kept = case.cast(torch.float32).tensors[5:]
    return Pages(pages, table, num_kept)


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
def test_attend_reads_tokens_in_place(monkeypatch):
    """Without ring and holes nothing is gathered, whether that is known or asked."""
    from dms_kernels.sparse_prefill import alignment

    q_position, recent, _ = make_recent(ring=False, padding="left")
    for holes in (None, False):
        aligned = alignment.align(recent[0].k, q_position, recent, holes)
        assert aligned.k is recent[0].k and aligned.v is recent[0].v and aligned.column is None
    assert alignment.align(recent[0].k, q_position, recent, True).column is not None
    turned = [recent[0]._replace(position=recent[0].position.flip(1))]
    assert alignment.align(recent[0].k, turned[0].position, turned, None).column is not None


def test_attend_needs_positions():
    q_position, recent, _ = make_recent()
    with pytest.raises(ValueError, match="positions and decisions"):
        attend(recent[1].k, q_position, None, [recent[0]._replace(evicted=None), recent[1]], window=6, scale=1.0)


@interpreted
@pytest.mark.parametrize("page_dtype", [torch.float32, torch.int8])
def test_chunks_equal_the_whole(page_dtype):
    """A text read at once, and in chunks through a ring and pages: what leaves the ring is stored if it is kept."""
    B, H, G, S, D, P, window = 2, 2, 2, 60, 16, 16, 6
    R = window + 1
    case = make_case(B=B, H=H, G=G, T=S, S=S, D=D, window=window).cast(torch.float32)
    q, k, v, evicted = case.tensors[:4]
    expected = case.cast(torch.float64).run(_in_float64(reference))
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
        out.append(attend(q[:, :, new], recent[-1].position, Pages(pages, table, num_kept, scales=scales), recent, **options))
        leaving = slice(max(0, seen - R), max(0, seen + length - R))
        keep = ~evicted[:, :, leaving]
        store_survivors(k[:, :, leaving], v[:, :, leaving], keep, num_kept, table, pages, scales)
        num_kept = num_kept + keep.sum(2, dtype=torch.int32)
        seen += length
    assert int(num_kept.max()) > P
    assert error(torch.cat(out, 1), expected) <= (TOLERANCE[torch.float32] if page_dtype == torch.float32 else 2e-2)


# As operators, and what is refused.


@interpreted
def test_operators_hold_what_they_promise():
    case = make_case(B=2, start=(0, 3), kept=(20, 3), softcap=2.0, sinks=True).cast(torch.float32)
    case.tensors[5] = case.tensors[5].nan_to_num()
    case.tensors[:3] = [x.nan_to_num() for x in case.tensors[:3]]
    options = case.options
    tests = ("test_schema", "test_faketensor")
    torch.use_deterministic_algorithms(False)
    arguments = (*case.tensors, options["sink_logits"], None, options["window"], options["scale"], options["softcap"])
    torch.library.opcheck(fused.prefill, arguments, test_utils=tests)
    k, v, leaves = case.tensors[1:4]
    num_kept = torch.zeros(2, 2, dtype=torch.int32)
    table = torch.arange(12, dtype=torch.int32).view(2, 2, 3)
    for dtype in (torch.float32, torch.int8):
        pages, scales = torch.zeros(12, 2, 16, 16, dtype=dtype), torch.zeros(12, 2, 16) if dtype == torch.int8 else None
        torch.library.opcheck(fused.store, (k, v, ~leaves, num_kept, table, pages, scales), test_utils=tests)


def test_plain_pytorch_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "reference")
    picking.reset_calls()
    case = make_case(kept=(20,))
    torch.testing.assert_close(case.run(sparse_prefill), by_loops(case))
    assert picking.calls() == {"sparse_prefill": {"reference": 1}}


@interpreted
def test_what_the_kernel_cannot_take():
    for case, problem in ((make_case(), "float64"), (make_case(D=272, S=24).cast(torch.float32), "head dimensions up to 256")):
        with pytest.raises(RuntimeError, match=problem):
            case.run(sparse_prefill)


WRONG = {
    "more queries than entries": (
        lambda c: c | {"k": c["k"][:, :, :20], "v": c["v"][:, :, :20], "evicted": c["evicted"][:, :, :20]},
        "24 queries",
    ),
    "heads": (lambda c: c | {"q": c["q"][:, :3]}, "multiple of H"),
    "dtypes": (lambda c: c | {"v": c["v"].half()}, "one dtype"),
    "decisions": (lambda c: c | {"evicted": c["evicted"].int()}, "must be bool"),
    "start": (lambda c: c | {"start": torch.zeros(2, dtype=torch.int32)}, "start must be int32"),
    "a table alone": (lambda c: c | {"pages": None}, "pages is None"),
    "pages": (lambda c: c | {"pages": c["pages"][:, :1]}, "pages must be"),
    "strided pages": (lambda c: c | {"pages": c["pages"].transpose(0, 2)}, "pages must be"),
    "no table": (lambda c: c | {"page_table": None}, "page_table must be"),
    "counts": (lambda c: c | {"num_kept": c["num_kept"].long()}, "num_kept must be"),
    "no scales": (lambda c: c | {"pages": c["pages"].to(torch.int8)}, "page_scales must be"),
    "scales": (lambda c: c | {"page_scales": torch.zeros(2)}, "no page_scales"),
    "window": (lambda c: c | {"window": -1}, "window must be"),
    "scale": (lambda c: c | {"scale": 0.0}, "scale must be"),
    "sinks": (lambda c: c | {"sink_logits": torch.zeros(3)}, "sink_logits must be"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(change, message):
    case = make_case(kept=(20,)).cast(torch.float32)
    names = ("q", "k", "v", "evicted", "start", "pages", "page_table", "num_kept")
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**change(dict(zip(names, case.tensors, strict=True)) | case.options))

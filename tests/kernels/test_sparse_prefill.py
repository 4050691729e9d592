"""sparse_prefill, its attend and store_survivors: kernels against the plain ones in float64, and those against the rule in loops."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
    return float((found - expected).abs().max() / expected.abs().max())


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
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@any_case
def test_any_case(shape, more, padding, tiles, dtype):
    check_random(shape, more, padding, tiles, dtype)


@interpreted
@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@any_case
def test_many_cases(shape, more, padding, tiles, dtype):
    check_random(shape, more, padding, tiles, dtype)

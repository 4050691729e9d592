"""cached_attention on all its routes against its reference, and the reference against the rule spelled out in loops."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dms_kernels import cached_attention as module
from dms_kernels.arguments import Keys, PagedKV
from dms_kernels.cached_attention import attend_few, attend_many, cached_attention, make_read_order, reference

# What stands in entries that nobody may read: finite, as the pool's are, and seen at once if it is read.
STALE = 1e30
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """Arguments of cached_attention."""

    q: torch.Tensor
    q_position: torch.Tensor
    pages: PagedKV | None
    recent: list[Keys]
    options: dict

    def with_read_order(self) -> PagedKV | None:
        if self.pages is None:
            return None
        order = make_read_order(self.pages.page_table, self.pages.num_kept, self.pages.pages.shape[2])
        return replace(self.pages, read_order=order)

    def run(self, attend, pages=None, **changes):
        return attend(self.q, self.q_position, pages, self.recent, **(self.options | changes))


def _case(
    seed, B=2, H=2, G=2, T=3, D=8, P=16, window=4, most_pages=3, new_in_ring=False, holes=True, share=True, capped=False, sinks=False
):
    """A cache after some text: num_kept from none to full pages, page numbers shuffled and with holes, full pages shared between
    rows; a ring whose oldest slots may be empty; T new tokens with padding anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def below(n, *shape):
        return torch.randint(0, n, shape, generator=generator)

    num_kept = below(most_pages * P + 1, B, H) * below(4, B, H).clamp(max=1) if most_pages else torch.zeros(B, H, dtype=torch.long)
    num_pages = -(-num_kept // P)
    total = int(num_pages.sum())
    pool = torch.full((total + (5 if holes else not total), 2, P, D), STALE, dtype=torch.float64)
    numbers = torch.randperm(len(pool), generator=generator)[:total].tolist() if holes else list(range(total))
    table = below(len(pool), B, H, max(1, int(num_pages.max())))
    for b in range(B):
        for h in range(H):
            for place in range(int(num_pages[b, h])):
                filled = min(P, int(num_kept[b, h]) - place * P)
                # A full page of the first row may stand in the others' tables too.
                shared = share and b > 0 and filled == P and int(num_kept[0, h]) >= (place + 1) * P and bool(below(2))
                table[b, h, place] = table[0, h, place] if shared else numbers.pop()
                if not shared:
                    pool[table[b, h, place], :, :filled] = normal(2, filled, D)
    # The window's tokens, then the new ones; a row's first tokens may still be in the ring.
    length = torch.where(num_kept.sum(1) > 0, window + 1 + below(20, B), below(window + 2, B))
    slots = torch.arange(window + 1)
    end = length[:, None] - 1
    position = (end - (end - slots) % (window + 1)).clamp(min=-1)
    ring = Keys(
        normal(B, H, window + 1, D), normal(B, H, window + 1, D), position.int(), torch.rand(B, H, window + 1, generator=generator) < 0.5
    )
    real = torch.rand(B, T, generator=generator) < 0.8
    q_position = torch.where(real, length[:, None] + real.cumsum(1) - 1, -1).int()
    new = Keys(normal(B, H, T, D), normal(B, H, T, D), q_position, torch.rand(B, H, T, generator=generator) < 0.5)
    options = {"window": window, "scale": D**-0.5, "softcap": 3.0 if capped else None, "sink_logits": normal(H * G) if sinks else None}
    pages = PagedKV(pool, table.int(), num_kept.int()) if most_pages else None
    return Case(normal(B, H * G, T, D), q_position, pages, [ring, new], options)


def _cast(case: Case, dtype: torch.dtype) -> Case:
    def to(keys):
        return keys._replace(k=keys.k.to(dtype), v=keys.v.to(dtype))

    pages = case.pages and replace(case.pages, pages=case.pages.pages.to(dtype))
    return Case(case.q.to(dtype), case.q_position, pages, [to(keys) for keys in case.recent], case.options)


def _by_loops(case: Case) -> torch.Tensor:
    B, Hq, T, D = case.q.shape
    H = case.recent[0].k.shape[1]
    out = torch.zeros(B, T, Hq, D, dtype=torch.float64)
    softcap, sinks, window = case.options["softcap"], case.options["sink_logits"], case.options["window"]
    for b in range(B):
        for t in range(T):
            at = int(case.q_position[b, t])
            for head in range(Hq) if at >= 0 else ():
                h = head // (Hq // H)
                entries = []
                for i in range(int(case.pages.num_kept[b, h]) if case.pages else 0):
                    page = case.pages.pages[case.pages.page_table[b, h, i // case.pages.pages.shape[2]]]
                    entries.append(tuple(page[:, i % case.pages.pages.shape[2]]))
                for keys in case.recent:
                    for s, position in enumerate(keys.position[b].tolist()):
                        if 0 <= position <= at and (at - position <= window or not keys.evicted[b, h, s]):
                            entries.append((keys.k[b, h, s], keys.v[b, h, s]))
                scores = torch.stack([case.q[b, head, t] @ k for k, _ in entries]) * case.options["scale"]
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                logits = scores if sinks is None else torch.cat([scores, sinks[head, None]])
                weights = logits.softmax(0)[: len(entries)]
                out[b, t, head] = sum(w * v for w, (_, v) in zip(weights, entries, strict=True))
    return out


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("capped", [False, True], ids=["", "capped"])
@pytest.mark.parametrize("most_pages", [0, 3])
def test_the_reference_is_the_rule(most_pages, capped, sinks):
    for seed in range(4):
        case = _case(seed, most_pages=most_pages, capped=capped, sinks=sinks)
        torch.testing.assert_close(case.run(reference, case.pages), _by_loops(case))


_shapes = {
    "B": st.integers(1, 3),
    "H": st.integers(1, 3),
    "G": st.sampled_from([1, 2, 4]),
    "T": st.one_of(st.integers(1, 8), st.integers(9, 90)),
    "D": st.sampled_from([1, 5, 8, 16]),
    "P": st.sampled_from([16, 32, 64]),
    "window": st.one_of(st.integers(0, 3), st.integers(4, 70)),
    "most_pages": st.integers(0, 5),
    "holes": st.booleans(),
    "share": st.booleans(),
    "capped": st.booleans(),
    "sinks": st.booleans(),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), dtype=st.sampled_from(list(TOLERANCE)), shape=st.fixed_dictionaries(_shapes))
def test_every_route_equals_the_reference(seed, dtype, shape):
    case = _cast(_case(seed, **shape), dtype)
    exact = _cast(case, torch.float64)
    expected = exact.run(reference, exact.pages)
    ordered = case.with_read_order()
    routes = {
        "few, in order": case.run(attend_few, ordered),
        "few, gathered": case.run(attend_few, case.pages),
        "many": case.run(attend_many, ordered),
        "chosen": case.run(cached_attention, ordered),
    }
    with pytest.MonkeyPatch.context() as patch:
        # Blocks shorter than the new tokens, so that some keys lie behind every window of a block.
        patch.setattr(module, "_BLOCK", 16)
        patch.setattr(module, "_BLOCK_EXPLICIT", 16)
        routes["many, in blocks"] = case.run(attend_many, ordered)
    padding = case.q_position < 0
    for name, out in routes.items():
        assert out.dtype == dtype and out.shape == (*case.q_position.shape, case.q.shape[1], case.q.shape[3]), name
        error = (out.double() - expected).abs().max()
        assert error < TOLERANCE[dtype] * (1 + expected.abs().max()), f"{name}: {error}"
        assert (out[padding] == 0).all(), name


@pytest.mark.parametrize("options", [{}, {"capped": True, "sinks": True}], ids=["", "capped with sinks"])
@pytest.mark.parametrize("attend", [attend_few, attend_many])
def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16(attend, options):
    case = _cast(_case(3, T=40, window=20, H=1, **options), torch.bfloat16)
    exact = _cast(case, torch.float64)
    expected = exact.run(reference, exact.pages)
    allowed = (case.run(reference, case.pages).double() - expected).abs().max()
    assert (case.run(attend, case.with_read_order()).double() - expected).abs().max() <= 2 * allowed


def test_a_ring_whose_every_entry_is_visible_needs_no_mask():
    """As in decoding: the ring holds the queries' own tokens. Padding still gives 0."""
    case = _case(0, B=3, T=1, window=6)
    k, v = case.recent[0].k, case.recent[0].v
    for padding in (None, 1):
        case.q_position = torch.full((3, 1), 6)
        if padding is not None:
            case.q_position[padding] = -1
        case.recent = [Keys(k, v, torch.arange(7).expand(3, 7), torch.zeros(3, 2, 7, dtype=torch.bool))]
        expected = case.run(reference, case.pages)
        case.recent = [Keys(k, v, all_visible=True)]
        torch.testing.assert_close(case.run(attend_few, case.with_read_order()), expected)


class _Products(TorchDispatchMode):
    """Sizes [n, rows, keys] of the batched products of queries with the keys of pages, which alone are added to something."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.baddbmm:
            self.shapes.append((*args[1].shape[:2], args[2].shape[2]))
        return func(*args, **(kwargs or {}))


def _shared(num_rows: int, shared_by: list[int], P: int = 16, G: int = 2) -> Case:
    """Page i is full and stands in the tables of the first shared_by[i] rows; every row has a last page of its own."""
    case = _case(1, B=num_rows, H=1, G=G, T=1, P=P, window=3, most_pages=0)
    num_kept = torch.tensor([[sum(n > b for n in shared_by) * P + P // 2] for b in range(num_rows)])
    table = torch.zeros(num_rows, 1, len(shared_by) + 1, dtype=torch.int32)
    for b in range(num_rows):
        held = [i for i, n in enumerate(shared_by) if n > b]
        table[b, 0, : len(held) + 1] = torch.tensor([*held, len(shared_by) + b])
    pool = torch.randn(len(shared_by) + num_rows, 2, P, 8, dtype=torch.float64)
    case.pages = PagedKV(pool, table, num_kept.int())
    return case


def _products_over_pages(case: Case) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    ordered = case.with_read_order()
    with _Products() as products:
        out = case.run(attend_few, ordered)
    return out, products.shapes


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
def test_shared_pages_are_read_once(num_rows):
    case = _shared(num_rows, [num_rows] * 6)
    out, products = _products_over_pages(case)
    torch.testing.assert_close(out, case.run(reference, case.pages))
    num_pages = 6 + num_rows
    assert sum(n for n, _, _ in products) == num_pages
    # The shared pages meet all rows' queries, each last page its own row's.
    assert sum(n * rows * keys for n, rows, keys in products) == 16 * 2 * (6 * num_rows + num_rows)
    assert len(products) == (1 if num_rows == 1 else 2)


def test_a_pool_in_pieces_is_gathered_by_the_number_of_sharers():
    """PagedKV of 1 and of 4 rows in turn would need one product each."""
    case = _shared(4, [1, 4] * 10)
    out, products = _products_over_pages(case)
    torch.testing.assert_close(out, case.run(reference, case.pages))
    assert len(products) <= 3 and sum(n for n, _, _ in products) == 24


def test_rows_that_hold_nothing_of_a_page_are_few():
    """At most half of the rows of a product stand for nobody, whatever the number of holders; a small gap is read over."""
    case = _shared(8, [1, 2, 3, 4, 5, 6, 7, 8])
    out, products = _products_over_pages(case)
    torch.testing.assert_close(out, case.run(reference, case.pages))
    needed = 16 * 2 * (sum(range(1, 9)) + 8)
    assert needed <= sum(n * rows * keys for n, rows, keys in products) <= 2 * needed


def test_a_wide_gap_is_not_read():
    case = _shared(1, [1] * 4)
    pool = torch.full((1000, 2, 16, 8), STALE, dtype=torch.float64)
    numbers = torch.tensor([3, 4, 997, 998, 500])
    pool[numbers] = case.pages.pages
    expected = case.run(reference, case.pages)
    case.pages = PagedKV(pool, numbers[case.pages.page_table.long()].int(), case.pages.num_kept)
    out, products = _products_over_pages(case)
    torch.testing.assert_close(out, expected)
    assert sum(n for n, _, _ in products) == 5


def test_an_empty_table_has_an_empty_read_order():
    assert make_read_order(torch.zeros(2, 2, 3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32), 16).runs == []


def test_few_queries_take_the_route_that_reads_in_place(monkeypatch):
    """64 rows of scores a head and no more."""
    taken = []
    for name in ("attend_few", "attend_many"):
        monkeypatch.setattr(f"dms_kernels.cached_attention.{name}", lambda *args, name=name, **kwargs: taken.append(name))
    for G, T in ((1, 64), (4, 16), (4, 17), (1, 65)):
        case = _case(0, G=G, T=T)
        case.run(cached_attention, case.with_read_order())
    assert taken == ["attend_few", "attend_few", "attend_many", "attend_many"]

"""cached_attention with several windows: page lists by class, whose entries a query sees as far as their window."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_kernels import cached_attention as module
from dms_kernels.arguments import Keys, PagedKV
from dms_kernels.cached_attention import attend_few, attend_many, cached_attention, make_read_order, reference
from dms_kernels.quantization import KV_DTYPES, dequantize, quantize

STALE = 1e30


@dataclass
class Text:
    """Rows that go on differently after a common beginning, and a cache that has read them."""

    k: torch.Tensor
    """[B, H, S, D], of all tokens, stored and new"""
    v: torch.Tensor
    classes: torch.Tensor
    """[B, H, S]: 0 stays, j goes by decision j"""
    stored: list[int]
    """tokens of each row that the cache has read"""
    windows: tuple[int, ...]
    pages: PagedKV
    ring: Keys

    def lifetime(self, b: int, h: int, position: int) -> float:
        number = int(self.classes[b, h, position])
        return self.windows[number - 1] if number else math.inf


def _state(classes: torch.Tensor) -> torch.Tensor:
    return torch.where(classes < 2, classes, classes + 1).to(torch.uint8)


def _read_text(seed: int, windows: tuple[int, ...], B: int, H: int, D: int, P: int, length: int, num_new: int, spread: int = 20) -> Text:
    generator = torch.Generator().manual_seed(seed)
    S, common, K = length + 20 + num_new, length // 2, len(windows)

    def of_rows(x: torch.Tensor) -> torch.Tensor:
        x[:, :, :common] = x[:1, :, :common]
        return x

    k, v = (of_rows(torch.randn(B, H, S, D, generator=generator, dtype=torch.float64)) for _ in range(2))
    classes = of_rows(torch.randint(0, K + 1, (B, H, S), generator=generator))
    stored = [length + int(n) for n in torch.randint(0, spread, (B,), generator=generator)]
    lists: dict[tuple[int, int], list[tuple]] = {}
    kept = torch.zeros(B, H * K, dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            for c in range(K):
                # Class c + 1 in list c, and what stays in list 0.
                number = c + 1 if c else 0
                entries = [p for p in range(stored[b] - windows[0] - 1) if int(classes[b, h, p]) == number]
                chunks = [entries[i : i + P] for i in range(0, len(entries), P)]
                while c and chunks and stored[b] - 1 - chunks[0][-1] > windows[c]:
                    chunks.pop(0)
                kept[b, h * K + c] = sum(map(len, chunks))
                # A full page of the beginning is that of all rows.
                lists[b, h * K + c] = [(0 if len(chunk) == P and chunk[-1] < common else b, h, c, tuple(chunk)) for chunk in chunks]
    keys = sorted({key for listed in lists.values() for key in listed})
    numbers = torch.randperm(len(keys) + 4, generator=generator)[: len(keys)].tolist()
    number_of = dict(zip(keys, numbers, strict=True))
    pool = torch.full((len(keys) + 4, 2, P, D), STALE, dtype=torch.float64)
    positions = torch.randint(0, S, (len(keys) + 4, P), generator=generator, dtype=torch.int32)
    for (b, h, _, chunk), number in number_of.items():
        pool[number, 0, : len(chunk)], pool[number, 1, : len(chunk)] = k[b, h, list(chunk)], v[b, h, list(chunk)]
        positions[number, : len(chunk)] = torch.tensor(chunk, dtype=torch.int32)
    width = max(1, max(map(len, lists.values())))
    table = torch.randint(0, len(pool), (B, H * K, width), generator=generator, dtype=torch.int32)
    for (b, entry), listed in lists.items():
        for place, key in enumerate(listed):
            table[b, entry, place] = number_of[key]
    size = windows[0] + 1
    end = torch.tensor(stored)[:, None] - 1
    position = (end - (end - torch.arange(size)) % size).clamp(min=-1)
    at = position.clamp(min=0)[:, None].expand(B, H, size)
    ring = Keys(
        k.gather(2, at[..., None].expand(-1, -1, -1, D)),
        v.gather(2, at[..., None].expand(-1, -1, -1, D)),
        position.int(),
        state=_state(classes.gather(2, at)),
    )
    return Text(k, v, classes, stored, windows, PagedKV(pool, table, kept, positions=positions, windows=windows), ring)


def _by_the_rule(text: Text, q: torch.Tensor, q_position: torch.Tensor, scale: float) -> torch.Tensor:
    B, Hq, T, D = q.shape
    H = text.k.shape[1]
    out = torch.zeros(B, T, Hq, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            at = int(q_position[b, t])
            for h in range(H) if at >= 0 else ():
                seen = [p for p in range(at + 1) if at - p <= text.lifetime(b, h, p)]
                for head in range(h * Hq // H, (h + 1) * Hq // H):
                    weights = (text.k[b, h, seen] @ q[b, head, t] * scale).softmax(0)
                    out[b, t, head] = weights @ text.v[b, h, seen]
    return out


def _ordered(pages: PagedKV, **changes) -> PagedKV:
    order = make_read_order(pages.page_table, pages.num_kept, pages.pages.shape[2], pages.windows)
    return replace(pages, read_order=order, **changes)


_windows = st.lists(st.integers(0, 70), min_size=2, max_size=4, unique=True).map(lambda x: tuple(sorted(x)))
_shapes = {
    "B": st.integers(1, 3),
    "H": st.integers(1, 2),
    "D": st.sampled_from([2, 8]),
    "P": st.sampled_from([16, 32]),
    "length": st.integers(1, 150),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), windows=_windows, shape=st.fixed_dictionaries(_shapes), T=st.integers(1, 40), G=st.sampled_from([1, 2]))
def test_every_route_is_the_rule(seed, windows, shape, T, G):
    """New tokens with padding between them, over a cache that has read some."""
    text = _read_text(seed, windows, num_new=T, **shape)
    B, H, D = shape["B"], shape["H"], shape["D"]
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(B, T, generator=generator) < 0.8
    q = torch.randn(B, H * G, T, D, generator=generator, dtype=torch.float64)
    position = torch.where(real, torch.tensor(text.stored)[:, None] + real.cumsum(1) - 1, -1).int()
    at = position.clamp(min=0).long()[:, None].expand(B, H, T)
    new = Keys(
        text.k.gather(2, at[..., None].expand(-1, -1, -1, D)),
        text.v.gather(2, at[..., None].expand(-1, -1, -1, D)),
        position,
        state=_state(text.classes.gather(2, at)),
    )
    expected = _by_the_rule(text, q, position, D**-0.5)
    ordered, options = _ordered(text.pages), {"window": windows, "scale": D**-0.5}
    recent = [text.ring, new]
    found = {
        "reference": reference(q, position, text.pages, recent, **options),
        "few, in order": attend_few(q, position, ordered, recent, **options),
        "few, gathered": attend_few(q, position, text.pages, recent, **options),
        "many": attend_many(q, position, ordered, recent, **options),
        "chosen": cached_attention(q, position, ordered, recent, **options),
        # A sink logit of no weight makes the softmax be written out.
        "many, explicit": attend_many(q, position, ordered, recent, sink_logits=torch.full((H * G,), -1e4), **options),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 16)
        found["many, in blocks"] = attend_many(q, position, ordered, recent, **options)
    for name, out in found.items():
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=0, msg=lambda message, name=name: f"{name}: {message}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), windows=_windows, shape=st.fixed_dictionaries(_shapes), G=st.sampled_from([1, 2]))
def test_the_newest_tokens_see_all_but_parts_of_front_pages(seed, windows, shape, G):
    """As in decoding: the newest token stands in the ring, and masks are made for lists' front pages alone."""
    text = _read_text(seed, windows, num_new=0, **shape)
    B, H, D = shape["B"], shape["H"], shape["D"]
    q = torch.randn(B, H * G, 1, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    position = torch.tensor(text.stored, dtype=torch.int32)[:, None] - 1
    ring = text.ring._replace(all_visible=min(text.stored) > windows[0])
    found = attend_few(q, position, _ordered(text.pages, newest_only=True), [ring], window=windows, scale=1.0)
    torch.testing.assert_close(found, _by_the_rule(text, q, position, 1.0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_quantised_pages_are_read_as_what_they_stand_for(kv_dtype):
    text = _read_text(4, (2, 40, 90), B=2, H=2, D=32, P=16, length=100, num_new=3)
    pages, scales = quantize(text.pages.pages, KV_DTYPES[kv_dtype], 1)
    stored = replace(text.pages, pages=pages, page_scales=scales)
    stands_for = replace(text.pages, pages=dequantize(pages, scales, 1).double())
    q = torch.randn(2, 4, 3, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    position = (torch.tensor(text.stored)[:, None] + torch.arange(3)).int()
    at = position.long()[:, None].expand(2, 2, 3)
    k, v = (x.gather(2, at[..., None].expand(-1, -1, -1, 32)) for x in (text.k, text.v))
    recent = [text.ring, Keys(k, v, position, state=_state(text.classes.gather(2, at)))]
    options = {"window": text.windows, "scale": 0.25}
    expected = reference(q, position, stands_for, recent, **options)
    for attend, read in ((reference, stored), (attend_few, stored), (attend_few, _ordered(stored)), (attend_many, _ordered(stored))):
        torch.testing.assert_close(attend(q, position, read, recent, **options), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("B", [1, 2])
def test_newest_tokens_at_one_position_need_no_positions(B):
    """Rows of one length, of which two share front pages that are partly gone."""
    text = _read_text(5, (0, 100), B=B, H=2, D=4, P=16, length=120, num_new=0, spread=1)
    pages = _ordered(text.pages, newest_only=True, newest=119)
    assert any(run.is_front and run.owner.shape[1] == 2 for run in pages.read_order.runs) == (B == 2)
    q = torch.randn(B, 4, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cached_attention(q, None, pages, [text.ring._replace(all_visible=True)], window=(0, 100), scale=1.0)
    expected = _by_the_rule(text, q, torch.full((B, 1), 119), 1.0)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    later = replace(pages, newest=140)
    assert not torch.equal(cached_attention(q, None, later, [text.ring._replace(all_visible=True)], window=(0, 100), scale=1.0), found)


def test_masks_are_made_for_front_pages_alone():
    """The order names the pages of which the newest token may see a part: one for each list that holds something and does not stay."""
    text = _read_text(3, (2, 40, 120), B=1, H=2, D=4, P=16, length=400, num_new=0)
    num_kept, table = text.pages.num_kept.view(6), text.pages.page_table.view(6, -1)
    (run,) = _ordered(text.pages).read_order.runs
    lists = [number for number in range(6) if number % 3 and num_kept[number] > 0]
    fronts = {int(table[number, 0]) for number in lists}
    last = {int(table[number, num_kept[number] // 16]) for number in range(6) if num_kept[number] % 16}
    assert len(lists) == 4 and set(run.part_page.tolist()) == fronts | last
    assert int((run.owner < 2).sum()) == int((-(-num_kept // 16)).sum()) > 12


def test_shared_front_pages_are_masked_for_each_row():
    """Two rows that have read the same to different ends, and share a page of which each sees another part."""
    text = _read_text(5, (0, 100), B=3, H=1, D=4, P=16, length=120, num_new=0)
    order = _ordered(text.pages, newest_only=True).read_order
    assert [run.is_front for run in order.runs].count(True) >= 1 and all(run.part_page is None for run in order.runs)
    shared = [run for run in order.runs if run.is_front and run.owner.shape[1] > 1]
    assert shared and len(set(text.stored)) > 1


def test_windows_that_do_not_go_together():
    text = _read_text(3, (2, 40), B=1, H=1, D=4, P=16, length=100, num_new=0)
    q, position = torch.zeros(1, 1, 1, 4, dtype=torch.float64), torch.tensor([[99]])
    with pytest.raises(
        ValueError, match=r"pages are those of windows \(2, 40\), and attention was called with window \(2, 41\); pass the same"
    ):
        cached_attention(q, position, text.pages, [text.ring], window=(2, 41), scale=1.0)
    with pytest.raises(ValueError, match=r"of windows \(2, 40\), and attention was called with window 2; pass the same"):
        cached_attention(q, position, text.pages, [text.ring], window=2, scale=1.0)
    ring = text.ring._replace(all_visible=True)
    for pages in (text.pages, _ordered(text.pages)):
        with pytest.raises(ValueError, match="with several windows, entries in pages are not all visible"):
            cached_attention(q, None, pages, [ring], window=(2, 40), scale=1.0)

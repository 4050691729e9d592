"""What operations check of their arguments, and the factors that attention kernels compute with."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from dms_kernels.arguments import (
    FOR_GOOD,
    AttentionCall,
    Keys,
    PagedKV,
    PendingKV,
    Ring,
    check_devices,
    check_scores,
    read_pages,
    seen_entries,
    state_lifetimes,
    strides,
    with_dense_rows,
)
from dms_kernels.cached_attention import cached_attention


def ring(B=2, H=2, R=4, D=16, window=3) -> Ring:
    return Ring(torch.zeros(B, H, 2, R, D), torch.zeros(B, H, R, dtype=torch.uint8), torch.zeros(B, dtype=torch.int32), window)


def paged(B=2, H=2, D=16, N=5, P=16) -> PagedKV:
    table, num_kept = torch.zeros(B, H, 3, dtype=torch.int32), torch.zeros(B, H, dtype=torch.int32)
    return PagedKV(torch.zeros(N, 2, P, D), table, num_kept)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv": torch.zeros(3, 2, 2, 4, 16)}, r"ring.kv is \(3, 2, 2, 4, 16\) and should be \(2, 'any', 2, 'any', 16\)"),
        ({"state": torch.zeros(2, 2, 3, dtype=torch.uint8)}, r"ring.state is \(2, 2, 3\) and should be \(2, 2, 4\)"),
        ({"state": torch.zeros(2, 2, 4)}, "ring.state is torch.float32 and should be torch.uint8"),
        ({"window": True}, "ring.window must be an integer of 0 or more, got True"),
        ({"longer": (3, 9)}, r"ring.window must be one number of tokens, or up to 4 rising ones, got \(3, 3, 9\)"),
        ({"longer": (4, 5, 6, 7)}, r"got \(3, 4, 5, 6, 7\)"),
    ],
)
def test_a_ring_that_is_none(changes, message):
    ring().check(2, 16)
    with pytest.raises(ValueError, match=message):
        replace(ring(), **changes).check(2, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pages": torch.zeros(5, 2, 8, 16)}, r"a page holds 8 entries; it should hold one of \(16, 32, 64\)"),
        ({"pages": torch.zeros(5, 2, 16, 16).half()}, "pages are torch.float16 beside entries of torch.float32"),
        ({"pages": torch.zeros(5, 2, 16, 16).to(torch.int8)}, "page_scales is missing"),
        (
            {"page_scales": torch.zeros(5, 2, 16)},
            "page_scales belong to pages of one of torch.int8, torch.float8_e4m3fn, torch.uint8, and these are torch.float32",
        ),
        ({"page_table": torch.zeros(2, 2, 3, dtype=torch.int32, device="meta")}, "move them to one device"),
        ({"windows": (3, 9)}, r"page_table is \(2, 2, 3\) and should be \(2, 4, 'any'\)"),
        ({"positions": torch.zeros(5, 16, dtype=torch.int32)}, "positions belong to pages of several windows, and windows is empty"),
    ],
)
def test_pages_that_are_none(changes, message):
    paged().check(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        replace(paged(), **changes).check(2, 2, 16, torch.float32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"positions": None}, "positions is missing"),
        ({"positions": torch.zeros(5, 15, dtype=torch.int32)}, r"positions is \(5, 15\) and should be \(5, 16\)"),
        ({"windows": (9, 3)}, r"windows must be one number of tokens, or up to 4 rising ones, got \(9, 3\)"),
    ],
)
def test_pages_of_several_windows_that_are_none(changes, message):
    table, num_kept = torch.zeros(2, 4, 3, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    several = replace(paged(), page_table=table, num_kept=num_kept, positions=torch.zeros(5, 16, dtype=torch.int32), windows=(3, 9))
    several.check(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        replace(several, **changes).check(2, 2, 16, torch.float32)


@pytest.mark.parametrize("windows", [(3, 9), (0, 1, 40)])
def test_which_entries_of_lists_a_query_sees(windows):
    """Lists of a head one after the other, each entry by its position and its list's window; nothing behind a list's last entry."""
    B, H, K, N, P, D = 2, 2, len(windows), 9, 16, 4
    generator = torch.Generator().manual_seed(len(windows))
    table = torch.randint(0, N, (B, H * K, 2), generator=generator, dtype=torch.int32)
    num_kept = torch.randint(0, 2 * P + 1, (B, H * K), generator=generator, dtype=torch.int32)
    positions = torch.randint(0, 60, (N, P), generator=generator, dtype=torch.int32)
    pages = torch.randn(N, 2, P, D, generator=generator)
    several = PagedKV(pages, table, num_kept, positions=positions, windows=windows)
    q_position = torch.tensor([[20, 60], [0, 41]], dtype=torch.int32)
    k, v, there = read_pages(several, torch.float32)
    see = seen_entries(several, there, q_position)
    assert k.shape == (B, H, K * 2 * P, D) and see.shape == (B, H, 2, K * 2 * P)
    for b, h, c in itertools.product(range(B), range(H), range(K)):
        for entry in range(2 * P):
            page, place = int(table[b, h * K + c, entry // P]), entry % P
            here = c * 2 * P + entry
            is_there = entry < int(num_kept[b, h * K + c])
            assert bool(there[b, h, here]) == is_there
            if is_there:
                assert torch.equal(k[b, h, here], pages[page, 0, place]) and torch.equal(v[b, h, here], pages[page, 1, place])
            for t in range(2):
                near = c == 0 or int(q_position[b, t]) - int(positions[page, place]) <= windows[c]
                assert bool(see[b, h, t, here]) == (is_there and near)


def test_lifetimes_by_state():
    device = torch.device("cpu")
    assert state_lifetimes((4,), device).tolist() == [FOR_GOOD, 4, FOR_GOOD]
    assert state_lifetimes((4, 9, 30), device).tolist() == [FOR_GOOD, 4, FOR_GOOD, 9, 30]
    assert ring().windows == (3,) and replace(ring(), longer=(5,)).windows == (3, 5)


def test_pending_tokens_that_are_none():
    k = torch.zeros(2, 2, 3, 16)
    pending = PendingKV(k, k, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 2, 3, dtype=torch.uint8))
    pending.check(2, ring())
    with pytest.raises(ValueError, match=r"pending.v is \(2, 2, 2, 16\) and should be \(2, 2, 3, 16\)"):
        replace(pending, v=k[:, :, :2]).check(2, ring())


def test_positions_are_asked_for_where_they_are_needed():
    q, k = torch.zeros(1, 2, 40, 16), torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="without q_position; only a few queries need none"):
        cached_attention(q, None, None, [Keys(k, k, all_visible=True)], window=3, scale=1.0)
    with pytest.raises(ValueError, match="these keys are not all visible"):
        cached_attention(q[:, :, :1], None, None, [Keys(k, k)], window=3, scale=1.0)
    with pytest.raises(ValueError, match="positions and decisions"):
        cached_attention(q[:, :, :1], torch.zeros(1, 1).int(), None, [Keys(k, k)], window=3, scale=1.0)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_factors_make_scores_exponents_of_two(softcap):
    call = AttentionCall(B=1, T=1, H=1, G=1, D=20, scale=0.3, softcap=softcap)
    product, score = 7.0, 0.3 * 7.0
    if softcap is None:
        assert 2 ** (product * call.factor) == pytest.approx(math.exp(score)) and call.cap_out == 0.0
    else:
        tanh = 1 - 2 / (1 + 2 ** (product * call.factor))
        assert 2 ** (tanh * call.cap_out) == pytest.approx(math.exp(softcap * math.tanh(score / softcap)))
    assert call.block_d == 32


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"scale": math.inf}, {"softcap": -1.0}, {"sink_logits": torch.zeros(3)}])
def test_scores_that_are_refused(changes):
    options = {"scale": 1.0, "softcap": None, "sink_logits": torch.zeros(4)}
    check_scores(**options, num_query_heads=4)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        check_scores(**(options | changes), num_query_heads=4)


def test_tensors_of_several_devices_are_refused():
    with pytest.raises(ValueError, match="k is on meta but q is on cpu; move them to one device"):
        check_devices(torch.zeros(1), v=None, k=torch.zeros(1, device="meta"))


def test_strides_of_a_single_element_are_none():
    x = torch.zeros(4, 3, 8)
    assert strides(x, 2) == (24, 8) and strides(x[:1], 3) == (0, 8, 1) and strides(None, 2) == (0, 0)
    assert with_dense_rows(x.transpose(1, 2)).stride(-1) == 1 and with_dense_rows(x) is x

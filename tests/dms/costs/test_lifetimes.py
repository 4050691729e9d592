"""Assumed lifetimes against counting over masks, and what a target asks for."""

import pytest
import torch

from dms.costs import kv
from dms.costs.job import Job
from dms.costs.kv import KV
from dms.costs.lifetimes import Lifetimes
from dms.costs.shapes import AttentionShape

WINDOWS = (3, 8, 20)


def seen_by(lifetimes: Lifetimes, tokens: int) -> torch.Tensor:
    """[query, key]: the share of heads to which a key is visible."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    share = torch.full(distance.shape, lifetimes.stay, dtype=torch.float64)
    for window, leave in zip(lifetimes.windows, lifetimes.leave, strict=True):
        share += leave * (distance <= window)
    return share * (distance >= 0)


@pytest.mark.parametrize("tokens", [1, 4, 10, 64])
@pytest.mark.parametrize("lifetimes", [Lifetimes(WINDOWS, (0.2, 0.3, 0.1)), Lifetimes((5,), (0.75,)), Lifetimes((0, 9), (0.0, 1.0))])
def test_entries_and_pairs_by_brute_force(lifetimes, tokens):
    seen = seen_by(lifetimes, tokens)
    assert lifetimes.pairs(tokens) == pytest.approx(float(seen.sum()))
    assert lifetimes.pairs(tokens, causal=False) == pytest.approx(float((seen + seen.T).sum()) - tokens)
    assert lifetimes.entries(tokens) == pytest.approx(float(seen[-1].sum()))
    ring = min(tokens, lifetimes.windows[0] + 1)
    assert ring + sum(lifetimes.in_lists(tokens)) == pytest.approx(lifetimes.entries(tokens))


@pytest.mark.parametrize("windows", [WINDOWS, (6,)])
@pytest.mark.parametrize("budget", ["end", "mean"])
@pytest.mark.parametrize("cr", [1.0, 1.5, 3.0, 6.0, 9.0])
def test_a_target_is_met_where_windows_allow(windows, budget, cr):
    tokens = 64
    found = Lifetimes.of_target(windows, cr, budget, tokens)
    seen = seen_by(found, tokens)
    dense = seen_by(Lifetimes(windows, (0.0,) * len(windows)), tokens)
    held, whole = (float(s[-1].sum() if budget == "end" else s.sum()) for s in (seen, dense))
    # Everything leaves by the first window: less is not to be had.
    least = seen_by(Lifetimes(windows, (1.0,) + (0.0,) * (len(windows) - 1)), tokens)
    floor = float(least[-1].sum() if budget == "end" else least.sum())
    assert held == pytest.approx(max(whole / cr, floor))
    assert 0 <= found.stay <= 1 and all(0 <= share <= 1 for share in found.leave)
    if found.stay > 1e-9:
        assert len({round(share, 9) for share in found.leave}) == 1, "alike"


def test_a_target_of_decisions():
    assert Lifetimes.of_target((16,), 8.0, "decided", 64) == Lifetimes((16,), (0.875,))
    assert Lifetimes.of_target(WINDOWS, 4.0, "decided", 64).leave == pytest.approx((0.25,) * 3)


def test_the_mean_of_a_run():
    job = {"trainable": "gates", "precision": "fp32", "length": 64, "packed": False, "batch_size": 1, "micro_batch_size": 1, "beta": 0.0}
    job |= {"loss_chunk": None, "evaluation_length": 64, "evaluation_batch_size": 1, "steps": 10, "ramp": 0.5, "target_cr": 4.0}
    found = Job(**job, window=WINDOWS, budget="end").mean_lifetimes
    ratios = [1 + 3 * min(1.0, step / 5) for step in range(1, 11)]
    assert found.entries(64) == pytest.approx(sum(64 / ratio for ratio in ratios) / 10)
    # Of one window the share that stays is the mean of 1 / CR, as it was.
    assert Job(**job, window=8).mean_lifetimes.stay == pytest.approx(sum(1 / ratio for ratio in ratios) / 10)


LAYER = AttentionShape(layer=0, num_query_heads=4, num_heads=2, key_dim=16, value_dim=16, gated=True, holds=True, window=None, causal=True)


def test_bytes_are_of_the_ring_of_what_leaves_and_of_what_stays():
    """Two windows of one size hold what one does, but for positions, and a list more."""
    cache = KV(cr=4.0, window=(7, 31), page_size=16)
    tokens, number = 1000, 2 * 32
    entries = {"ring": 8, "stay": (tokens - 8) / 4, "leave": 0.375 * 24}
    assert kv.entries_seen(LAYER, cache, tokens) == pytest.approx(sum(entries.values()))
    pages = (entries["stay"] / 16 + 0.5) + (entries["leave"] / 16 + 0.5)
    expected = 8 * (number + 1) + pages * (16 * (number + 4) + 8) + 2 * 64 * 4 + 2 * 4 + 8
    assert kv.held_bytes(LAYER, cache, tokens) == pytest.approx(expected)
    in_pages = entries["stay"] + entries["leave"]
    assert kv.read_bytes(LAYER, cache, tokens) == pytest.approx(8 * number + in_pages * (number + 4) + in_pages / 16 * 4)
    # What its first window evicts is never moved to a page.
    assert kv.written_bytes(LAYER, cache, tokens) == pytest.approx(number + (1 - 0.375) * (number + 4))
    assert kv.prompt_written_bytes(LAYER, cache, tokens) == pytest.approx(8 * number + in_pages * (number + 4))
    one = KV(cr=4.0, window=7, page_size=16)
    assert kv.held_bytes(LAYER, one, tokens) == pytest.approx(8 * (number + 1) + (248 / 16 + 0.5) * (16 * number + 8) + 64 * 4 + 12)

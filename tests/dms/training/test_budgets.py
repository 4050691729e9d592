"""What a target ratio counts, against entries that are counted one by one."""

import random

import pytest
import torch

from dms import masks
from dms.masks import Tokens
from dms.training.budgets import saved_by, savings


def _rows(rng: random.Random, num_tokens: int) -> tuple[list[int], list[int]]:
    """Segments and positions of a row: padding on both sides, documents of random lengths between."""
    left, right = rng.randint(0, 3), rng.randint(0, 3)
    segment, position = [0] * left, [0] * left
    while len(segment) < left + num_tokens:
        length = rng.randint(1, left + num_tokens - len(segment))
        segment += [max(segment, default=0) + 1] * length
        position += range(length)
    return segment + [0] * right, position + [0] * right


def _count(segment, position, evicted_TK, windows, sinks, alignment, budget) -> tuple[int, int]:
    """What is saved and what there was to save, from each entry's life."""
    saved = whole = 0
    place = {(s, p): t for t, (s, p) in enumerate(zip(segment, position, strict=True)) if s}
    for (s, p), t in place.items():
        end = max(at for of, at in place if of == s)
        whole += 1 if budget == "end" else end - p + 1
        gate = t if alignment == "own" else place.get((s, p + 1))
        decisions = [] if gate is None or p < sinks else [w for w, evicted in zip(windows, evicted_TK[gate], strict=True) if evicted]
        gone = [any(query - p > w for w in decisions) for query in range(p, end + 1)]
        saved += gone[-1] if budget == "end" else sum(gone)
    return saved, whole


@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("budget", ["end", "mean"])
def test_savings_are_entries_counted_one_by_one(alignment, budget):
    for seed in range(100):
        rng = random.Random(seed)
        segment, position = _rows(rng, rng.randint(1, 24))
        windows, sinks = sorted(rng.sample(range(30), rng.randint(1, 4))), rng.randint(0, 3)
        tokens = Tokens(torch.tensor([segment]).int(), torch.tensor([position]).int())
        evicted_BTHK = torch.rand(1, len(segment), 1, len(windows), generator=torch.Generator().manual_seed(seed)) < 0.5
        saved_BTK, whole_BT = savings(tokens, windows, sinks=sinks, alignment=alignment, budget=budget)
        found = saved_by(evicted_BTHK.float(), saved_BTK).sum().item(), whole_BT.sum().item()
        assert found == _count(segment, position, evicted_BTHK[0, :, 0].tolist(), windows, sinks, alignment, budget), seed
        if budget == "end":
            aligned = masks.align(evicted_BTHK, tokens.segment_BT, alignment, False)
            assert int(masks.alive(tokens, aligned, window=tuple(windows), sinks=sinks).sum()) == found[1] - found[0]


def test_decided_counts_decisions_alone():
    tokens = Tokens(torch.tensor([[1, 1, 1, 2, 2, 0]]).int(), torch.tensor([[0, 1, 2, 0, 1, 0]]).int())
    saved_BTK, whole_BT = savings(tokens, (100,), sinks=0, alignment="own", budget="decided")
    assert saved_BTK[..., 0].tolist() == whole_BT.tolist() == [[1, 1, 1, 1, 1, 0]]
    saved_BTK, whole_BT = savings(tokens, (100,), sinks=0, alignment="next", budget="decided")
    assert saved_BTK[..., 0].tolist() == whole_BT.tolist() == [[0, 1, 1, 0, 1, 0]]


def test_what_is_saved_has_a_gradient_for_each_decision():
    evicted = torch.tensor([[0.25, 0.5, 1.0]], dtype=torch.float64).view(1, 1, 1, 3).requires_grad_()
    saved_BTK = torch.tensor([[[9.0, 4.0, 1.0]]], dtype=torch.float64)
    saved_by(evicted, saved_BTK).sum().backward()
    # 9 a + (1 - a) (4 b + (1 - b) c)
    assert evicted.grad.flatten().tolist() == [9 - (4 * 0.5 + 0.5), 0.75 * (4 - 1), 0.75 * 0.5]

"""Documents, positions, alignment and visibility, on cases small enough to write down."""

import pytest
import torch

from dms import masks
from dms.masks import Tokens


def _locate(mask=None, position=None, batch=1, num_tokens=None, past=None):
    num_tokens = num_tokens or len((mask or position)[0])
    as_tensor = [None if rows is None else torch.tensor(rows) for rows in (mask, position)]
    return masks.locate_tokens(batch, num_tokens, torch.device("cpu"), *as_tensor, past)


def _tokens(segment, position) -> Tokens:
    return Tokens(torch.tensor(segment, dtype=torch.int32), torch.tensor(position, dtype=torch.int32))


CASES = {
    "nothing given": ({"num_tokens": 3}, [[1, 1, 1]], [[0, 1, 2]]),
    "left padding": ({"mask": [[0, 0, 1, 1]], "position": [[1, 1, 0, 1]]}, [[0, 0, 1, 1]], [[0, 0, 0, 1]]),
    "left padding, positions from 0": ({"mask": [[0, 0, 1, 1]], "position": [[0, 1, 2, 3]]}, [[0, 0, 1, 1]], [[0, 0, 0, 1]]),
    "right padding": ({"mask": [[1, 1, 0, 0]], "position": [[0, 1, 1, 1]]}, [[1, 1, 0, 0]], [[0, 1, 0, 0]]),
    "padding alone": ({"mask": [[0, 0, 0]]}, [[0, 0, 0]], [[0, 0, 0]]),
    "packed": ({"position": [[0, 1, 2, 0, 1, 0]]}, [[1, 1, 1, 2, 2, 3]], [[0, 1, 2, 0, 1, 0]]),
    "packed, first document cut": ({"position": [[7, 8, 0, 1]]}, [[1, 1, 2, 2]], [[0, 1, 0, 1]]),
    "packed, positions jump": ({"position": [[0, 1, 5, 6]]}, [[1, 1, 2, 2]], [[0, 1, 0, 1]]),
    "packed and padded": ({"mask": [[1, 1, 1, 0]], "position": [[0, 0, 1, 0]]}, [[1, 2, 2, 0]], [[0, 0, 1, 0]]),
    "padding between documents": ({"mask": [[1, 1, 0, 1, 1]], "position": [[0, 1, 0, 0, 1]]}, [[1, 1, 0, 2, 2]], [[0, 1, 0, 0, 1]]),
    "padding within, positions skip it": ({"mask": [[1, 1, 0, 0, 1]], "position": [[0, 1, 1, 1, 2]]}, [[1, 1, 0, 0, 1]], [[0, 1, 0, 0, 2]]),
    "padding within, positions count it": (
        {"mask": [[1, 1, 0, 0, 1]], "position": [[0, 1, 2, 3, 4]]},
        [[1, 1, 0, 0, 1]],
        [[0, 1, 0, 0, 2]],
    ),
    "padding within, no positions": ({"mask": [[1, 1, 0, 0, 1]]}, [[1, 1, 0, 0, 1]], [[0, 1, 0, 0, 2]]),
    "positions shared by rows": ({"position": [[0, 1, 0]], "batch": 2, "num_tokens": 3}, [[1, 1, 2]] * 2, [[0, 1, 0]] * 2),
    "one token": ({"position": [[9]]}, [[1]], [[0]]),
}


@pytest.mark.parametrize("name", CASES)
def test_locate_tokens(name):
    given, segment, position = CASES[name]
    got = _locate(**given)
    assert got.segment_BT.dtype == got.position_BT.dtype == torch.int32
    assert got.segment_BT.tolist() == segment
    assert got.position_BT.tolist() == position


def test_new_tokens_continue_the_last_document():
    past = _tokens([[0, 1, 1], [1, 2, 2], [1, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
    mask = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 1]]
    got = _locate(mask=mask, position=[[2, 3]] * 4, batch=4, num_tokens=2, past=past)
    assert got.segment_BT.tolist() == [[1, 1], [2, 2], [0, 1], [0, 1]]
    assert got.position_BT.tolist() == [[2, 3], [2, 3], [0, 2], [0, 0]]
    # A mask over the new tokens alone says the same.
    again = _locate(mask=[row[-2:] for row in mask], batch=4, num_tokens=2, past=past)
    assert torch.equal(again.segment_BT, got.segment_BT) and torch.equal(again.position_BT, got.position_BT)


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 4, 4), {"full_attention": torch.ones(1, 4)}])
def test_a_mask_that_is_not_2d_is_refused(mask):
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\]"):
        masks.locate_tokens(1, 4, torch.device("cpu"), mask, None, None)


def test_align_own_is_the_identity():
    decision = torch.tensor([[True, False, True]])[..., None]
    assert masks.align(decision, torch.ones(1, 3, dtype=torch.int32), "own", False) is decision
    assert masks.decided_tokens(torch.tensor([[0, 1, 1, 2]]), "own").tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    ("segment", "source"),
    [
        # Whose gate rules each token; None: undecided.
        ([1, 1, 1, 1], [1, 2, 3, None]),
        ([0, 0, 1, 1], [None, None, 3, None]),
        ([1, 1, 0, 0], [1, None, None, None]),
        ([1, 1, 2, 2], [1, None, 3, None]),
        ([1, 2, 3, 3], [None, None, 3, None]),
        ([1, 1, 0, 1], [1, 3, None, None]),
        ([1, 0, 2, 2], [None, None, 3, None]),
        ([0, 0, 0, 0], [None] * 4),
        ([1], [None]),
    ],
)
def test_align_next(segment, source):
    segment = torch.tensor([segment], dtype=torch.int32)
    gates = torch.arange(segment.shape[1]).float()[None, :, None].expand(1, -1, 2)
    ruled = masks.align(gates, segment, "next", -1.0)
    assert ruled.shape == gates.shape
    assert ruled[0, :, 0].tolist() == ruled[0, :, 1].tolist() == [-1.0 if s is None else float(s) for s in source]
    assert masks.decided_tokens(segment, "next").tolist() == [[s is not None for s in source]]


def test_visible():
    tokens = _tokens([[0, 1, 1, 1, 1, 2, 2]], [[0, 0, 1, 2, 3, 0, 1]])
    evicted = torch.tensor([[0, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)[..., None]

    def see(window, sinks):
        return masks.visible(tokens, tokens, evicted, window=window, sinks=sinks)[0, 0].int().tolist()

    assert see(0, 0) == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert see(1, 0)[2:5] == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]]
    assert see(0, 1)[4:] == [[0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert see(9, 0)[4:] == [[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1]]


def test_alive():
    tokens = _tokens([[0, 1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0, 0]], [[0, 0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0, 0]])
    evicted = torch.ones(2, 7, 1, dtype=torch.bool)
    evicted[:, 2] = False

    def alive(window, sinks):
        return masks.alive(tokens, evicted, window=window, sinks=sinks)[..., 0].int().tolist()

    assert alive(0, 0) == [[0, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert alive(1, 0) == [[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]
    assert alive(0, 1) == [[0, 1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0]]


def test_alive_is_what_the_next_query_may_still_see():
    """An entry is alive at the end iff it is kept, a sink, or one of the last w + 1 tokens, which the last query sees."""
    tokens = _locate(mask=[[0, 0] + [1] * 10])
    evicted = torch.rand(1, 12, 2, generator=torch.Generator().manual_seed(0)) < 0.6
    last = tokens.map(lambda x: x[:, -1:])
    seen = masks.visible(last, tokens, evicted, window=3, sinks=2)[:, :, 0].transpose(1, 2)
    assert torch.equal(seen, masks.alive(tokens, evicted, window=3, sinks=2))


def test_padding_within_a_document_is_for_inference_only():
    masks.require_unbroken(_locate(mask=[[0, 1, 1, 0], [1, 1, 1, 1]], batch=2))
    masks.require_unbroken(_locate(mask=[[1, 1, 0, 1]], position=[[0, 1, 0, 0]]))
    with pytest.raises(ValueError, match="padding between two tokens"):
        masks.require_unbroken(_locate(mask=[[1, 0, 1, 1]]))


def test_several_windows_hide_by_each_decision():
    tokens = _tokens([[1] * 6], [list(range(6))])
    evicted = torch.zeros(1, 6, 1, 2, dtype=torch.bool)
    evicted[0, 0, 0] = torch.tensor([True, False])
    evicted[0, 1, 0] = torch.tensor([False, True])
    evicted[0, 2, 0] = torch.tensor([True, True])
    see = masks.visible(tokens, tokens, evicted, window=(1, 3), sinks=0)[0, 0]
    # Key 0 leaves after 1, key 1 after 3, key 2 after 1.
    assert see[:, 0].tolist() == [True, True, False, False, False, False]
    assert see[:, 1].tolist() == [False, True, True, True, True, False]
    assert see[:, 2].tolist() == [False, False, True, True, False, False]
    assert masks.alive(tokens, evicted, window=(1, 3), sinks=0)[0, :, 0].tolist() == see[-1].tolist()
    assert masks.visible(tokens, tokens, evicted, window=(1, 3), sinks=1)[0, 0, :, 0].all()


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (2, 0), (3, 2), (50, 1), ((0, 2), 0), ((1, 3, 50), 1), ((2, 3, 4, 5), 2)])
def test_entries_are_counted_as_often_as_queries_see_them(window, sinks):
    generator = torch.Generator().manual_seed(sinks)
    tokens = _tokens([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2, 0]], [[0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3, 4, 0]])
    windows = () if isinstance(window, int) else (len(window),)
    evicted = torch.rand(2, 9, 3, *windows, generator=generator) < 0.6
    see = masks.visible(tokens, tokens, evicted, window=window, sinks=sinks)
    steps = masks.alive_steps(tokens, evicted, window=window, sinks=sinks)
    assert torch.equal(steps, see.sum(2).transpose(1, 2))
    # Alive at the end is what the document's last query sees.
    ends = [[8], [2, 7]]
    seen_at_ends = torch.stack([see[row, :, at].any(1).T for row, at in enumerate(ends)])
    assert torch.equal(masks.alive(tokens, evicted, window=window, sinks=sinks), seen_at_ends)

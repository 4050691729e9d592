"""Sequences from token counts: nothing lost, nothing long carried, ranks with the same to do."""

from random import Random

import pytest
from dms_train.data import packing as planner
from dms_train.data.packing import Cost, Piece, compose, cost_of, deal, group_size, imbalance, pack
from dms_train.data.source_reader import Cursor, SourceDocument
from hypothesis import given, settings
from hypothesis import strategies as st

# Attention over a whole sequence of 3,276 tokens costs twice what all else does: a 1B model at some 70K tokens.
COST = Cost(token=100.0, pair=0.122)


def documents(lengths):
    for number, length in enumerate(lengths):
        yield SourceDocument(0, Cursor(record=number), length, lambda: None)


def endless(seed, low, high):
    rng, number = Random(seed), 0
    while True:
        yield SourceDocument(0, Cursor(record=number), int(low * (high / low) ** rng.random()), lambda: None)
        number += 1


def tokens(piece):
    return {(piece.document.cursor.record, place) for place in range(piece.start, piece.stop)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    low=st.integers(1, 40),
    times=st.integers(1, 60),
    num_sequences=st.integers(1, 24),
    cuts=st.booleans(),
)
def test_every_token_drawn_is_packed_once_or_carried(seed, low, times, num_sequences, cuts):
    source, drawn, packed, carried = endless(seed, low, low * times), {}, set(), []

    def counting():
        for document in source:
            drawn[document.cursor.record] = document.length
            yield document

    counted = counting()
    for _ in range(3):
        sequences, carried = pack(counted, carried, num_sequences=num_sequences, length=64, cuts=cuts)
        assert len(sequences) == num_sequences
        for sequence in sequences:
            assert 0 <= sum(piece.length for piece in sequence) <= 64
            for piece in sequence:
                assert piece.length > 0 and not tokens(piece) & packed
                packed |= tokens(piece)
        assert len(carried) <= 2 * planner.CARRY_LIMIT + 2
    rest = set().union(*map(tokens, carried))
    assert not rest & packed
    assert packed | rest == {(sequence, place) for sequence, length in drawn.items() for place in range(length)}


def test_whole_documents_stay_whole_unless_they_are_longer_than_a_sequence():
    sequences, carried = pack(endless(0, 5, 60), [], num_sequences=64, length=64, cuts=False)
    assert all(piece.start == 0 and piece.stop == piece.document.length for sequence in sequences for piece in sequence)
    used = sum(piece.length for sequence in sequences for piece in sequence)
    assert used / (64 * 64) > 0.97 and len(carried) <= planner.CARRY_LIMIT


def test_cutting_leaves_next_to_no_padding_where_nothing_fits_together():
    for cuts, most in ((False, 0.45), (True, 0.02)):
        carried, used, source = [], 0, endless(0, 600, 620)
        for _ in range(4):
            sequences, carried = pack(source, carried, num_sequences=32, length=1000, cuts=cuts)
            used += sum(piece.length for sequence in sequences for piece in sequence)
        assert 1 - used / (4 * 32 * 1000) < most
        assert cuts or 1 - used / (4 * 32 * 1000) > 0.35


def test_a_document_of_many_sequences_is_carried_as_one_stretch():
    sequences, carried = pack(documents([10_000, 30]), [], num_sequences=4, length=100, cuts=True)
    assert [(piece.start, piece.stop) for sequence in sequences for piece in sequence] == [(0, 100), (100, 200), (200, 300), (300, 400)]
    assert [(piece.start, piece.stop) for piece in carried] == [(400, 10_000)]
    again, carried = pack(documents([]), carried, num_sequences=4, length=100, cuts=True)
    assert again[0][0].start == 400 and carried[0].start == 800


def test_what_was_carried_comes_first():
    (document,) = documents([5])
    sequences, carried = pack(endless(1, 60, 64), [Piece(document, 0, 5)], num_sequences=4, length=64, cuts=False)
    assert any(piece.document is document for sequence in sequences for piece in sequence)
    assert all(piece.document is not document for piece in carried)


def test_steps_are_all_sequences_once_and_alike():
    rng = Random(0)
    costs = [rng.choice((1.0, 1.1, 2.0, 3.0)) * rng.uniform(0.95, 1.05) for _ in range(64)]
    steps = compose(costs, 8, 4, "key")
    assert sorted(sequence for step in steps for sequence in step) == list(range(64)) and {len(step) for step in steps} == {8}
    assert steps == compose(costs, 8, 4, "key") and steps != compose(costs, 8, 4, "other")
    sums = [sum(costs[sequence] for sequence in step) for step in steps]
    in_order = [sum(costs[start : start + 8]) for start in range(0, 64, 8)]
    assert max(sums) / min(sums) < max(in_order) / min(in_order)


def test_sequences_of_one_cost_stay_in_order():
    assert compose([1.0] * 8, 2, 4, "key") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert deal([1.0] * 8, 2, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert deal([1.0] * 4, 1, 2) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_ranks_get_equal_shares_of_a_skewed_mixture(num_groups):
    source, carried, worst, naive = endless(3, 10, 3000), [], [], []
    for window in range(8):
        sequences, carried = pack(source, carried, num_sequences=64, length=3276, cuts=True)
        costs = [COST.of_sequence([piece.length for piece in sequence], 3276) for sequence in sequences]
        in_order = [costs[start : start + 8] for start in range(0, 64, 8)]
        naive += [imbalance(step, [list(range(group, 8, num_groups)) for group in range(num_groups)]) for step in in_order]
        for step in compose(costs, 8, 4, str(window)):
            step_costs = [costs[sequence] for sequence in step]
            dealt = deal(step_costs, num_groups, 1)
            assert sorted(sequence for sequences in dealt for sequence in sequences) == list(range(8)) and {
                len(sequences) for sequences in dealt
            } == {8 // num_groups}
            worst.append(imbalance(step_costs, dealt))
    assert max(worst) <= 1.05 and sum(worst) / len(worst) <= 1.02
    # The same sequences as they were packed, dealt out in turn.
    assert num_groups == 1 or sum(naive) / len(naive) - 1 > 2 * (sum(worst) / len(worst) - 1)


def test_balance_rows_divides_the_batch():
    assert [group_size(None, size) for size in (1, 2, 6, 7, 8)] == [1, 2, 3, 1, 4]
    assert group_size(8, 16) == 8
    with pytest.raises(ValueError, match="balance_rows is 3 and batch_size 8"):
        group_size(3, 8)


def test_cost_counts_what_attention_sees():
    cost = Cost(token=1.0, pair=10.0, sliding=100.0, window=3)
    sees = [min(query, 3) for query in range(1, 9)]
    assert cost.of_document(8) == 8 + 10 * 36 + 100 * sum(sees)
    assert cost.of_sequence([8], 10) == cost.of_document(8) + cost.of_document(2)


def test_cost_of_a_llama_is_its_multiplications():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96, vocab_size=100
    )
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert cost_of(config) == Cost(token=3 * layer + 64 * 100, pair=3 * 2 * 4 * 16)

"""Intervals and paired differences against plain loops."""

import numpy as np
import pytest

from dms.evaluation.stats.bootstrap import NUM_RESAMPLES, Sample, compare, interval, make_draws


def test_interval_against_loops():
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(0, 4, 30), rng.integers(0, 3, 30) + 3)
    draws = make_draws(30, "a", 1)
    ratios = [sum(sample.num_D[i] for i in draw) / sum(sample.den_D[i] for i in draw) for draw in draws]
    assert draws.shape == (NUM_RESAMPLES, 30) and (make_draws(30, "a", 1) == draws).all() and (make_draws(30, "a", 2) != draws).any()
    low, high = np.quantile(ratios, [0.025, 0.975])
    # Of 30 documents: Student's t of 29 degrees is 2.045, the normal distribution's 1.960, and the spread of resamples is sqrt(29 / 30) of the sample's.
    factor, value = 2.0452 / 1.95996 * np.sqrt(30 / 29), sample.value
    expected = value - factor * (value - low), value + factor * (high - value)
    assert interval(sample, draws, False) == pytest.approx(expected, rel=1e-4)


def test_an_interval_covers_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        right = rng.random((60, 5)) < 0.7
        low, high = interval(Sample(right.sum(1), np.full(60, 5)), make_draws(60, trial), True)
        covered += low <= 0.7 <= high
    assert 0.89 * 200 <= covered <= 200 * 0.995


def test_certainty_is_not_claimed():
    draws = make_draws(20, 0)
    # Five questions in each of 20 documents are 20 samples where documents decide.
    assert interval(Sample(np.full(20, 5), np.full(20, 5)), draws, True) == (1 - 3.7 / 20, 1.0)
    assert interval(Sample(np.zeros(20), np.ones(20)), draws, True) == (0.0, 3.7 / 20)
    assert interval(Sample(np.ones(20), np.ones(20)), draws, False) == (1.0, 1.0)
    # All half right, and a single document of which a third is.
    assert interval(Sample(np.ones(20), np.full(20, 2)), draws, True) == (0.5 - 3.7 / 20, 0.5 + 3.7 / 20)
    assert interval(Sample([1], [3]), make_draws(1, 0), True) == (0.0, 1.0)


def test_pairs_tell_apart_what_single_intervals_do_not():
    """Documents differ much, policies little but always."""
    rng = np.random.default_rng(2)
    hard, den, draws = rng.random(50) * 10, np.full(50, 10.0), make_draws(50, 0)
    one, other = Sample(hard + 0.2, den), Sample(hard, den)
    assert interval(one, draws, False)[0] < interval(other, draws, False)[1]
    found = compare(one, other, draws, higher_is_better=False)
    assert found.verdict == "worse" and found.difference == pytest.approx(0.02) and found.ci_low == pytest.approx(0.02)
    assert compare(one, other, draws, higher_is_better=True).verdict == "better"
    assert compare(one, one, draws, higher_is_better=False).verdict == "not different"
    noisy = Sample(hard + rng.normal(0, 3, 50), den)
    assert compare(noisy, other, draws, higher_is_better=False).verdict == "not different"


@pytest.mark.parametrize("num_documents", [1, 2, 3])
def test_a_few_documents_prove_nothing(num_documents):
    ones, draws = np.ones(num_documents), make_draws(num_documents, 0)
    found = compare(Sample(0 * ones, ones), Sample(ones, ones), draws, higher_is_better=True)
    assert found.verdict == "not different" and found.ci_low < 0 < found.ci_high


def test_how_often_equal_policies_are_told_apart():
    """Two policies that answer right as often, on documents of three questions: about one comparison in twenty is wrong."""
    rng, called = np.random.default_rng(4), 0
    for trial in range(400):
        one, other = (Sample(rng.binomial(3, 0.8, 12), np.full(12, 3)) for _ in range(2))
        called += compare(one, other, make_draws(12, trial), higher_is_better=True).verdict != "not different"
    assert called <= 400 * 0.08


def test_documents_without_the_question():
    """A task that few documents ask: draws without it are left out."""
    num, den = np.zeros(40), np.zeros(40)
    num[:2], den[:2] = [1, 0], [1, 1]
    low, high = interval(Sample(num, den), make_draws(40, 3), True)
    assert (low, high) == (0.0, 1.0)

"""Intervals and paired differences against plain loops."""

import numpy as np
import pytest

from dms.evaluation.bootstrap import NUM_RESAMPLES, Sample, compare, interval, make_draws


def test_interval_against_loops():
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(0, 4, 30), rng.integers(0, 3, 30) + 3)
    draws = make_draws(30, "a", 1)
    ratios = [sum(sample.num_D[i] for i in draw) / sum(sample.den_D[i] for i in draw) for draw in draws]
    assert draws.shape == (NUM_RESAMPLES, 30) and (make_draws(30, "a", 1) == draws).all() and (make_draws(30, "a", 2) != draws).any()
    assert interval(sample, draws, False) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))


def test_an_interval_covers_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        right = rng.random((60, 5)) < 0.7
        low, high = interval(Sample(right.sum(1), np.full(60, 5)), make_draws(60, trial), True)
        covered += low <= 0.7 <= high
    assert 0.89 * 200 <= covered <= 200 * 0.995


def test_certainty_is_not_claimed():
    draws = make_draws(20, 0)
    assert interval(Sample(np.ones(20), np.ones(20)), draws, True) == (1 - 3 / 20, 1.0)
    assert interval(Sample(np.zeros(20), np.ones(20)), draws, True) == (0.0, 3 / 20)
    assert interval(Sample(np.ones(20), np.ones(20)), draws, False) == (1.0, 1.0)


def test_pairs_tell_apart_what_single_intervals_do_not():
    """Documents differ much, policies little but always."""
    rng = np.random.default_rng(2)
    hard, den, draws = rng.random(50) * 10, np.full(50, 10.0), make_draws(50, 0)
    one, other = Sample(hard + 0.2, den), Sample(hard, den)
    assert interval(one, draws, False)[0] < interval(other, draws, False)[1]
    found = compare(one, other, draws, "bits_per_byte")
    assert found.verdict == "worse" and found.difference == pytest.approx(0.02) and found.ci_low == pytest.approx(0.02)
    assert compare(one, other, draws, "top1_agreement").verdict == "better"
    assert compare(one, one, draws, "kl").verdict == "not different"
    noisy = Sample(hard + rng.normal(0, 3, 50), den)
    assert compare(noisy, other, draws, "kl").verdict == "not different"


def test_documents_without_the_question():
    """A task that few documents ask: draws without it are left out."""
    num, den = np.zeros(40), np.zeros(40)
    num[:2], den[:2] = [1, 0], [1, 1]
    low, high = interval(Sample(num, den), make_draws(40, 3), True)
    assert (low, high) == (0.0, 1.0)

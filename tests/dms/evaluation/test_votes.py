"""pass@k and majority@k against every subset, one by one."""

import itertools
import random
from collections import Counter

import pytest

from dms.evaluation.stats.votes import MAX_CHAINS, majority_at_k, pass_at_k

CASES = [
    (["a"], "a"),
    ([None, "b"], "a"),
    ([None] * 5, "a"),
    (["a", "b", "a", "b"], "a"),
    (["a", "b", "c", "d", None], "c"),
    (["b", "b", "b", "a", "a", "c", None], "a"),
    (["a", "a", "b", "b", "c", "c", "d", "d"], "a"),
    ([random.Random(0).choice(["a", "a", "b", "c", None]) for _ in range(10)], "a"),
]


def vote(subset, answer) -> float:
    """How likely a subset's most frequent answer is the right one, of equals one at random."""
    counts = Counter(given for given in subset if given is not None)
    first = [given for given, count in counts.items() if count == max(counts.values())]
    return (answer in first) / len(first) if first else 0.0


@pytest.mark.parametrize(("answers", "answer"), CASES)
def test_every_subset_counts_alike(answers, answer):
    for k in range(1, len(answers) + 1):
        subsets = list(itertools.combinations(answers, k))
        assert majority_at_k(answers, answer, k) == pytest.approx(sum(vote(s, answer) for s in subsets) / len(subsets))
        right = [given == answer for given in answers]
        assert pass_at_k(right, k) == pytest.approx(sum(answer in subset for subset in subsets) / len(subsets))


def test_of_many_chains_nothing_overflows():
    rng = random.Random(1)
    answers = [rng.choice(["a"] * 3 + ["b"] * 2 + [str(i) for i in range(40)]) for _ in range(MAX_CHAINS)]
    right = [given == "a" for given in answers]
    drawn = [rng.sample(answers, 64) for _ in range(4000)]
    assert majority_at_k(answers, "a", 64) == pytest.approx(sum(vote(s, "a") for s in drawn) / len(drawn), abs=0.03)
    assert pass_at_k(right, 16) == pytest.approx(sum("a" in s[:16] for s in drawn) / len(drawn), abs=0.03)
    assert majority_at_k(answers, "a", MAX_CHAINS) == float(Counter(answers)["a"] > Counter(answers)["b"])


@pytest.mark.parametrize("k", [0, 4])
def test_more_chains_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k} of 3"):
        pass_at_k([True, False, False], k)

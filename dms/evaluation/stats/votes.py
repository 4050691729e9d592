"""What k of n sampled chains are worth: the expectation over every subset of k, exact, with nothing resampled."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

# Binomial coefficients of more would leave the range of a float.
MAX_CHAINS = 512


def pass_at_k(right: Sequence[bool], k: int) -> float:
    """The probability that among k of the chains, drawn without replacement, one is right (arXiv 2107.03374, equation 1)."""
    n, num_right = len(right), sum(right)
    _check(n, k)
    return 1.0 - comb(n - num_right, k) / comb(n, k)


def majority_at_k(answers: Sequence[str | None], answer: str, k: int) -> float:
    """The probability that the most frequent answer of k of the chains, drawn without replacement, is `answer`.

    Chains without an answer (None) do not vote; among the most frequent ones one is drawn. With c[a] votes for a among all n, the
    number of subsets in which `answer` has m votes and t others have as many is a coefficient of a product over the others of
    sum_{v < m} C(c[a], v) x^v + C(c[a], m) x^m y: x counts votes, y ties.
    """
    n = len(answers)
    _check(n, k)
    votes = Counter(given for given in answers if given is not None)
    num_right = votes.pop(answer, 0)
    abstained = sum(given is None for given in answers)
    found = 0.0
    for m in range(1, min(num_right, k) + 1):
        rest = k - m
        # [votes of the others, how many of them tie]
        ways = np.zeros((rest + 1, min(len(votes), rest // m) + 1))
        ways[0, 0] = 1.0
        for count in votes.values():
            ways = _with_another(ways, count, m)
        silent = np.array([comb(abstained, rest - given) for given in range(rest + 1)], dtype=float)
        per_ties = silent @ ways
        found += comb(num_right, m) * float(per_ties @ (1.0 / (1.0 + np.arange(ways.shape[1]))))
    return found / comb(n, k)


def _with_another(ways: np.ndarray, count: int, m: int) -> np.ndarray:
    """Of one more answer, given `count` times, up to m votes."""
    new = np.zeros_like(ways)
    for given in range(min(count, m, len(ways) - 1) + 1):
        shifted = comb(count, given) * ways[: len(ways) - given]
        if given == m:
            new[given:, 1:] += shifted[:, :-1]
        else:
            new[given:] += shifted
    return new


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n <= MAX_CHAINS:
        raise ValueError(f"k is {k} of {n} chains; k lies between 1 and the number of chains, and that is at most {MAX_CHAINS}")

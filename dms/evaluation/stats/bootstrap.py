"""Intervals by resampling documents; policies are compared on the same documents, drawn together.

Every metric is a ratio of sums over documents: right answers over questions, bits over bytes. Documents are what is independent, not the
questions in them. Shapes: D documents, R resamples.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from dms.evaluation.stats.rows import Comparison, Verdict

NUM_RESAMPLES = 2000
_BOUNDS = (0.025, 0.975)
HIGHER_IS_BETTER = {"accuracy": True, "top1_agreement": True, "divergence_length": True, "bits_per_byte": False, "kl": False}
# Student's t at 97.5 % for 1 to 10 degrees of freedom, and the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.95996
# Where n documents say all the same, the truth may still differ by so much over n: 1 - 0.025^(1/n), about ln(40) / n.
_RULE = 3.7


class Sample:
    """Numerators and denominators [D] of one metric under one policy."""

    def __init__(self, numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray):
        self.num_D, self.den_D = np.asarray(numerators, float), np.asarray(denominators, float)

    @property
    def value(self) -> float:
        return float(self.num_D.sum() / self.den_D.sum())

    @property
    def num_documents(self) -> int:
        """Those that ask for it."""
        return int((self.den_D > 0).sum())

    def count(self, is_share: bool) -> int:
        """Questions asked; of what is no share of right answers, documents that were scored."""
        return int(self.den_D.sum()) if is_share else self.num_documents

    def resampled(self, draws_RD: np.ndarray) -> np.ndarray:
        """[R]; NaN where a draw holds no such question."""
        den_R = self.den_D[draws_RD].sum(1)
        return np.divide(self.num_D[draws_RD].sum(1), den_R, out=np.full(len(draws_RD), np.nan), where=den_R > 0)


def make_draws(num_documents: int, *names: object) -> np.ndarray:
    """[R, D]: which documents each resample takes, the same for all policies."""
    rng = np.random.default_rng(zlib.crc32("|".join(map(str, names)).encode()))
    return rng.integers(0, num_documents, (NUM_RESAMPLES, num_documents))


def interval(sample: Sample, draws_RD: np.ndarray, is_share: bool) -> tuple[float, float]:
    """95 % interval. is_share: of right answers; where all documents say the same, as where all or none are right, resampling would say that this
    is certain, and the rule of three (of 3.7, for two sides) stands in."""
    low, high = _widened(sample.value, sample.resampled(draws_RD), sample.num_documents)
    if not is_share:
        return low, high
    if low == high:
        # As of all or none, of documents that are half right, or of a single one.
        low, high = sample.value - _RULE / sample.num_documents, sample.value + _RULE / sample.num_documents
    return max(0.0, low), min(1.0, high)


def compare(one: Sample, other: Sample, draws_RD: np.ndarray, *, higher_is_better: bool) -> Comparison:
    """`one` minus `other`, paired."""
    difference, num_documents = one.value - other.value, one.num_documents
    low, high = _widened(difference, one.resampled(draws_RD) - other.resampled(draws_RD), num_documents)
    if low == high:
        # All documents say the same: as sure as their number makes it.
        doubt = _RULE / num_documents
        low, high = difference - doubt, difference + doubt
    verdict = Verdict.NOT_DIFFERENT
    if (low > 0 or high < 0) and num_documents > 1:
        verdict = Verdict.BETTER if (low > 0) == higher_is_better else Verdict.WORSE
    return Comparison(difference=difference, ci_low=low, ci_high=high, verdict=verdict)


def _widened(value: float, resampled_R: np.ndarray, num_documents: int) -> tuple[float, float]:
    """Quantiles of the resamples, moved away from the value as few documents demand: resampling n of n gives a spread that is too
    small by sqrt((n - 1) / n), and Student's t takes the normal distribution's place."""
    low, high = (float(x) for x in np.nanquantile(resampled_R, _BOUNDS))
    freedom = max(1, num_documents - 1)
    t = _T[freedom - 1] if freedom <= len(_T) else _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
    factor = t / _Z * np.sqrt((freedom + 1) / freedom)
    return float(value - factor * (value - low)), float(value + factor * (high - value))

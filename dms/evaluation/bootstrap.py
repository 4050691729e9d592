"""Intervals by resampling documents; policies are compared on the same documents, drawn together.

Every metric is a ratio of sums over documents: right answers over questions, bits over bytes. Shapes: D documents, R resamples.
"""

import zlib
from dataclasses import asdict, dataclass

import numpy as np

NUM_RESAMPLES = 2000
_BOUNDS = (0.025, 0.975)
HIGHER_IS_BETTER = {"accuracy": True, "top1_agreement": True, "divergence_length": True, "bits_per_byte": False, "kl": False}


@dataclass(frozen=True)
class Difference:
    """One policy minus another on the same documents. verdict: "better", "worse" or "not different" (the interval holds 0)."""

    difference: float
    ci_low: float
    ci_high: float
    verdict: str

    def to_dict(self) -> dict:
        return asdict(self)


class Sample:
    """Numerators and denominators [D] of one metric under one policy."""

    def __init__(self, numerators, denominators):
        self.num_D, self.den_D = np.asarray(numerators, float), np.asarray(denominators, float)

    @property
    def value(self) -> float:
        return float(self.num_D.sum() / self.den_D.sum())

    def count(self, is_share: bool) -> int:
        """Questions asked; of what is no share of right answers, documents that were scored."""
        return int(self.den_D.sum() if is_share else (self.den_D > 0).sum())

    def resampled(self, draws_RD: np.ndarray) -> np.ndarray:
        """[R]; NaN where a draw holds no such question."""
        den_R = self.den_D[draws_RD].sum(1)
        return np.divide(self.num_D[draws_RD].sum(1), den_R, out=np.full(len(draws_RD), np.nan), where=den_R > 0)


def make_draws(num_documents: int, *names: object) -> np.ndarray:
    """[R, D]: which documents each resample takes, the same for all policies."""
    rng = np.random.default_rng(zlib.crc32("|".join(map(str, names)).encode()))
    return rng.integers(0, num_documents, (NUM_RESAMPLES, num_documents))


def interval(sample: Sample, draws_RD: np.ndarray, is_share: bool) -> tuple[float, float]:
    """95 % interval. is_share: of right answers; where all or none are right, resampling would say that this is certain, and the
    rule of three stands in: 3 / n."""
    low, high = (float(x) for x in np.nanquantile(sample.resampled(draws_RD), _BOUNDS))
    if is_share and sample.value in (0.0, 1.0):
        doubt = min(1.0, 3.0 / sample.den_D.sum())
        return (0.0, doubt) if sample.value == 0.0 else (1.0 - doubt, 1.0)
    return low, high


def compare(one: Sample, other: Sample, draws_RD: np.ndarray, *, higher_is_better: bool) -> Difference:
    """`one` minus `other`, paired."""
    low, high = (float(x) for x in np.nanquantile(one.resampled(draws_RD) - other.resampled(draws_RD), _BOUNDS))
    verdict = "not different"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == higher_is_better else "worse"
    return Difference(one.value - other.value, low, high, verdict)

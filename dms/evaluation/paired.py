"""Bootstrap intervals, and differences between two policies on the same samples."""

from typing import Any

import numpy as np

_NUM_DRAWS = 1000
_LEVELS = (0.025, 0.975)


def interval(value_N: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean. The draws are the same for every N values, so that intervals of a table are comparable."""
    value_N = np.asarray(value_N, dtype=float)
    drawn = np.random.default_rng(0).integers(0, len(value_N), (_NUM_DRAWS, len(value_N)))
    low, high = np.quantile(value_N[drawn].mean(1), _LEVELS)
    return float(low), float(high)


def compare(ours_N: np.ndarray, others_N: np.ndarray, *, higher_is_better: bool = True) -> dict[str, Any]:
    """Ours minus the others', sample by sample: difference, ci_low, ci_high, verdict ("better", "worse" or "not different")."""
    difference_N = np.asarray(ours_N, dtype=float) - np.asarray(others_N, dtype=float)
    low, high = interval(difference_N)
    above, below = ("better", "worse") if higher_is_better else ("worse", "better")
    verdict = above if low > 0 else below if high < 0 else "not different"
    return {"difference": float(difference_N.mean()), "ci_low": low, "ci_high": high, "verdict": verdict}

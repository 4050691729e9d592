"""Training-free policies that a retrofit is judged beside: one small file each, after its paper."""

from dms.evaluation.policies.cache import PolicyCache
from dms.evaluation.policies.rules import H2O, TOVA, KeyDiff, Policy, Random, Seen, SlidingWindow, SnapKV

__all__ = ["TRAINING_FREE", "Policy", "PolicyCache", "Seen", "make_policy_cache"]

TRAINING_FREE: dict[str, type[Policy]] = {
    "sliding_window": SlidingWindow,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "keydiff": KeyDiff,
    "random": Random,
}


def make_policy_cache(model, name: str, budget: int, seed: int = 0) -> PolicyCache:
    """An empty cache that keeps `budget` entries per KV head in every layer with gates; to be used in evict mode."""
    return PolicyCache(model, lambda layer: TRAINING_FREE[name](budget, seed * 1000 + layer))

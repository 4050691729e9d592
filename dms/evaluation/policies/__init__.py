"""Training-free policies that a retrofit is judged beside: one small file each, after its paper."""

from collections.abc import Callable

from dms.evaluation.policies.cache import PolicyCache, check_second_reading
from dms.evaluation.policies.expected_attention import ExpectedAttention
from dms.evaluation.policies.kvzip import KVzip
from dms.evaluation.policies.per_head import per_head
from dms.evaluation.policies.rotation import rotations
from dms.evaluation.policies.rules import H2O, TOVA, KeyDiff, Policy, Random, RandomAttention, Seen, SlidingWindow, SnapKV
from dms.evaluation.policies.whole_prompt import WholePrompt

__all__ = [
    "QUICK_ONES",
    "TRAINING_FREE",
    "Policy",
    "PolicyCache",
    "Seen",
    "WholePrompt",
    "check_second_reading",
    "make_policy",
    "make_policy_cache",
]

TRAINING_FREE: dict[str, type[Policy]] = {
    "sliding_window": SlidingWindow,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "keydiff": KeyDiff,
    "random": Random,
    "random_attention": RandomAttention,
    "expected_attention": ExpectedAttention,
    "kvzip": KVzip,
    "ada_snapkv": per_head(SnapKV),
    "ada_expected_attention": per_head(ExpectedAttention),
    "ada_kvzip": per_head(KVzip),
}
QUICK_ONES = ("sliding_window", "h2o", "tova", "snapkv", "keydiff", "random")
"""Those that are evaluated where none are named."""


def make_policy(model, name: str, budget: int, seed: int = 0) -> Callable[[int], Policy]:
    """Makes the policy of a layer, by the layer's index. Arguments and errors as of `make_policy_cache`."""
    kind = TRAINING_FREE[name]
    rotation = rotations(model) if issubclass(kind, ExpectedAttention) else {}

    def make(layer: int) -> Policy:
        policy = kind(budget, seed * 1000 + layer)
        if isinstance(policy, ExpectedAttention):
            policy.rotation = rotation[layer]
        return policy

    return make


def make_policy_cache(model, name: str, budget: int, seed: int = 0) -> PolicyCache:
    """An empty cache that keeps `budget` entries per KV head, in the mean over a layer's heads, in every layer with gates; to be used in evict
    mode. Where the policy `rereads_prompt`, call its `finish_prompt` after the prompt.

    Raises:
        ValueError: expected_attention, and a model that rotates its queries in a way that is not known.
    """
    return PolicyCache(model, make_policy(model, name, budget, seed))

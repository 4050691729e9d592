"""What a training-free eviction policy is: a score for each entry that a layer holds; the lowest go.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, Q queries looked at, S entries alive, D head dim.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seen:
    """A layer's entries in order of age, the newest last, before anything is dropped.

    position_BHS [B, H, S] int64: where they stand in the text. k_BHSD: their keys, as they are stored (rotated). num_new: how many
    came in this forward. weights_BHGQS float32: attention of the last Q queries over these entries, None for policies that
    look at none.
    """

    position_BHS: torch.Tensor
    k_BHSD: torch.Tensor
    num_new: int
    weights_BHGQS: torch.Tensor | None


class Policy:
    """One layer's eviction. budget: entries that each KV head may keep.

    num_queries: how many of the last queries it looks at; 0: none; None: all that came in this forward. accumulates: it must see
    every forward, not only those after which something is dropped. reads_whole_prompt: a prompt is not to be given in parts.
    memory_BHS: what it remembers of each entry, kept in step with the entries that stay.
    """

    num_queries: int | None = 0
    accumulates = False
    reads_whole_prompt = False

    def __init__(self, budget: int, seed: int = 0):
        if budget < 1:
            raise ValueError(f"the budget is {budget} entries a head; a policy keeps at least the newest, so give 1 or more")
        self.budget, self.seed = budget, seed
        self.memory_BHS: torch.Tensor | None = None

    def score(self, seen: Seen) -> torch.Tensor:
        """[B, H, S]: the entries of the lowest scores are dropped, of equal ones the oldest; the newest entry always stays."""
        raise NotImplementedError


def protect_last(score_BHS: torch.Tensor, num_last: int) -> torch.Tensor:
    """The same scores, but the newest `num_last` entries stay whatever theirs are."""
    protected = torch.arange(score_BHS.shape[2], device=score_BHS.device) >= score_BHS.shape[2] - num_last
    return score_BHS.masked_fill(protected, float("inf"))

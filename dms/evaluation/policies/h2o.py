"""Heavy hitters: the entries that have received most attention so far, and recent ones (H2O, arXiv 2306.14048 section 4)."""

import torch
import torch.nn.functional as F

from dms.evaluation.policies.base import Policy, Seen, protect_last


class H2O(Policy):
    """Half of the budget for the most recent entries, half for those of the largest attention summed over all queries since they
    came; over a group's query heads the sum is taken too. memory_BHS: that sum."""

    num_queries = None
    accumulates = True

    def score(self, seen: Seen) -> torch.Tensor:
        received_BHS = seen.weights_BHGQS.sum((2, 3))
        if self.memory_BHS is not None:
            received_BHS = received_BHS + F.pad(self.memory_BHS, (0, seen.num_new))
        self.memory_BHS = received_BHS
        return protect_last(received_BHS, self.budget // 2)

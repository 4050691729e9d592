"""Keys that are like the others go first (KeyDiff, arXiv 2504.15364 section 3)."""

import torch
import torch.nn.functional as F

from dms.evaluation.policies.base import Policy, Seen


class KeyDiff(Policy):
    """Keeps the keys of the lowest cosine with the mean of the head's normalised keys; needs no attention weights."""

    def score(self, seen: Seen) -> torch.Tensor:
        unit_BHSD = F.normalize(seen.k_BHSD.float(), dim=-1)
        anchor_BH1D = F.normalize(unit_BHSD.mean(2, keepdim=True), dim=-1)
        return -(unit_BHSD * anchor_BH1D).sum(-1)

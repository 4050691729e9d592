"""The floor: what any idea must beat."""

import torch

from dms.evaluation.policies.base import Policy, Seen


class Random(Policy):
    """Keeps a uniform sample of all tokens so far: each entry draws a number when it comes, and the lowest go. memory_BHS: those."""

    accumulates = True

    def __init__(self, budget: int, seed: int = 0):
        super().__init__(budget, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def score(self, seen: Seen) -> torch.Tensor:
        B, H, _ = seen.position_BHS.shape
        drawn_BHN = torch.rand(B, H, seen.num_new, generator=self.generator).to(seen.k_BHSD.device)
        self.memory_BHS = drawn_BHN if self.memory_BHS is None else torch.cat([self.memory_BHS, drawn_BHN], 2)
        return self.memory_BHS

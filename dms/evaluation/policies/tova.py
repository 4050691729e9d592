"""What the newest query attends to least goes first (TOVA, arXiv 2401.06104 section 3.2)."""

import torch

from dms.evaluation.policies.base import Policy, Seen


class TOVA(Policy):
    """Weights of the newest query, averaged over the layer's heads: all heads of a layer keep the same tokens."""

    num_queries = 1

    def score(self, seen: Seen) -> torch.Tensor:
        weights_BS = seen.weights_BHGQS[..., -1, :].mean((1, 2))
        return weights_BS[:, None].expand_as(seen.position_BHS)

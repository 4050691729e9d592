"""The first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453 section 3.2). Positions stay those of the text."""

import torch

from dms.evaluation.policies.base import Policy, Seen

NUM_SINKS = 4


class SlidingWindow(Policy):
    """Keeps the first 4 tokens, which take the attention that has nowhere to go, and the latest ones."""

    def score(self, seen: Seen) -> torch.Tensor:
        position = seen.position_BHS.float()
        # A budget that small is for the newest tokens.
        return position.masked_fill(seen.position_BHS < min(NUM_SINKS, self.budget - 1), float("inf"))

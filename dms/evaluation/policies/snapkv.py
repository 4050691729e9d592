"""The last queries of a prompt vote for what is kept of it (SnapKV, arXiv 2404.14469 section 4)."""

import torch
import torch.nn.functional as F

from dms.evaluation.policies.base import Policy, Seen, protect_last

OBSERVATION_WINDOW = 32
# Votes are averaged over neighbours, so that whole phrases stay; the authors' code pools like this by default.
POOLING = 5


class SnapKV(Policy):
    """Reads a prompt densely, then keeps its last 32 tokens and what their queries attend to most, per KV head.

    The paper keeps all that is decoded afterwards; here the vote of the last 32 queries is repeated at every step, so that
    the budget holds in decoding too.
    """

    num_queries = OBSERVATION_WINDOW
    reads_whole_prompt = True

    def score(self, seen: Seen) -> torch.Tensor:
        window = min(OBSERVATION_WINDOW, max(1, self.budget // 2))
        votes_BHS = seen.weights_BHGQS[..., -window:, :].sum(3).mean(2)
        # Outside the window alone: within it the newest queries see each other.
        before_BHs = votes_BHS[..., :-window]
        pooled_BHs = F.avg_pool1d(before_BHs, POOLING, stride=1, padding=POOLING // 2)
        return protect_last(F.pad(pooled_BHs, (0, window)), window)

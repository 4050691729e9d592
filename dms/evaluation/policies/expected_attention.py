"""Expected Attention (arXiv 2510.00636): what queries to come are expected to read, from the distribution of those that came.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, N new tokens, S entries alive, D head dim.
"""

import torch

from dms.evaluation.policies.rotation import Rotation
from dms.evaluation.policies.rules import NUM_SINKS, Policy, Seen

# As kvpress: so many positions after the newest token.
NUM_FUTURE = 512


class ExpectedAttention(Policy):
    """An entry scores its expected share of a future query's attention, times the norm of its value.

    Queries, as they are before they are rotated, are taken for normally distributed, with mean and covariance of all queries so far but those of
    the first 4 tokens, and rotated by the mean of the rotations at the next 512 positions: mean m and covariance C. A key k is then read with
    E[exp(s q.k)] = exp(s m.k + s^2 k.C k / 2), s being the layer's scale, which a softmax over the entries makes a share (the paper's section 3);
    a group's query heads are averaged. The first 4 tokens stay, and have no part in the softmax. These are kvpress' defaults. A cap of scores, or a
    sink logit, is not regarded. The paper compresses a prompt, and every so many decoded tokens; here a prompt and then every token.
    """

    accumulates = True
    reads_whole_prompt = True
    reads_values = True

    def __init__(self, budget: int, seed: int = 0):
        super().__init__(budget, seed)
        self.rotation: Rotation | None = None
        """To be set before the first forward."""
        self.num_read = self.num_counted = 0
        self.sum_BHqD: torch.Tensor | None = None
        """Of queries before rotation, and of their outer products."""
        self.sum_BHqDD: torch.Tensor | None = None

    def score(self, seen: Seen) -> torch.Tensor:
        self._count(seen.query_BHqND)
        m_BHGD, c_BHGDD = (x.unflatten(1, (seen.k_BHSD.shape[1], -1)) for x in self._future())
        k_BHSD, scale = seen.k_BHSD.to(m_BHGD.dtype), seen.scale
        logit_BHGS = scale * torch.einsum("bhgd,bhsd->bhgs", m_BHGD, k_BHSD)
        logit_BHGS = logit_BHGS + scale**2 / 2 * (torch.einsum("bhgde,bhse->bhgsd", c_BHGDD, k_BHSD) * k_BHSD[:, :, None]).sum(-1)
        sink_BHS = seen.position_BHS < min(NUM_SINKS, self.budget - 1)
        share_BHGS = logit_BHGS.masked_fill((sink_BHS | ~seen.alive_BHS)[:, :, None], float("-inf")).softmax(-1)
        score_BHS = share_BHGS.mean(2) * seen.v_BHSD.to(m_BHGD.dtype).norm(dim=-1)
        return score_BHS.masked_fill(sink_BHS, float("inf"))

    def _count(self, query_BHqND: torch.Tensor) -> None:
        assert self.rotation is not None, "make_policy_cache sets it"
        N = query_BHqND.shape[2]
        position_N = torch.arange(self.num_read, self.num_read + N, device=query_BHqND.device)
        # The first ones' hidden states are far from all others'.
        counted = max(0, NUM_SINKS - self.num_read)
        before_BHqND = self.rotation.undo(query_BHqND, position_N)[:, :, counted:]
        sums = before_BHqND.sum(2), torch.einsum("bhnd,bhne->bhde", before_BHqND, before_BHqND)
        self.sum_BHqD = sums[0] if self.sum_BHqD is None else self.sum_BHqD + sums[0]
        self.sum_BHqDD = sums[1] if self.sum_BHqDD is None else self.sum_BHqDD + sums[1]
        self.num_read, self.num_counted = self.num_read + N, self.num_counted + before_BHqND.shape[2]

    def _future(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [B, Hq, D] and covariance [B, Hq, D, D] of queries to come."""
        assert self.rotation is not None and self.sum_BHqD is not None and self.sum_BHqDD is not None, "queries were counted"
        number = max(1, self.num_counted)
        mean_BHqD, square_BHqDD = self.sum_BHqD / number, self.sum_BHqDD / number
        covariance_BHqDD = square_BHqDD - mean_BHqD[..., None] * mean_BHqD[..., None, :]
        # Columns are rotated like rows.
        rotated_BHqDD = self.rotation.ahead(covariance_BHqDD, self.num_read, NUM_FUTURE).transpose(2, 3)
        return (
            self.rotation.ahead(mean_BHqD[:, :, None], self.num_read, NUM_FUTURE)[:, :, 0],
            self.rotation.ahead(rotated_BHqDD, self.num_read, NUM_FUTURE),
        )

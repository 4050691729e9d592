"""KVzip (arXiv 2505.23416): what a model reads most when it says a prompt once more.

Shapes: B batch, H KV heads, G query heads of each, Q queries, S entries alive, P prompt tokens.
"""

import torch
import torch.nn.functional as F

from dms.evaluation.policies.rules import NUM_SINKS, OBSERVATION_WINDOW, Policy, Seen, protect_last


class KVzip(Policy):
    """The prompt is read again after itself, and each of its entries scores the largest attention that any query of the second reading gives it,
    over the query heads of its group.

    It costs two readings, and sees more than a policy that evicts as it reads. The second reading is the prompt alone, without the paper's
    instruction to repeat it, which is for chat models; and its queries attend to all that came before them, where the paper divides prompts of more
    than 2,048 tokens. The first 4 tokens stay, as in kvpress. All heads hold as many here; with per-head budgets (`ada_kvzip`) it is nearer to the
    paper, which shares them over layers too. The paper keeps all that is decoded afterwards; here the last 32 tokens, at most half of the budget,
    stay, and what is older competes with the largest attention that any later query gave it.
    """

    num_queries = None
    accumulates = True
    reads_whole_prompt = True
    rereads_prompt = True

    def hear(self, highest_BHP: torch.Tensor) -> None:
        self.memory_BHS = highest_BHP if self.memory_BHS is None else torch.maximum(self.memory_BHS, highest_BHP)

    def score(self, seen: Seen) -> torch.Tensor:
        assert self.memory_BHS is not None, "the prompt was read again"
        if seen.num_new:
            # Not what a token gives itself.
            num_places, place = seen.position_BHS.shape[2], torch.arange(seen.position_BHS.shape[2], device=seen.k_BHSD.device)
            own_QS = place == place[num_places - seen.num_new :, None]
            received_BHS = seen.weights_BHGQS.masked_fill(own_QS, 0.0).amax((2, 3))
            self.memory_BHS = torch.maximum(F.pad(self.memory_BHS, (0, seen.num_new)), received_BHS)
        window = min(OBSERVATION_WINDOW, max(1, self.budget // 2))
        num_sinks = min(NUM_SINKS, self.budget - window)
        return protect_last(self.memory_BHS.masked_fill(seen.position_BHS < num_sinks, float("inf")), window)

"""What a training-free eviction policy is: a score for each entry that a layer holds; the lowest go.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, Q queries looked at, S entries alive, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Seen:
    """A layer's entries in order of age, the newest last, before anything is dropped."""

    position_BHS: torch.Tensor
    """int64: where they stand in the text."""
    k_BHSD: torch.Tensor
    """Their keys, as they are stored (rotated)."""
    num_new: int
    """How many came in this forward."""
    weights: torch.Tensor | None
    """[B, H, G, Q, S] float32: attention of the last Q queries over these entries; None for policies that look at none."""

    @property
    def weights_BHGQS(self) -> torch.Tensor:
        assert self.weights is not None, "the policy's num_queries asks for them"
        return self.weights


class Policy:
    """One layer's eviction."""

    num_queries: int | None = 0
    """How many of the last queries it looks at; 0: none; None: all that came in this forward."""
    accumulates = False
    """It must see every forward, not only those after which something is dropped."""
    reads_whole_prompt = False
    """A prompt is not to be given in parts."""
    masks_within_forward = False
    """In a forward of many tokens, each query sees what it would see if they came one by one."""

    def __init__(self, budget: int, seed: int = 0):
        if budget < 1:
            raise ValueError(f"the budget is {budget} entries a head; a policy keeps at least the newest, so give 1 or more")
        self.budget, self.seed = budget, seed
        self.memory_BHS: torch.Tensor | None = None
        """What it remembers of each entry, kept in step with the entries that stay."""

    def score(self, seen: Seen) -> torch.Tensor:
        """[B, H, S]: the entries of the lowest scores are dropped, of equal ones the oldest; the newest entry always stays."""
        raise NotImplementedError


def protect_last(score_BHS: torch.Tensor, num_last: int) -> torch.Tensor:
    """The same scores, but the newest `num_last` entries stay whatever theirs are."""
    protected = torch.arange(score_BHS.shape[2], device=score_BHS.device) >= score_BHS.shape[2] - num_last
    return score_BHS.masked_fill(protected, float("inf"))


class H2O(Policy):
    """Half of the budget for the most recent entries, half for those of the largest attention summed over all queries since they
    came; over a group's query heads the sum is taken too. That sum is its memory."""

    num_queries = None
    accumulates = True

    def score(self, seen: Seen) -> torch.Tensor:
        received_BHS = seen.weights_BHGQS.sum((2, 3))
        if self.memory_BHS is not None:
            received_BHS = received_BHS + F.pad(self.memory_BHS, (0, seen.num_new))
        self.memory_BHS = received_BHS
        return protect_last(received_BHS, self.budget // 2)


class TOVA(Policy):
    """Weights of the newest query, averaged over the layer's heads: all heads of a layer keep the same tokens."""

    num_queries = 1

    def score(self, seen: Seen) -> torch.Tensor:
        weights_BS = seen.weights_BHGQS[..., -1, :].mean((1, 2))
        return weights_BS[:, None].expand_as(seen.position_BHS)


class KeyDiff(Policy):
    """Keeps the keys of the lowest cosine with the mean of the head's normalised keys; needs no attention weights."""

    def score(self, seen: Seen) -> torch.Tensor:
        unit_BHSD = F.normalize(seen.k_BHSD.float(), dim=-1)
        anchor_BH1D = F.normalize(unit_BHSD.mean(2, keepdim=True), dim=-1)
        return -(unit_BHSD * anchor_BH1D).sum(-1)


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


NUM_SINKS = 4


class SlidingWindow(Policy):
    """Keeps the first 4 tokens, which take the attention that has nowhere to go (StreamingLLM, arXiv 2309.17453), and the latest ones.

    It needs no scores: what is kept is known beforehand, so that a layer's own window does it (`WindowLayer`).
    """

    masks_within_forward = True

    @property
    def sinks(self) -> int:
        # A budget that small is for the newest tokens.
        return min(NUM_SINKS, self.budget - 1)

    @property
    def window(self) -> int:
        """Tokens that stay visible after their own."""
        return self.budget - self.sinks - 1


class Random(Policy):
    """Keeps a uniform sample of all tokens so far: each entry draws a number when it comes, and the lowest go. They are its memory."""

    accumulates = True

    def __init__(self, budget: int, seed: int = 0):
        super().__init__(budget, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def score(self, seen: Seen) -> torch.Tensor:
        B, H, _ = seen.position_BHS.shape
        drawn_BHN = torch.rand(B, H, seen.num_new, generator=self.generator).to(seen.k_BHSD.device)
        self.memory_BHS = drawn_BHN if self.memory_BHS is None else torch.cat([self.memory_BHS, drawn_BHN], 2)
        return self.memory_BHS

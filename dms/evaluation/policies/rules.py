"""What a training-free eviction policy is: a score for each entry that a layer holds; the lowest go.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, N new tokens, Q queries looked at, S entries alive, D head dim. Where heads hold
different numbers of entries, S is the most of a head, and a head that holds fewer has them in its last places.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Seen:
    """A layer's entries in order of age, the newest last, before anything is dropped."""

    position_BHS: torch.Tensor
    """int64: where they stand in the text."""
    alive_BHS: torch.Tensor
    """bool: which places hold an entry; the others' contents mean nothing."""
    k_BHSD: torch.Tensor
    """Their keys, as they are stored (rotated)."""
    num_new: int
    """How many came in this forward."""
    query_BHqND: torch.Tensor
    """The queries of this forward, rotated."""
    scale: float
    """Of the scores of queries and keys."""
    values: torch.Tensor | None
    """[B, H, S, D]: their values; None for policies that do not read them."""
    weights: torch.Tensor | None
    """[B, H, G, Q, S] float32: attention of the last Q queries over these entries; None for policies that look at none."""

    @property
    def weights_BHGQS(self) -> torch.Tensor:
        assert self.weights is not None, "the policy's num_queries asks for them"
        return self.weights

    @property
    def v_BHSD(self) -> torch.Tensor:
        assert self.values is not None, "the policy's reads_values asks for them"
        return self.values


class Policy:
    """One layer's eviction."""

    num_queries: int | None = 0
    """How many of the last queries it looks at; 0: none; None: all that came in this forward."""
    accumulates = False
    """It must see every forward, not only those after which something is dropped."""
    reads_values = False
    """It reads the values of entries."""
    reads_whole_prompt = False
    """A prompt is not to be given in parts."""
    rereads_prompt = False
    """A prompt is read a second time before anything is dropped (`PolicyCache.finish_prompt`)."""
    masks_within_forward = False
    """In a forward of many tokens, each query sees what it would see if they came one by one."""

    def __init__(self, budget: int, seed: int = 0):
        if budget < 1:
            raise ValueError(f"the budget is {budget} entries a head; a policy keeps at least the newest, so give 1 or more")
        self.budget, self.seed = budget, seed
        self.memory_BHS: torch.Tensor | None = None
        """What it remembers of each entry, kept in step with the entries that stay."""

    def hear(self, highest_BHP: torch.Tensor) -> None:
        """Of a policy that `rereads_prompt`, for a part of the second reading: the largest weight that its queries, over the query heads of a KV
        head, give each of the first reading's P entries."""
        raise NotImplementedError

    def score(self, seen: Seen) -> torch.Tensor:
        """[B, H, S]: the entries of the lowest scores are dropped, of equal ones the oldest; the newest entry always stays."""
        raise NotImplementedError

    def choose(self, score_BHS: torch.Tensor, alive_BHS: torch.Tensor, surplus: int) -> torch.Tensor:
        """[B, H, S] bool: which entries are dropped, `surplus` of a row; here each head drops as many, and all hold as many.

        score: above all others for the newest.
        """
        order_BHs = score_BHS.argsort(dim=2, stable=True)[..., : surplus // score_BHS.shape[1]]
        return torch.zeros_like(alive_BHS).scatter_(2, order_BHs, True)


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
        unit_BHSD = F.normalize(seen.k_BHSD.float(), dim=-1) * seen.alive_BHS[..., None]
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


RECENT = 64


class RandomAttention(Policy):
    """Keeps the prompt and evicts at random what was generated (Random Attention, arXiv 2609.03430), in each head by itself.

    The newest 64 entries stay, at most half of the budget. Of the others the prompt's stay, which are those of the first forward: where the
    prompt does not fit, as in long documents, its first ones, as many as fit but one, as in the authors' code. What is left of the budget goes
    to a uniform draw among the rest, made anew each time. The paper draws after every 64 tokens, here after every one.
    """

    accumulates = True
    reads_whole_prompt = True

    def __init__(self, budget: int, seed: int = 0):
        super().__init__(budget, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_prompt: int | None = None

    @property
    def num_recent(self) -> int:
        return min(RECENT, self.budget // 2)

    def score(self, seen: Seen) -> torch.Tensor:
        if self.num_prompt is None:
            self.num_prompt = seen.num_new
        num_protected = min(self.num_prompt, self.budget - self.num_recent - 1)
        drawn_BHS = torch.rand(seen.position_BHS.shape, generator=self.generator).to(seen.k_BHSD.device)
        return protect_last(drawn_BHS.masked_fill(seen.position_BHS < num_protected, float("inf")), self.num_recent)

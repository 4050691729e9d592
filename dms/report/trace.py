"""What the gates said about each token of one document. Letters: L layers that have gates, H KV heads, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DocumentTrace:
    """One document and what the gates said about each of its tokens.

    tokens: decoded text of each token [T]. evict_prob_LHT: sigmoid of the gate's logit as nested lists [L][H][T]; None where
    the token is undecided (kept, not counted). layer_indices: the model's index of each layer [L]. answers: (start, end,
    answered right) spans of tokens `start..end-1`, in order. threshold: evicted iff the probability is above it.
    Raises ValueError where lengths disagree or a probability is outside 0..1.
    """

    tokens: list[str]
    evict_prob_LHT: list[list[list[float | None]]]
    layer_indices: list[int]
    answers: Sequence[tuple[int, int, bool]] = ()
    threshold: float = 0.5

    def __post_init__(self):
        num_tokens, num_layers = len(self.tokens), len(self.layer_indices)
        if num_tokens == 0 or num_layers == 0:
            raise ValueError(f"a trace needs tokens and layers; given {num_tokens} tokens and {num_layers} layers")
        if len(self.evict_prob_LHT) != num_layers:
            raise ValueError(f"evict_prob_LHT has {len(self.evict_prob_LHT)} layers, layer_indices {num_layers}")
        for layer, heads in zip(self.layer_indices, self.evict_prob_LHT, strict=True):
            for head, probs in enumerate(heads):
                if len(probs) != num_tokens:
                    raise ValueError(f"layer {layer} head {head}: {len(probs)} probabilities for {num_tokens} tokens")
                bad = next((p for p in probs if p is not None and not 0.0 <= p <= 1.0), None)
                if bad is not None:
                    raise ValueError(f"layer {layer} head {head}: {bad} is not a probability")
        if not any(self.evict_prob_LHT):
            raise ValueError("a trace needs at least one head")
        at = 0
        for start, end, _ in self.answers:
            if not at <= start < end <= num_tokens:
                raise ValueError(f"answer {start}..{end} is empty, overlaps the one before or leaves the {num_tokens} tokens")
            at = end

    @property
    def num_heads(self) -> int:
        """(layer, head) pairs."""
        return sum(map(len, self.evict_prob_LHT))

    def counts(self, position: int) -> tuple[int, int]:
        """(evicted, decided) over all (layer, head) pairs for one token."""
        probs = [head[position] for layer in self.evict_prob_LHT for head in layer]
        decided = [p for p in probs if p is not None]
        return sum(p > self.threshold for p in decided), len(decided)

    def keep_share_T(self) -> list[float]:
        """Share of the deciding (layer, head) pairs that keep each token [T]; 1 where none has decided yet."""
        pairs = map(self.counts, range(len(self.tokens)))
        return [1 - evicted / decided if decided else 1.0 for evicted, decided in pairs]

    def mean_prob_T(self) -> list[float | None]:
        """Mean eviction probability over the deciding (layer, head) pairs [T]."""
        means: list[float | None] = []
        for position in range(len(self.tokens)):
            probs = [head[position] for layer in self.evict_prob_LHT for head in layer]
            decided = [p for p in probs if p is not None]
            means.append(sum(decided) / len(decided) if decided else None)
        return means

    def evicted_share(self) -> float:
        """Evicted over decided, ratio of sums."""
        evicted, decided = map(sum, zip(*map(self.counts, range(len(self.tokens))), strict=True))
        return evicted / decided if decided else 0.0

    def summary(self) -> str:
        """One line: tokens, what is evicted, answers."""
        share = self.evicted_share()
        ratio = f" (CR {1 / (1 - share):.1f})" if share < 1 else ""
        text = f"{len(self.tokens):,} tokens, {self.num_heads} KV heads: {100 * share:.0f} % of the entries marked for eviction{ratio}"
        if self.answers:
            text += f"; {sum(right for *_, right in self.answers)} of {len(self.answers)} answers right"
        return text

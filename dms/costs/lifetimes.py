"""What becomes of tokens, as plans and analyses assume it: which share stays for good, and which leaves by each window.

A ratio alone does not say it where there are several windows. The rule: what does not stay leaves by each window alike. A target of a
document's end or of its mean counts what windows hold, too: what stays is then less, and where windows alike would hold more than the target
allows, nothing stays and more tokens leave by the first window. Letters: T tokens, w window.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# As recipes have it; `dms.training.budgets` says what each counts.
Budget = Literal["decided", "end", "mean"]


@dataclass(frozen=True)
class Lifetimes:
    """Shares of the tokens of a head."""

    windows: tuple[int, ...]
    leave: tuple[float, ...]
    """By each window; the rest stays."""

    @classmethod
    def alike(cls, windows: Sequence[int], stay: float) -> "Lifetimes":
        """What does not stay leaves by each window alike."""
        return cls(tuple(windows), ((1.0 - stay) / len(windows),) * len(windows))

    @classmethod
    def of_target(cls, windows: Sequence[int], cr: float, budget: Budget, tokens: int) -> "Lifetimes":
        """Those that a target ratio asks for in documents of T tokens. decided: of the tokens that leave windows one in `cr` stays."""
        if budget == "decided":
            return cls.alike(windows, 1.0 / cr)
        holds: Callable[[int, int], float] = entries_of if budget == "end" else pairs_of
        whole, held = holds(tokens, tokens), [holds(tokens, w) for w in windows]
        target, mean = whole / cr, sum(held) / len(held)
        if mean < whole and (stay := (target - mean) / (whole - mean)) >= 0:
            return cls.alike(windows, min(1.0, stay))
        if len(windows) == 1:
            return cls(tuple(windows), (1.0,))
        later = sum(held[1:]) / (len(held) - 1)
        share = min(1.0, max(0.0, (target - held[0]) / (later - held[0]))) if later > held[0] else 0.0
        return cls(tuple(windows), (1.0 - share, *[share / (len(held) - 1)] * (len(held) - 1)))

    @classmethod
    def mean(cls, found: Iterable["Lifetimes"]) -> "Lifetimes":
        """Over several with the same windows."""
        counted = Counter(found)
        total, first = counted.total(), next(iter(counted))
        leave = (sum(number * one.leave[j] for one, number in counted.items()) / total for j in range(len(first.windows)))
        return cls(first.windows, tuple(leave))

    @property
    def stay(self) -> float:
        return max(0.0, 1.0 - sum(self.leave))

    def entries(self, tokens: int) -> float:
        """That the newest of T tokens sees, itself among them."""
        return self._weighted(float(tokens), [float(entries_of(tokens, w)) for w in self.windows])

    def in_lists(self, tokens: int) -> list[float]:
        """Entries outside the ring after T tokens: those that stay, then those of each window but the first."""
        ring = entries_of(tokens, self.windows[0])
        later = [share * (entries_of(tokens, w) - ring) for share, w in zip(self.leave[1:], self.windows[1:], strict=True)]
        return [self.stay * (tokens - ring), *later]

    def pairs(self, tokens: int, causal: bool = True) -> float:
        """Pairs of a query and a key that it sees, over a text of T tokens."""
        pairs = self._weighted(pairs_of(tokens, tokens), [pairs_of(tokens, w) for w in self.windows])
        # Without a direction each pair is there twice, but for a token and itself.
        return pairs if causal else 2 * pairs - tokens

    def _weighted(self, of_staying: float, of_windows: Sequence[float]) -> float:
        return self.stay * of_staying + sum(share * held for share, held in zip(self.leave, of_windows, strict=True))


def entries_of(tokens: int, window: int) -> int:
    """Within `window` back of the newest of T tokens, itself among them."""
    return min(tokens, window + 1)


def pairs_of(tokens: int, window: int) -> float:
    """Pairs of a query and a key at most `window` back."""
    near = min(window + 1, tokens)
    return near * tokens - near * (near - 1) / 2

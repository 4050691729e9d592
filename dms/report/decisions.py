"""Decisions of the gates as data: of one document token by token, and of several by layer, head and position.

With several windows each token has a class: 0, no decision evicts it; j from 1 on, decision j is the first that evicts it, and it is gone for
queries more than w_j after it. Shapes: L layers with gates, H KV heads, K windows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

FORMAT_VERSION = 1
"""Of traces.json and profile.json."""
# More than one scrolls through. Of a longer text the end is shown, where the questions stand.
_MAX_TOKENS = 4096
_TOKENS_OF_MANY_HEADS = 2048


@dataclass(frozen=True, kw_only=True)
class DocumentTrace:
    """One document and what the gates decided about each of its tokens.

    Raises:
        ValueError: lengths disagree, or a probability is outside 0..1.
    """

    tokens: list[str]
    """Decoded text of each token [T]."""
    evict_prob_LHT: list[list[list[float | None]]]
    """Sigmoid of the evict logit, of several windows' the highest, as nested lists [L][H][T]; None: undecided, and so kept and not counted."""
    layer_indices: list[int]
    """The model's index of each layer [L]."""
    answers: Sequence[tuple[int, int, bool]] = ()
    """(start, end, whether it was answered right) of tokens `start..end-1`, in order."""
    threshold: float = 0.5
    """A token is evicted if its probability is above it."""
    title: str = ""
    """What the document is."""
    window: int | None = None
    """As in `DMSConfig`, of several the first: how long every token stays; None: not known."""
    windows: Sequence[int] = ()
    """Where there are several; else none."""
    class_LHT: list[list[str]] | None = None
    """With several windows the class of each token, a digit of a string of T; None: one window."""
    sinks: int = 0
    """As in `DMSConfig`."""
    prompt: int | None = None
    """How many tokens were given; those after it were decoded one by one. None: not known."""
    first: int = 0
    """The position of `tokens[0]` where a part is shown."""
    head_indices: list[list[int]] | None = None
    """The heads that are shown of each layer; None: all."""
    left_out: str = ""
    """What is not shown, in words."""

    def __post_init__(self) -> None:
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
        if self.head_indices is not None and [len(row) for row in self.head_indices] != [len(row) for row in self.evict_prob_LHT]:
            raise ValueError(f"head_indices {self.head_indices} do not name the heads of evict_prob_LHT")
        self._check_classes()
        at = 0
        for start, end, _ in self.answers:
            if not at <= start < end <= num_tokens:
                raise ValueError(f"answer {start}..{end} is empty, overlaps the one before or leaves the {num_tokens} tokens")
            at = end

    def _check_classes(self) -> None:
        if (self.class_LHT is None) != (len(self.windows) < 2):
            raise ValueError(f"a trace has classes where it has several windows; given windows {list(self.windows)}")
        if self.class_LHT is None:
            return
        if [len(row) for row in self.class_LHT] != [len(row) for row in self.evict_prob_LHT]:
            raise ValueError("class_LHT and evict_prob_LHT are of different heads")
        known = "".join(map(str, range(len(self.windows) + 1)))
        for layer, classes in zip(self.layer_indices, self.class_LHT, strict=True):
            for head, row in enumerate(classes):
                if len(row) != len(self.tokens) or row.strip(known):
                    raise ValueError(f"layer {layer} head {head}: classes are {len(self.tokens)} digits of {known}; given {row[:40]!r}")

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
        counts = [self.counts(position) for position in range(len(self.tokens))]
        evicted, decided = (sum(count) for count in zip(*counts, strict=True))
        return evicted / decided if decided else 0.0

    def class_shares(self) -> list[float]:
        """Share of the decided tokens that leave by each of several windows, in their order."""
        decided = sum(self.counts(position)[1] for position in range(len(self.tokens)))
        rows = [row for classes in self.class_LHT or () for row in classes]
        return [sum(row.count(str(j + 1)) for row in rows) / max(1, decided) for j in range(len(self.windows))]

    def summary(self) -> str:
        """One line: tokens, what is evicted, answers."""
        share = self.evicted_share()
        ratio = f" (CR {1 / (1 - share):.1f})" if share < 1 else ""
        marked = f"{100 * share:.0f} % of the entries marked for eviction{ratio}"
        if self.class_LHT is not None:
            leave = zip(self.class_shares(), self.windows, strict=True)
            leaving = ", ".join(f"{100 * part:.0f} % {'leave ' * (j == 0)}after {w:,}" for j, (part, w) in enumerate(leave))
            marked = f"{leaving} tokens, {100 * (1 - share):.0f} % stay"
        text = f"{len(self.tokens):,} tokens, {self.num_heads} KV heads: {marked}"
        if self.answers:
            text += f"; {sum(right for *_, right in self.answers)} of {len(self.answers)} answers right"
        return text

    def fitted(self, max_values: int) -> "DocumentTrace":
        """The same with at most about `max_values` probabilities: the end of a long document, and some heads of many, evenly spaced."""
        total, num_tokens = self.num_heads, min(len(self.tokens), _MAX_TOKENS)
        if total * num_tokens > max_values:
            num_tokens = min(num_tokens, max(1, max_values), _TOKENS_OF_MANY_HEADS)
        skipped = len(self.tokens) - num_tokens
        num_heads = max(1, max_values // num_tokens)
        heads_of_layer = max(map(len, self.evict_prob_LHT))
        layers = _spread(len(self.layer_indices), max(1, num_heads // heads_of_layer))
        heads = [_spread(len(self.evict_prob_LHT[i]), num_heads) for i in layers]
        names = self.head_indices or [list(range(len(row))) for row in self.evict_prob_LHT]
        shown = []
        if skipped:
            shown.append(f"the last {num_tokens:,} of {len(self.tokens):,} tokens")
        if sum(map(len, heads)) < total:
            shown.append(f"{sum(map(len, heads))} of {total} KV heads, from {len(layers)} of {len(self.layer_indices)} layers")
        return replace(
            self,
            tokens=self.tokens[skipped:],
            evict_prob_LHT=[[self.evict_prob_LHT[i][h][skipped:] for h in row] for i, row in zip(layers, heads, strict=True)],
            class_LHT=None
            if (classes := self.class_LHT) is None
            else [[classes[i][h][skipped:] for h in row] for i, row in zip(layers, heads, strict=True)],
            layer_indices=[self.layer_indices[i] for i in layers],
            head_indices=[[names[i][h] for h in row] for i, row in zip(layers, heads, strict=True)],
            answers=[(start - skipped, end - skipped, right) for start, end, right in self.answers if start >= skipped],
            first=self.first + skipped,
            left_out=f"Shown: {', and '.join(shown)}." if shown else self.left_out,
        )

    def to_dict(self) -> dict[str, Any]:
        """As in traces.json and in pages; probabilities to four digits."""
        several = {} if self.class_LHT is None else {"windows": list(self.windows), "classes": self.class_LHT}
        return {
            "title": self.title,
            "tokens": self.tokens,
            "layer_indices": list(self.layer_indices),
            "head_indices": self.head_indices or [list(range(len(row))) for row in self.evict_prob_LHT],
            "evict_prob": [[[_short(p, self.threshold) for p in head] for head in layer] for layer in self.evict_prob_LHT],
            "threshold": self.threshold,
            "answers": [list(answer) for answer in self.answers],
            "window": self.window,
            "sinks": self.sinks,
            "prompt": self.prompt,
            "first": self.first,
            "left_out": self.left_out,
            **several,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "DocumentTrace":
        """Raises ValueError where a field is missing or unknown."""
        given = dict(saved)
        try:
            probs, answers, classes = given.pop("evict_prob"), given.pop("answers"), given.pop("classes", None)
            return cls(evict_prob_LHT=probs, class_LHT=classes, answers=[(start, end, right) for start, end, right in answers], **given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a trace of this version ({error}); evaluate again to write it anew") from None


@dataclass(frozen=True, kw_only=True)
class ProfileBin:
    """Tokens `start..end-1` of the documents."""

    start: int
    end: int
    evicted: float
    """Share of the decisions in it."""


@dataclass(frozen=True, kw_only=True)
class ProfilePoint:
    """What the gates evict at one operating point."""

    evict_bias: float
    layer_indices: list[int]
    """The model's index of each layer [L]."""
    evicted_LH: list[list[float]]
    """Share of the decisions."""
    cr_LH: list[list[float]]
    """Tokens seen over entries alive at the end."""
    bins: list[ProfileBin]
    """In the order of the text; those without a decision are left out."""
    positions: list[int]
    """Some positions in the documents, in order."""
    cr_at: list[float]
    """Tokens seen over entries alive when the token at each of `positions` is read."""
    class_LHK: list[list[list[float]]] | None = None
    """With several windows: share of the decided tokens that leave by each; None: one window."""


@dataclass(frozen=True, kw_only=True)
class GateProfile:
    """What the gates evict where, over several documents: profile.json."""

    window: int | list[int]
    sinks: int
    granularity: str
    alignment: str
    num_documents: int
    length: int
    """Tokens of the longest document."""
    points: list[ProfilePoint]
    made_of: str | None = None
    """A hash of the model and the documents; None: by an earlier version."""

    def usual_point(self) -> ProfilePoint:
        """`evict_bias` 0, or the nearest to it."""
        return min(self.points, key=lambda point: abs(point.evict_bias))

    def to_dict(self) -> dict[str, Any]:
        """As in profile.json; `class_LHK` where there are several windows."""
        saved = asdict(self)
        for point in saved["points"]:
            if point["class_LHK"] is None:
                del point["class_LHK"]
        return {"format_version": FORMAT_VERSION, **saved}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "GateProfile":
        """Raises TypeError or KeyError where a field is missing or unknown."""
        given = {name: value for name, value in saved.items() if name != "format_version"}
        points = [ProfilePoint(**{**point, "bins": [ProfileBin(**part) for part in point["bins"]]}) for point in given.pop("points")]
        return cls(**given, points=points)


def _spread(available: int, wanted: int) -> list[int]:
    """`wanted` of `available` indices, evenly spaced, the first and the last among them."""
    if wanted >= available:
        return list(range(available))
    return sorted({round(i * (available - 1) / max(1, wanted - 1)) for i in range(wanted)})


def _short(prob: float | None, threshold: float) -> float | int | None:
    """Four significant digits, all digits where rounding would turn the decision; within 1e-4 of 0 or 1, that."""
    if prob is None:
        return None
    short = float(f"{prob:.4g}")
    short = int(short + 0.5) if min(short, 1 - short) < 1e-4 else short
    return short if (short > threshold) == (prob > threshold) else prob

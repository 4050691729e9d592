"""The evaluation's sentences and marks, put in order for page and card."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARKS = {
    "evicted_nothing": "nothing was evicted: these are the dense model's figures, and no saving",
    "budget_missed": "the entries alive miss the budget by more than 3 %: not a comparison at equal memory",
    "dense_at_chance": "the dense model does no better than guessing: the task tells nothing about eviction",
    "few_samples": "fewer than 50 samples, or than 25 documents: the interval is wide and may be too narrow still",
    "beyond_training": "longer than what the gates were trained on",
}
# These say that a figure is not what it seems; the others say how far it carries.
SEVERE = ("evicted_nothing", "budget_missed", "dense_at_chance")


@dataclass
class Verdict:
    """What is said of one length and operating point. heading: "" where the sentences have none. as_trained: evict_bias is 0, or alone."""

    heading: str
    sentences: list[str] = field(default_factory=list)

    @property
    def as_trained(self) -> bool:
        point = re.search(r"evict_bias ([+\-−]?[\d.]+)", self.heading)
        return point is None or float(point[1].replace("−", "-")) == 0


def verdicts(words: Iterable[str]) -> list[Verdict]:
    """Sentences by length and operating point: those that begin with "At 2048 tokens" (whatever the number), or with the harness, open a group."""
    found: list[Verdict] = []
    for sentence in words:
        if re.match(r"(At [\d,]+ tokens|In lm-evaluation-harness)", sentence):
            found.append(Verdict(sentence))
        else:
            found = found or [Verdict("")]
            found[-1].sentences.append(sentence)
    return found


def mark_text(mark: str) -> str:
    return MARKS.get(mark, mark.replace("_", " "))


def marked(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each mark that rows bear, the severe ones first: how many rows, of which policies, tasks and lengths."""
    counts = Counter(mark for row in rows for mark in row.get("marks") or [])
    order = sorted(counts, key=lambda mark: mark not in SEVERE)
    return [f"{_places(rows, mark)} ({counts[mark]} of {len(rows)} figures): {mark_text(mark)}." for mark in order]


def _places(rows: Sequence[Mapping[str, Any]], mark: str) -> str:
    """Named by what is most telling: the lengths where all of a length is marked, else tasks and policies."""
    bearing = [row for row in rows if mark in (row.get("marks") or [])]
    if mark.startswith("beyond_"):
        return " and ".join(f"{length:,} tokens" for length in sorted({row["length"] for row in bearing if row.get("length")}))
    policies = list(dict.fromkeys(row["policy"] for row in bearing))
    tasks = list(dict.fromkeys(row["task"] for row in bearing))
    who = "all policies" if len(policies) > 3 else ", ".join(policies)
    what = f"{len(tasks)} tasks" if len(tasks) > 4 else ", ".join(tasks)
    return f"{what}, {who}"

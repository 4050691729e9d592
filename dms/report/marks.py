"""What a mark on a row means, said once for page and card."""

MARKS = {
    "evicted_nothing": "nothing was evicted: these are the dense model's figures, and no saving",
    "budget_missed": "the entries alive miss the budget by more than 3 %: not a comparison at equal memory",
    "dense_at_chance": "the dense model does no better than guessing: the task tells nothing about eviction",
    "few_samples": "fewer than 50 samples: the interval is wide and may be too narrow still",
    "beyond_training": "longer than what the gates were trained on",
    "beyond_context": "longer than the model's own context",
}
# These say that a figure is not what it seems; the others say how far it carries.
SEVERE = ("evicted_nothing", "budget_missed", "dense_at_chance")


def mark_text(mark: str) -> str:
    return MARKS.get(mark, mark.replace("_", " "))

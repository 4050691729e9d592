"""Rows of made-up results of lm-evaluation-harness: what is chance, and when the dense model does no better."""

import numpy as np
import pytest

from dms.evaluation.engine.lm_eval_rows import HarnessRun, make_rows
from dms.evaluation.stats.rows import ResultRow, RowContext

CONTEXT = RowContext(model="m", model_hash=None, recipe_hash=None, target_cr=None, seed=7, versions={}, device="cpu")


def made(metric: str, right: dict[str, list[float]], chance: dict[str, float]) -> dict[str, ResultRow]:
    """Rows, by task, of dense on a group of the given parts' documents."""
    name, everything = f"{metric},none", [value for values in right.values() for value in values]
    run = {
        "task": "group",
        "policy": "dense",
        "evict_bias": None,
        "results": {"group": {name: np.mean(everything)}, **{part: {name: np.mean(values)} for part, values in right.items()}},
        "group_subtasks": {"group": ["inner"], "inner": list(right)},
        "n-samples": {part: {"original": len(values), "effective": len(values)} for part, values in right.items()},
        "n-shot": {part: number for number, part in enumerate(right)},
        "higher_is_better": {},
        "values": {part: {name: {str(i): value for i, value in enumerate(values)}} for part, values in right.items()},
        "chance": chance,
        "counted": {"num_heads": 1, "num_rows": 1, "alive": 9, "seen": 9, "evicted": 0, "decided": 9, "longest": 9, "memory": []},
        "seconds": 1.0,
    }
    return {row.task.partition(":")[2]: row for row in make_rows([HarnessRun.from_dict(run)], CONTEXT, 1, None)}


def is_marked(row: ResultRow) -> bool:
    return "dense_at_chance" in row.marks


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "exact_match", "prompt_level_strict_acc", "pass@1"])
@pytest.mark.parametrize(("num_right", "marked"), [(0, True), (4, True), (50, False)])
def test_a_model_that_does_not_do_the_task_is_marked(metric, num_right, marked):
    """Of 100 documents, whose answers cannot be guessed."""
    row = made(metric, {"sums": [1.0] * num_right + [0.0] * (100 - num_right)}, {})["sums"]
    assert row.chance == 0.0 and is_marked(row) == marked


def test_guessing_is_marked_in_accuracies_alone():
    right = {"choice": [1.0, 0.0] * 50}
    assert is_marked(made("acc", right, {"choice": 0.5})["choice"]) and not is_marked(made("acc", right, {"choice": 0.25})["choice"])
    other = made("f1", {"text": [0.0] * 100}, {})["text"]
    assert not is_marked(other) and other.chance == 0.0


def test_a_group_is_as_hard_to_guess_as_its_parts():
    rows = made("acc", {"four": [1.0, 0.0, 0.0] * 50, "two": [0.0, 1.0] * 25}, {"four": 0.25, "two": 0.5})
    assert rows["group"].chance == pytest.approx((150 * 0.25 + 50 * 0.5) / 200)
    # 0.375, of which the interval reaches 0.3125 at least.
    assert is_marked(rows["group"]) and is_marked(rows["two"])
    better = made("acc", {"four": [1.0] * 150, "two": [0.0, 1.0] * 25}, {"four": 0.25, "two": 0.5})
    assert not is_marked(better["group"]) and is_marked(better["two"])
    assert (rows["two"].num_fewshot, rows["group"].num_fewshot) == (1, None)

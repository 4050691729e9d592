"""Rows in words: where dms loses, ties and wins, against dense and against what a user would pick instead."""

from collections.abc import Iterable, Mapping
from typing import Any

from dms.evaluation.stats.collect import BEYOND_TRAINING, BUDGET_MISSED, DENSE_AT_CHANCE, EVICTED_NOTHING, FEW_SAMPLES

# By distance: parts of what is told already.
_PARTS = tuple(f"recall_q{number}" for number in (1, 2, 3, 4))
_DISTANCES = ("kl", "top1_agreement", "divergence_length")
_Row = Mapping[str, Any]


def in_words(rows: Iterable[_Row]) -> list[str]:
    """A few sentences for each length and operating point of dms. What rests on few samples is told apart from what is known."""
    rows = [row for row in rows if row["task"] not in _PARTS and row["suite"] != "scaling"]
    several = len({row["evict_bias"] for row in rows if row["policy"] == "dms"}) > 1
    told = []
    for length, bias in dict.fromkeys((row["length"], row["evict_bias"]) for row in rows if row["policy"] == "dms"):
        here = [row for row in rows if row["length"] == length and row["evict_bias"] == bias]
        dms = [row for row in here if row["policy"] == "dms"]
        told.append(_heading(dms, length, bias if several else None))
        if any(EVICTED_NOTHING in row["marks"] for row in dms):
            told.append("It evicted nothing: its figures are those of the dense model, and nothing is saved.")
            continue
        unable = [row for row in dms if DENSE_AT_CHANCE in row["marks"]]
        few = [row for row in dms if FEW_SAMPLES in row["marks"] and row not in unable]
        sure = [row for row in dms if row not in unable and row not in few]
        told += [*_beside_dense(sure), *_beside_others(here, sure)]
        if few:
            told.append(f"Too few samples to say: {_names(few)}.")
        if unable:
            told.append(f"Dense itself is at chance in {_names(unable)}: nothing is shown there.")
    return told


def _heading(dms: list[_Row], length: int | None, bias: float | None) -> str:
    """length: None for rows of lm-evaluation-harness, whose texts have many."""
    place = "In lm-evaluation-harness" if length is None else f"At {length} tokens"
    point = f" at evict_bias {bias:+g}" if bias is not None else ""
    ratios = [row["cr"] for row in dms if row["cr"] is not None]
    held = f"1/{min(ratios):.2f}" + (f" to 1/{max(ratios):.2f}" if max(ratios) - min(ratios) >= 0.01 else "")
    beyond = ", beyond the length that its gates were trained at" if BEYOND_TRAINING in dms[0]["marks"] else ""
    return f"{place}{point}, dms holds {held} of the entries{beyond}."


def _beside_dense(dms: list[_Row]) -> list[str]:
    """Figures that are distances from dense are no comparison: they are told as they are."""
    told, compared = [], [row for row in dms if row["vs_dense"]]
    for verdict, words in (
        ("worse", "It loses to dense in"),
        ("better", "It is better than dense in"),
        ("not different", "It is not told apart from dense in"),
    ):
        found = [_against_dense(row) for row in compared if row["vs_dense"]["verdict"] == verdict]
        if found:
            told.append(f"{words} {'; '.join(found)}.")
    alone = [row for row in dms if row["vs_dense"] is None]
    for words, chosen in (
        ("Its distance from dense", [row for row in alone if row["metric"] in _DISTANCES]),
        ("Not compared document by document", [row for row in alone if row["metric"] not in _DISTANCES]),
    ):
        if chosen:
            told.append(f"{words}: {', '.join(_told(row) for row in chosen)}.")
    return told


def _beside_others(here: list[_Row], dms: list[_Row]) -> list[str]:
    off = sorted({row["policy"] for row in here if BUDGET_MISSED in row["marks"]})
    told = [f"{', '.join(off)} missed the budget, and no comparison with that is told."] if off else []
    wins, ties = [], []
    for own in dms:
        others = [row for row in here if row["vs_dms"] and _figure(row) == _figure(own) and row["policy"] not in off]
        if not others:
            continue
        ahead = [f"{row['policy']} {_number(row['value'])}" for row in others if row["vs_dms"]["verdict"] == "better"]
        if ahead:
            told.append(f"At the same budget it loses in {_name(own)} {_number(own['value'])} to {', '.join(ahead)}.")
        level = [row["policy"] for row in others if row["vs_dms"]["verdict"] == "not different"]
        if level:
            ties.append(f"{_name(own)} ({', '.join(level)})")
        if not ahead and not level:
            wins.append(_name(own))
    if ties:
        told.append(f"At the same budget it is not told apart in {'; '.join(ties)}.")
    if wins:
        told.append(f"At the same budget it is better than every other policy in {', '.join(wins)}.")
    return told


def _figure(row: _Row) -> tuple[str, str]:
    return row["task"], row["metric"]


def _name(row: _Row) -> str:
    if row["metric"] == "accuracy":
        return row["task"]
    limit = f", at most {row['limit']}," if row.get("limit") else ""
    return f"{row['metric'].replace('_', ' ')}{limit} of {row['task']}"


def _told(row: _Row) -> str:
    return f"{_name(row)} {_number(row['value'])}"


def _names(rows: list[_Row]) -> str:
    return ", ".join(dict.fromkeys(map(_name, rows)))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _against_dense(row: _Row) -> str:
    """`count 0.380 (dense 0.530, -0.150 [-0.210, -0.090])`."""
    d = row["vs_dense"]
    dense = _number(row["value"] - d["difference"])
    return f"{_name(row)} {_number(row['value'])} (dense {dense}, {d['difference']:+.3f} [{d['ci_low']:+.3f}, {d['ci_high']:+.3f}])"

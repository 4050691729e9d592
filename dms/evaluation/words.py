"""Rows in words: where dms loses, ties and wins, against dense and against what a user would pick instead."""

from collections.abc import Iterable, Mapping
from typing import Any

from dms.evaluation.collect import BEYOND_TRAINING, DENSE_AT_CHANCE

# By distance: parts of what is told already.
_PARTS = tuple(f"recall_q{number}" for number in (1, 2, 3, 4))


def _name(row: Mapping[str, Any]) -> str:
    return row["task"] if row["metric"] == "accuracy" else f"{row['metric'].replace('_', ' ')} of {row['task']}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _against(row: Mapping[str, Any], other: str, key: str) -> str:
    """`count 0.380 (dense 0.530, -0.150 [-0.210, -0.090])`."""
    d = row[key]
    return (
        f"{_name(row)} {_number(row['value'])} ({other} {_number(row['value'] - d['difference'])}, "
        f"{d['difference']:+.3f} [{d['ci_low']:+.3f}, {d['ci_high']:+.3f}])"
    )


def in_words(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A few sentences for each length and operating point of dms."""
    rows = [row for row in rows if row["task"] not in _PARTS and row["suite"] != "scaling"]
    several = len({row["evict_bias"] for row in rows if row["policy"] == "dms"}) > 1
    told = []
    for length, bias in dict.fromkeys((row["length"], row["evict_bias"]) for row in rows if row["policy"] == "dms"):
        here = [row for row in rows if row["length"] == length and row["evict_bias"] == bias]
        dms = [row for row in here if row["policy"] == "dms"]
        told += [_heading(dms, length, bias if several else None), *_beside_dense(dms), *_beside_others(here, dms)]
    return told


def _heading(dms: list[Mapping[str, Any]], length: int | None, bias: float | None) -> str:
    """length: None for rows of lm-evaluation-harness, whose texts have many."""
    first = dms[0]
    place = "In lm-evaluation-harness" if length is None else f"At {length} tokens"
    point = f" at evict_bias {bias:+g}" if bias is not None else ""
    ratios = [row["cr"] for row in dms]
    spread = f"{min(ratios):.2f}" if max(ratios) - min(ratios) < 0.01 else f"{min(ratios):.2f} to {max(ratios):.2f}"
    beyond = ", beyond the length that its gates were trained at" if BEYOND_TRAINING in first["marks"] else ""
    return f"{place}{point}, dms holds 1/{spread} of the entries{beyond}."


def _beside_dense(dms: list[Mapping[str, Any]]) -> list[str]:
    """Figures that are distances from dense are no comparison: they are told as they are."""
    told, unable = [], [row for row in dms if DENSE_AT_CHANCE in row["marks"]]
    compared = [row for row in dms if row["vs_dense"] and row not in unable]
    for verdict, words in (("worse", "It loses to dense in"), ("better", "It is better than dense in")):
        found = [_against(row, "dense", "vs_dense") for row in compared if row["vs_dense"]["verdict"] == verdict]
        if found:
            told.append(f"{words} {'; '.join(found)}.")
    ties = [_name(row) for row in compared if row["vs_dense"]["verdict"] == "not different"]
    if ties:
        told.append(f"It is not different from dense in {', '.join(ties)}.")
    distances = [f"{_name(row)} {_number(row['value'])}" for row in dms if row["vs_dense"] is None]
    if distances:
        told.append(f"Its distance from dense: {', '.join(distances)}.")
    if unable:
        told.append(f"Dense itself is at chance in {', '.join(_name(row) for row in unable)}: nothing is shown there.")
    return told


def _beside_others(here: list[Mapping[str, Any]], dms: list[Mapping[str, Any]]) -> list[str]:
    told, wins, ties, num_compared = [], [], [], 0
    for own in dms:
        if DENSE_AT_CHANCE in own["marks"]:
            continue
        others = [row for row in here if row["vs_dms"] and (row["task"], row["metric"]) == (own["task"], own["metric"])]
        if not others:
            continue
        num_compared += 1
        ahead = [row for row in others if row["vs_dms"]["verdict"] == "better"]
        if ahead:
            by = ", ".join(f"{row['policy']} {_number(row['value'])}" for row in ahead)
            told.append(f"At the same budget it loses in {_name(own)} {_number(own['value'])} to {by}.")
        level = [row["policy"] for row in others if row["vs_dms"]["verdict"] == "not different"]
        if level:
            ties.append(f"{_name(own)} ({', '.join(level)})")
        if not ahead and not level:
            wins.append(_name(own))
    if ties:
        told.append(f"At the same budget it is not told apart in {'; '.join(ties)}.")
    if wins:
        told.append(f"At the same budget it is better than every other policy in {', '.join(wins)}: {len(wins)} of {num_compared} figures.")
    return told

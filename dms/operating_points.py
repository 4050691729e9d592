"""What one model gives at several biases: how they are named, tabled, and written into its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dms.card_sections import join_card, set_section, split_card

SECTION = "Operating points"


def policy_label(policy: str, evict_bias: float | None) -> str:
    """A policy's name among several biases: "dms +1"; short, for the table has nine columns more."""
    return policy if evict_bias is None else f"{policy} {evict_bias:+g}" if evict_bias else f"{policy} 0"


def write_points(folder: str | Path, points: Sequence[Mapping[str, Any]], *, length: int) -> Path:
    """Put the measured points into `folder`/README.md, in place of those that stand there; the rest of the card stays.

    points: policy, evict_bias (None where it has no meaning), and the figures bits_per_byte, recall, cr_decided, cr, memory.
    length: tokens of a document.
    """
    path = Path(folder) / "README.md"
    fields, body = split_card(path.read_text(encoding="utf-8")) if path.is_file() else ({}, "")
    header = ("policy", "evict_bias", "cr_decided", "cr", "bits per byte", "recall")
    rows = [
        (
            point["policy"],
            _cell(point["evict_bias"], "g"),
            _cell(point["cr_decided"], ".2f"),
            _cell(point["cr"], ".2f"),
            _cell(point["bits_per_byte"], ".4f"),
            _cell(point["recall"], ".4f"),
        )
        for point in points
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows))
    # What evicts nothing says nothing of what evicting does to memory.
    memory = sorted({point["memory"] for point in points if point["policy"] != "dense"})
    text = (
        f"`evict_bias` is added to every gate's logit; 0 is what was trained. Measured at {length} tokens a document"
        f"{'; memory: ' + ', '.join(memory) if memory else ''}. "
        f"A sliding window stands below the point whose budget it has.\n\n{table}"
    )
    body = set_section(body, SECTION, text, before=("Where it loses", "How it was trained", "How to load it"))
    path.write_text(join_card(fields, body), encoding="utf-8")
    return path


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

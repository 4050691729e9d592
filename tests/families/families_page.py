"""docs/families.md from the committed rows: counts, what reasons mean, and a line for each family and setting."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from sweep import HERE, ROOT, read_rows

PAGE = ROOT / "docs" / "families.md"
STATUSES = ("right", "refused", "not run", "WRONG")
# What reasons of refusals mean, by a part of them; the first that fits.
MEANINGS = (
    ("encoder-decoder", "its decoder reads what an encoder made of the text, and gates are for decoders that read the text themselves"),
    ("computes attention by itself", "its modelling file does not call transformers' attention interface, where eviction acts"),
    (
        "makes of them, in each pass anew",
        "what it caches is not what it attends to: a compressed latent, or heads repeated after the cache",
    ),
    (
        "does not read text alone",
        "it needs images, sound or another model's states as well, or fails on text; each row below has its words",
    ),
    ("attends both ways", "its tokens see later ones; nothing may be evicted before all is read"),
    (
        "no layer has full attention",
        "all its caches are bounded already or hold another mixer's state, or its layers choose keys by themselves",
    ),
    ("calls attention", "each of these calls would need decisions of its own"),
    ("adds something of its own", "attention with evictions would leave out what the layer adds to its scores"),
    ("has keys of", "a page of the cache holds keys and values of one width"),
    ("keeps no keys and values", "an encoder, or a cache of a kind of its own"),
    ("attention modules have layer_idx", "two layers share one place of the cache"),
    ("has no layer_idx", "where its keys and values lie in a cache is not known"),
    ("its own decoder has no attention layers", "those that it has belong to models within it, none of which reads the whole text"),
    ("decoder has no attention layers", "a state space, a recurrence, or attention that does not follow transformers' layout"),
)

_HEAD = """# Families

<!-- Written by `scripts/sweep_families.sh --accept`, from tests/families/rows-*.jsonl. -->

"Any decoder family" is a program. The sweep takes every class that transformers registers for causal language modelling and for images
and text, makes a tiny random model of its default configuration, and of unusual settings where the family has them, and compares two ways
of computing the same:

- gates closed = the dense model: in one pass, token by token, in the turns of a conversation, with padding on either side, in `train` and `evict`;
- dense mode = the model before `retrofit`, bit for bit, also after passes in the other modes;
- evicting about half of the tokens, through the compacted cache = the masked reference without a cache, which differs from the dense model;
- `generate` = greedy decoding by whole passes;
- a batch padded on the left or on the right = its sequences alone;
- a training pass gives every gate a gradient; a model folder loads as the same model, with equal logits and tokens.

A family is **right** (all of it holds), **refused** at `retrofit` with the reason, or **not run** (transformers' own dense model cannot be built or
does not read text alone, with its error). What the dense model itself does not do, such as reading a conversation in turns, is not asked of the
retrofitted one; the last column says so. **WRONG** is a fault, and fails the run.

<!-- runs in: .github/workflows/families.yml -->
```bash
scripts/sweep_families.sh                             # all, on the installed transformers; minutes on two cores
scripts/sweep_families.sh '^qwen3'                    # those whose MODEL_TYPE:CLASS:SETTING fits a pattern
scripts/sweep_families.sh --transformers 5.17.0       # on another release, put beside the environment
```

A run that differs from this table in status, layers or reason fails and lists what differs; `--accept` writes the run's rows into the table.
"""


def short(reason: str) -> str:
    """A refusal without what is the same in all of them."""
    return re.sub(r"^\w+ cannot be retrofitted: ", "", reason).split("; what works is")[0]


def kind(reason: str) -> str:
    """What refusals of one kind have in common."""
    text = re.sub(r"^\S+ \(\w+\) ", "", short(reason))
    text = re.sub(r"(, and those)? such as .*$", "", re.sub(r"\d+", "N", text)).removesuffix(",")
    return re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)$", "", text)


def meaning(reason: str) -> str | None:
    """What refusals of a kind mean."""
    return next((words for part, words in MEANINGS if part in reason), None)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def committed() -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by version, the newest first."""
    files = {path.stem.removeprefix("rows-"): path for path in HERE.glob("rows-*.jsonl")}
    return {version: read_rows(files[version]) for version in sorted(files, key=version_key, reverse=True)}


def make_page(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [_HEAD, "## Counts", ""]
    lines += ["| transformers | classes | settings | " + " | ".join(STATUSES) + " |", "|---|" + "---|" * (2 + len(STATUSES))]
    for version, rows in tables.items():
        counts = Counter(row["status"] for row in rows.values())
        classes = len({row["class"] for row in rows.values()})
        lines.append(f"| {version} | {classes} | {len(rows)} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |")
    newest = next(iter(tables.values()))
    refused = Counter(kind(row["reason"]) for row in newest.values() if row["status"] == "refused")
    lines += [
        "",
        "## Why models are refused",
        "",
        "Numbers of settings, on the newest of these releases.",
        "",
        "| reason | settings | what it means |",
    ]
    lines.append("|---|---|---|")
    for reason, number in sorted(refused.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"| {_cell(reason)} | {number} | {meaning(reason) or ''} |")
    lines += [
        "",
        "## All families",
        "",
        "Gated layers are those of the tiny model, of all its layers; the others keep the cache that they have.",
        "",
    ]
    lines += ["| model type | class | setting | " + " | ".join(tables) + " | why, and what was not compared |"]
    lines.append("|---|---|---|" + "---|" * len(tables) + "---|")
    for case in sorted({case for rows in tables.values() for case in rows}):
        found = {version: rows.get(case) for version, rows in tables.items()}
        first = next(row for row in found.values() if row is not None)
        cells = [_status(row) for row in found.values()]
        lines.append("| " + " | ".join([f"`{first['model_type']}`", f"`{first['class']}`", first["variant"], *cells, _why(first)]) + " |")
    return "\n".join(lines) + "\n"


def _status(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"right, {row['gated']}/{row['layers']}" if row["status"] == "right" else row["status"]


def _why(row: dict[str, Any]) -> str:
    skipped = [f"{number} × {reason}" for reason, number in row["skipped"].items()]
    return _cell("; ".join(part for part in (short(row["reason"]), *skipped, *row["notes"]) if part))


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text.replace("`", "'")).replace("\n", " ")


def write_page(path: Path = PAGE) -> None:
    path.write_text(make_page(committed()), encoding="utf-8")

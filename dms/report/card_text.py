"""A model card as text: front matter, sections, tables, and the parts that several cards share. What is unknown is left out."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dms.io.gguf_file import GGUF, HUB_ID
from dms.report.evidence import TrainingFacts

PAPER = "[arXiv 2506.05345](https://arxiv.org/abs/2506.05345)"
CARD_FILE = "README.md"

ORIGIN, RESULTS, EVALUATION, LOSSES, TRAINING, LOADING, LIMITS, CHECKS = (
    "Where it is from",
    "What was measured",
    "Evaluation",
    "Where it loses",
    "How it was trained",
    "How to load it",
    "Intended use and limits",
    "What this card rests on",
)
"""Titles of sections, in the order in which they stand."""


@dataclass
class Card:
    """A model folder's README.md, of which single parts can be replaced."""

    fields: dict[str, Any]
    """The front matter; a field that is None is not written."""
    body: str
    """What follows the front matter."""

    @classmethod
    def parse(cls, text: str) -> "Card":
        import yaml

        match = re.match(r"---\n(.*?)\n---\n", text, re.S)
        if match is None:
            return cls({}, text)
        return cls(yaml.safe_load(match[1]) or {}, text[match.end() :])

    @classmethod
    def read(cls, path: Path) -> "Card":
        """An empty card where there is no such file."""
        return cls.parse(path.read_text(encoding="utf-8")) if path.is_file() else cls({}, "")

    def to_text(self) -> str:
        import yaml

        known = {key: value for key, value in self.fields.items() if value is not None}
        front = f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n\n" if known else ""
        return front + self.body.strip("\n") + "\n"

    def write(self, folder: str | Path) -> Path:
        """Write `folder`/README.md and return its path."""
        path = Path(folder) / CARD_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_text(), encoding="utf-8")
        return path

    def set_section(self, title: str, content: str, before: tuple[str, ...] = ()) -> None:
        """Put `content` under `## title`: in place of what is there, else before the first section named in `before`, else last."""
        section = f"## {title}\n\n{content.strip()}\n"
        headings = {heading[1].strip(): heading.start() for heading in reversed(list(self._headings()))}
        if title in headings:
            begin = headings[title]
            end = min((start for start in headings.values() if start > begin), default=len(self.body))
        else:
            begin = end = min((headings[name] for name in before if name in headings), default=len(self.body))
        parts = (self.body[:begin].rstrip("\n"), section.rstrip("\n"), self.body[end:].strip("\n"))
        self.body = "\n\n".join(part for part in parts if part) + "\n"

    def has_section(self, title: str) -> bool:
        return any(heading[1].strip() == title for heading in self._headings())

    def _headings(self) -> Iterator[re.Match[str]]:
        """Headings of the second level, outside fenced code, where a line may begin with ## as well."""
        fences = [match.span() for match in re.finditer(r"^(```|~~~).*?^\1", self.body, re.S | re.M)]
        for match in re.finditer(r"^## (.+)$", self.body, re.M):
            if not any(begin <= match.start() < end for begin, end in fences):
                yield match


def new_card(fields: Mapping[str, Any], paragraphs: Sequence[str]) -> Card:
    """A card of these paragraphs; empty ones are left out."""
    return Card(dict(fields), "\n\n".join(paragraph.strip("\n") for paragraph in paragraphs if paragraph.strip()))


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    """A list of `name: value`, without the values that are None."""
    return bullets([f"{name}: {value}" for name, value in pairs if value is not None])


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_versions(versions: Mapping[str, str] | None) -> str | None:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items() if version is not None) or None


def public_name(base_name: str) -> str:
    """A base as a card names it. Of a path only the last part: the rest means nothing elsewhere, and may say too much."""
    is_path = base_name.startswith((".", "/", "~")) or base_name.count("/") > 1 or base_name.endswith(GGUF)
    return Path(base_name).name if is_path and hub_id(base_name) is None else base_name


def public_base(described: str) -> str:
    """A base with its hash, as gates' metadata and result rows describe it, named as in `public_name`."""
    name, bracket, rest = described.rpartition(" (")
    return f"{public_name(name)}{bracket}{rest}"


def public_sentence(other_base: str) -> str:
    """`ResultRow.other_base` with both bases named as in `public_name`."""
    trained_on, _, used_on = other_base.removeprefix("gates trained on ").partition(", used on ")
    return f"gates trained on {public_base(trained_on)}, used on {public_base(used_on)}"


def hub_id(base_name: str) -> str | None:
    """The base as front matter may name it, or None for a folder, a file or a built-in model. Of a GGUF file on the hub its repository."""
    name, colon, _ = base_name.partition(":") if base_name.endswith(GGUF) else (base_name, ":", "")
    return name if colon and HUB_ID.fullmatch(name) else None


def title(base_name: str) -> str:
    return f"# {public_name(base_name) or 'A model'}, retrofitted with Dynamic Memory Sparsification"


def introduction(base_name: str) -> str:
    """Title and first sentence of a card that was not written by the run that trained the model."""
    name = public_name(base_name) or "A model"
    return f"{title(base_name)}\n\n`{name}` with gates that learned which entries of the KV cache to evict: Dynamic Memory Sparsification (DMS), {PAPER}.\n"


def training_section(run: TrainingFacts, gates: Mapping[str, Any], data: str) -> str:
    """How a model was trained. gates: fields of `DMSConfig`; data: what it was trained on, in words; empty: unknown."""
    trainable = {"gates": "the gates alone; the base's weights are unchanged", "all": "all weights, gates included"}
    alignments = {"own": "a gate rules the token that it reads", "next": "a gate rules the token before the one that it reads"}
    directions = {0.0: "forward, KL(dense || dms)", 1.0: "reverse, KL(dms || dense)"}
    kept = "the adapters were merged into unpacked weights" if run.trainable == "gates+lora" else "its weights are packed here too"
    aligned, beta = run.alignment or gates.get("alignment"), run.beta
    fields = ", ".join(f"{key} {value}" for key, value in gates.items() if key not in ("alignment", "format_version") and value is not None)
    return facts(
        [
            ("data", data or None),
            ("base", f"packed as `{run.quantize}` for the training; {kept}" if run.quantize is not None else None),
            ("target compression ratio", f"{run.target_cr:g}" if run.target_cr is not None else None),
            ("steps", f"{run.steps:,}" if run.steps is not None else None),
            ("tokens", f"{run.tokens:,}" if run.tokens is not None else None),
            ("time", format_duration(run.training_seconds) if run.training_seconds is not None else None),
            ("device", run.device),
            ("trained", trainable.get(run.trainable, run.trainable) if run.trainable is not None else None),
            (
                "divergence from the dense model",
                None if beta is None else f"beta {beta:g}: {directions.get(beta, 'generalised Jensen-Shannon')}",
            ),
            ("alignment", None if aligned is None else f"`{aligned}`" + (f": {alignments[aligned]}" if aligned in alignments else "")),
            ("gates", fields or None),
            ("versions", format_versions(run.versions)),
        ]
    )


def limits_section(
    lengths: Sequence[int], memory: Collection[str | None], trained_length: int | None = None, context: int | None = None
) -> str:
    """Intended use and limits. lengths: those that were measured. memory: `ResultRow.memory` of what was measured."""
    lines = [
        "It is meant for what its base is meant for, with a smaller KV cache; the base's own limits apply.",
        "What is evicted cannot be recalled: a question about a detail that seemed unimportant may find it gone.",
    ]
    if lengths:
        lines.append(f"It was measured at {', '.join(map(str, lengths))} tokens; nothing is known here about longer documents.")
    if trained_length is not None:
        beyond = [length for length in lengths if length > trained_length]
        at = f"at {', '.join(map(str, beyond))} tokens it was measured beyond that" if beyond else "nothing was measured beyond that"
        lines.append(f"Its gates were trained at {trained_length} tokens; {at}.")
    if context is not None:
        lines.append(f"The base's context is {context} tokens.")
    if "masked" in memory:
        lines.append('"masked": evicted entries are hidden from attention but not freed yet, so the ratio is not a saving of memory.')
    if "compacted" in memory:
        lines.append('"compacted": evicted entries are really freed.')
    return bullets(lines)

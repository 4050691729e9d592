"""Change one part of a model card and leave the rest as it is: its front matter, or a section under `## Title`."""

import re
from collections.abc import Mapping
from typing import Any


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The fields of a card's front matter (none: empty), and what follows it."""
    import yaml

    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if match is None:
        return {}, text
    return yaml.safe_load(match[1]) or {}, text[match.end() :]


def join_card(fields: Mapping[str, Any], body: str) -> str:
    import yaml

    known = {key: value for key, value in fields.items() if value is not None}
    front = f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n\n" if known else ""
    return front + body.strip("\n") + "\n"


def set_section(body: str, title: str, content: str, before: tuple[str, ...] = ()) -> str:
    """Put `content` under `## title`: in place of what is there, else before the first section named in `before`, else last."""
    section = f"## {title}\n\n{content.strip()}\n"
    headings = {match[1].strip(): match.start() for match in reversed(list(_headings(body)))}
    if title in headings:
        begin = headings[title]
        end = min((start for start in headings.values() if start > begin), default=len(body))
    else:
        begin = end = min((headings[name] for name in before if name in headings), default=len(body))
    parts = (body[:begin].rstrip("\n"), section.rstrip("\n"), body[end:].strip("\n"))
    return "\n\n".join(part for part in parts if part) + "\n"


def has_section(body: str, title: str) -> bool:
    return any(match[1].strip() == title for match in _headings(body))


def _headings(body: str):
    """Headings of the second level, outside fenced code, where a line may begin with ## as well."""
    fences = [match.span() for match in re.finditer(r"^(```|~~~).*?^\1", body, re.S | re.M)]
    for match in re.finditer(r"^## (.+)$", body, re.M):
        if not any(begin <= match.start() < end for begin, end in fences):
            yield match

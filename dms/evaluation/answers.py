r"""Which answer a text gives, and whether two answers are the same: regular expressions, and numbers compared as numbers."""

import re
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?<![\w.])-?\$?{_DIGITS}(?:\.\d+)?(?:/\d+)?")
_WHOLE_NUMBER = re.compile(rf"(-?)\$?(-?)({_DIGITS}(?:\.\d+)?|\.\d+)(?: ?/ ?(\d+))?")
_BOXED = "\\boxed{"


@dataclass(frozen=True)
class AnswerRule:
    r"""pattern: a regular expression, whose group 1 (without groups: the whole match) is the answer. first: of several matches the
    first, else the last. pattern None: the last \boxed{...}, or where there is none the last number."""

    pattern: str | None = None
    first: bool = False

    def __post_init__(self) -> None:
        try:
            groups = 0 if self.pattern is None else re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"answer pattern {self.pattern!r} is no regular expression: {error}") from error
        if groups > 1:
            raise ValueError(f"answer pattern {self.pattern!r} has {groups} groups; the answer is one, write the others as (?:...)")

    def extract(self, text: str) -> str | None:
        """The answer in its canonical form; None: the text gives none."""
        if self.pattern is None:
            given = _last_boxed(text)
            found = [match.group() for match in _NUMBER.finditer(text)] if given is None else [given]
        else:
            found = [match.group(match.re.groups) for match in re.finditer(self.pattern, text)]
        found = [given for given in found if given is not None]
        return (canonical(found[0 if self.first else -1]) or None) if found else None


def canonical(answer: str | int | float) -> str:
    """The same string for equal answers: 1,234 and $1234.00 are 1234; 0.5 and 2/4 are 1/2; words lose case, spaces and a last period."""
    text = re.sub(r"\s+", " ", str(answer)).strip().strip("$").removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    number = _WHOLE_NUMBER.fullmatch(text)
    if number is None or (number[4] is not None and int(number[4]) == 0):
        return text.casefold()
    value = Fraction(number[3].replace(",", "")) / int(number[4] or 1)
    return str(-value if number[1] or number[2] else value)


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} that is closed, braces within included."""
    at = text.rfind(_BOXED)
    while at >= 0:
        depth = 1
        start = at + len(_BOXED)
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
        at = text.rfind(_BOXED, 0, at)
    return None

"""Problems with checkable answers, for sampled chains: a built-in one for any tokenizer, and any JSONL file.

The built-in problem is a chain of names of which each stands in its own record, at random places of running text:

    #: $amber-fox $dune-lark  ...  #: $dune-lark $iris-pond  ...  #: $iris-pond 317  ...  #? $amber-fox

The model answers by spelling the hops (`$dune-lark $iris-pond 317`); each is a draw that can go wrong, and leads elsewhere if it does.
"""

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

from dms.evaluation.data.names import VALUES, draw_names
from dms.evaluation.data.text_sources import StdlibText

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?<![\w.])-?\$?{_DIGITS}(?:\.\d+)?(?:/\d+)?")
_WHOLE_NUMBER = re.compile(rf"(-?)\$?(-?)({_DIGITS}(?:\.\d+)?|\.\d+)(?: ?/ ?(\d+))?")
_BOXED = "\\boxed{"


@dataclass(frozen=True)
class AnswerRule:
    """Which answer a text gives."""

    pattern: str | None = None
    r"""A regular expression, whose group 1 (without groups: the whole match) is the answer. None: the last \boxed{...}, or where there is
    none the last number."""
    first: bool = False
    """Of several matches the first, else the last."""

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


# Of the text that a chain has said, what a stop pattern is looked for in, in tokens.
STOP_TOKENS = 64
# A record that ends in a number stands in every so many tokens, as long as there are names, beside the chains': a guess among all
# numbers is rarely right.
_TOKENS_PER_RECORD = 64


@dataclass(frozen=True)
class Problem:
    """answer: in its canonical form."""

    input_ids: tuple[int, ...]
    answer: str


@dataclass(frozen=True)
class Problems:
    """Prompts with checkable answers, and how chains for them are read."""

    name: str
    """The rows' `task`."""
    problems: list[Problem]
    rule: AnswerRule
    """Which answer a chain gives."""
    stop: str | None = None
    """A regular expression that ends a chain, and whose match is no part of it; None: the end-of-sequence token alone does."""
    length: int | None = None
    """Tokens of each prompt; None: they differ."""
    chance: float = 0.0
    """How often a guess among what could be meant is right."""
    chat_template: bool = False
    """Whether the tokenizer's was applied."""


def make_chains(tokenizer: Any, *, num_problems: int, length: int, num_hops: int = 6, num_chains: int = 4, seed: int = 7) -> Problems:
    """`num_problems` prompts of exactly `length` tokens, with `num_chains` chains of which one is asked for. Names are those that training
    never uses, and the text is held out.

    Raises:
        ValueError: a count below 1, or chains that are longer than the prompt.
    """
    counts = {"num_problems": num_problems, "num_hops": num_hops, "num_chains": num_chains}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it is at least 1")
    text = StdlibText(held_out=True)
    made = [
        _make_chain(tokenizer, text, Random(f"scaling:{seed}:{length}:{number}"), length, num_hops, num_chains)
        for number in range(num_problems)
    ]
    # Hops are names, so the first number is the answer.
    return Problems(
        f"chain_{num_hops}",
        [problem for problem, _ in made],
        AnswerRule(r"\d+", first=True),
        stop=r"(?<=\d)\D",
        length=length,
        chance=statistics.fmean(1.0 / num_numbers for _, num_numbers in made),
    )


def _make_chain(tokenizer: Any, text: StdlibText, rng: Random, length: int, num_hops: int, num_chains: int) -> tuple[Problem, int]:
    """And how many numbers its records end in."""
    lines = text.lines(rng, length * 8)
    whole = "".join(lines)
    names = [name for name in draw_names(rng, unseen=True) if f"${name}" not in whole]
    needed = num_chains * (num_hops + 1)
    if needed > len(names):
        raise ValueError(
            f"{num_chains} chains of {num_hops} hops need {needed} names, and there are {len(names)}; plant fewer or shorter ones"
        )
    num_records = min(length // _TOKENS_PER_RECORD, len(names) - needed)
    values = iter(rng.sample(VALUES, num_chains + num_records))
    chains = [[f"${names.pop()}" for _ in range(num_hops + 1)] + [str(next(values))] for _ in range(num_chains)]
    chains += [[f"${names.pop()}", str(next(values))] for _ in range(num_records)]
    records = [f"#: {a} {b}\n" for chain in chains for a, b in itertools.pairwise(chain)]

    (question,) = _encode(tokenizer, [f"#? {chains[0][0]}"])
    (newline,) = _encode(tokenizer, ["\n"])
    planted = [(rng.random(), tokens) for tokens in _encode(tokenizer, records)]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(bos) - len(question) - sum(len(tokens) for _, tokens in planted)
    if room < 0:
        raise ValueError(
            f"{num_chains} chains of {num_hops} hops take {length - room} tokens, more than the prompt's {length}; lengthen it"
        )
    taken = list(itertools.takewhile(lambda line: line[1] <= room, _running_total(_encode(tokenizer, lines))))
    gap = room - (taken[-1][1] if taken else 0)
    pieces = planted + [((i + 0.5) / len(taken), tokens) for i, (tokens, _) in enumerate(taken)]
    body = [token for _, tokens in sorted(pieces, key=lambda piece: piece[0]) for token in tokens]
    # Whole lines leave a gap; line ends fill it.
    problem = Problem((*bos, *(newline * gap)[:gap], *body, *question), canonical(chains[0][-1]))
    return problem, num_chains + num_records


def _running_total(pieces: list[list[int]]) -> list[tuple[list[int], int]]:
    return list(zip(pieces, itertools.accumulate(len(tokens) for tokens in pieces), strict=True))


def _encode(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    return tokenizer(pieces, add_special_tokens=False)["input_ids"]


def read_problems(
    path: str | Path,
    tokenizer: Any,
    *,
    answer_pattern: str | None = None,
    stop: Sequence[str] = (),
    limit: int | None = None,
    chat_template: bool | None = None,
) -> Problems:
    """A JSONL file of {"prompt": text} or {"messages": [{"role", "content"}, ...]}, each with an "answer".

    answer_pattern: as `AnswerRule.pattern`. stop: strings that end a chain. limit: the first so many problems (None: all).
    chat_template: give prompts as a user's message, too (None: messages alone are rendered).

    Raises:
        ValueError: a file that is not there or damaged, naming the line; or messages without a chat template.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"problems: {path} is no file; name a JSONL file with prompt (or messages) and answer in each line")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of problems is {limit}; it is at least 1")
    if isinstance(stop, str):
        raise ValueError(f"stop is the text {stop!r}; give a list of such texts")
    if any(not 1 <= len(text.encode()) <= STOP_TOKENS // 2 for text in stop):
        raise ValueError(f"stop strings are {list(stop)}; each has 1 to {STOP_TOKENS // 2} bytes of UTF-8")
    rule = AnswerRule(answer_pattern)
    problems: list[tuple[Problem, bool]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if len(problems) == limit:
                break
            if line.strip():
                problems.append(_read_line(line, f"{path}, line {number}", tokenizer, chat_template))
    if not problems:
        raise ValueError(f"problems: {path} is empty")
    pattern = "|".join(re.escape(text) for text in stop) or None
    templated = {templated for _, templated in problems}
    return Problems(path.stem, [problem for problem, _ in problems], rule, stop=pattern, chat_template=True in templated)


def _read_line(line: str, where: str, tokenizer: Any, chat_template: bool | None) -> tuple[Problem, bool]:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a {type(given).__name__}; a line is an object with prompt (or messages) and answer")
    if ("prompt" in given) == ("messages" in given):
        raise ValueError(f"{where}: give either prompt or messages; the fields are {', '.join(map(str, given)) or 'none'}")
    answer = given.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: answer is {answer!r}; give a text or a number that a chain's answer is compared with")
    if not canonical(answer) or "\n" in str(answer).strip():
        raise ValueError(f"{where}: answer is {answer!r}; give the answer alone, in one line")
    messages, prompt = given.get("messages"), given.get("prompt")
    if prompt is not None and not (isinstance(prompt, str) and prompt):
        raise ValueError(f"{where}: prompt is {prompt!r}; it is a text")
    if messages is None and chat_template:
        messages = [{"role": "user", "content": prompt}]
    if messages is None:
        return Problem(tuple(tokenizer(prompt)["input_ids"]), canonical(answer)), False
    if chat_template is False:
        raise ValueError(f"{where}: messages need the chat template, which was turned off; give prompt instead, or turn it on")
    return Problem(_render(messages, where, tokenizer), canonical(answer)), True


def _render(messages: Any, where: str, tokenizer: Any) -> tuple[int, ...]:
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise ValueError(f"{where}: messages are a list of objects with role and content, both texts")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"{where}: messages need a chat template, and the tokenizer has none; give prompt instead")
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error
    # The template writes the special tokens that it wants.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))

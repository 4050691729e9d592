"""Retrieval in real text: at the end of a document the beginning of one of its lines is quoted, and the answer is how it goes on.

    passage           a line's first tokens, which stand once in the document
    marked_passage    a line that carries a planted name, quoted after that name:   #? $glen-moss if not line

The answers hold words that stand nowhere else in the document, so that neither the language nor another place gives them away. Lines
are chosen by their tokens: a quote is token for token what stood in the line.
"""

import itertools
import re
from dataclasses import dataclass, replace
from random import Random

from dms.evaluation.data.document import EvaluationDocument, Frame, Text, Tokenizer, encode
from dms.evaluation.data.names import draw_names
from dms.evaluation.data.tasks import QUESTION, RECORD
from dms.evaluation.suites.layout import Part, Question, lay_out, room_for_parts

CHANCE = {"passage": 0.0, "marked_passage": 0.0}
INSTRUCTION = "Lines of the text above are quoted below, word for word; after #? each is called by the name that it carries above."

# A quote begins with this many tokens at least and at most, which stand once in the document.
_QUOTED = (5, 16)
_QUOTED_AFTER_NAME = 2
_ANSWER = (4, 6)
# Letters of words that stand nowhere else in the document, in each answer.
_RARE_LETTERS = 6
_WORD = re.compile(r"[^\W\d_]{3,}")
# About what a question takes of the document, the name in its line included.
_QUESTION_TOKENS = 20
_TRIALS = 16


def num_chars(length: int) -> int:
    """Characters of text that a document of `length` tokens is chosen from."""
    return 8 * length


def passages(tokenizer: Tokenizer, *, length: int, num_documents: int, seed: int, text: Text, frame: Frame) -> list[EvaluationDocument]:
    """Documents of running text with 2 to 8 questions each, both kinds alike, spread over the whole document.

    Raises:
        ValueError: too short a length, too little text, or too few lines that can be told apart.
    """
    num_questions = 2 * max(1, min(4, length // 256))
    least = len(frame.head) + len(frame.middle) + num_questions * 4 * _QUESTION_TOKENS
    if length < least:
        raise ValueError(f"passages need at least {least} tokens with this tokenizer, and the length is {length}; lengthen it")
    documents = []
    for number in range(num_documents):
        rng = Random(f"passages:{seed}:{length}:{number}")
        trials = (_try(tokenizer, text, rng, frame, length, num_questions) for _ in range(_TRIALS))
        document = next((document for document in trials if document is not None), None)
        if document is None:
            raise ValueError(
                f"in {_TRIALS} draws of {length} tokens of the text there were fewer than {num_questions} lines that begin in a way that "
                "stands once and go on with words that stand once; give text that repeats itself less, or change the length"
            )
        documents.append(document)
    return documents


@dataclass
class _Lines:
    """Lines that could stand in a document. bodies: their tokens without what the line end takes part in; stripped: those of the text
    alone, after a space; whole: what all the tokens spell. marked: the numbers of those that carry a name."""

    texts: list[str]
    tokens: list[list[int]]
    bodies: list[list[int]]
    stripped: list[list[int]]
    whole: str
    marked: set[int]


def _try(tokenizer: Tokenizer, text: Text, rng: Random, frame: Frame, length: int, num_questions: int) -> EvaluationDocument | None:
    """None: this stretch of text has too few lines to ask for."""
    lines = _draw(tokenizer, text, rng, length)
    names = [name for name in draw_names(rng, unseen=True) if not any(f"${name}" in line for line in lines.texts)]
    near = length - len(frame.head) - len(frame.middle) - num_questions * _QUESTION_TOKENS
    chosen = _choose(tokenizer, lines, rng, near, num_questions)
    if chosen is None:
        return None
    record, asks, line_end = encode(tokenizer, [RECORD, QUESTION, "\n"])
    questions = []
    for order, (number, end) in enumerate(chosen):
        if order % 2:
            (name,) = encode(tokenizer, [f" ${names[order]}"])
            body = lines.stripped[number]
            lines.tokens[number] = record + name + body + line_end
            lines.marked.add(number)
            questions.append(Question("marked_passage", asks + name + body[:end], _answer(body, end), line_end, number))
        else:
            body = lines.bodies[number]
            questions.append(Question("passage", body[:end], _answer(body, end), line_end, number))
    first, parts = _window(lines, room_for_parts(frame, questions, length))
    # A line that the window cuts, or leaves out, cannot be asked for.
    if min(question.evidence for question in questions) <= first:
        return None
    questions = [replace(question, evidence=question.evidence - first) for question in questions]
    return lay_out(tokenizer, frame, parts, questions, length=length)


def _draw(tokenizer: Tokenizer, text: Text, rng: Random, length: int) -> _Lines:
    """The last lines of a stretch, a little more than `length` tokens."""
    texts = text.lines(rng, num_chars(length))
    tokens = encode(tokenizer, texts)
    total, first = 0, len(texts)
    while first and total < length:
        first -= 1
        total += len(tokens[first])
    if total < length:
        raise ValueError(f"the text has {total} tokens and each document takes {length}; give more text or a shorter length")
    texts, tokens = texts[first:], tokens[first:]
    alone = encode(tokenizer, [line.rstrip() for line in texts])
    bodies = [body[: _common(body, whole)] for body, whole in zip(alone, tokens, strict=True)]
    stripped = encode(tokenizer, [f" {line.strip()}" for line in texts])
    # As decoded, so that tokenizers that change text are compared with themselves.
    whole = tokenizer.decode([token for ids in tokens for token in ids])
    return _Lines(texts, tokens, bodies, stripped, whole, set())


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _choose(tokenizer: Tokenizer, lines: _Lines, rng: Random, num_tokens: int, count: int) -> list[tuple[int, int]] | None:
    """A line of each `count`-th of the last `num_tokens` tokens and how many tokens of it to quote, in random order; those at odd places
    will be marked. None: there are too few."""
    shares: list[list[int]] = [[] for _ in range(count)]
    behind = 0
    for number in range(len(lines.tokens) - 1, -1, -1):
        behind += len(lines.tokens[number])
        if behind <= num_tokens:
            shares[(behind - 1) * count // num_tokens].append(number)
    rng.shuffle(shares)
    chosen: list[tuple[int, int]] = []
    for place, share in enumerate(shares):
        rng.shuffle(share)
        # What a share lacks, another may have.
        elsewhere = (number for other in shares if other is not share for number in other)
        taken = {number for number, _ in chosen}
        ends = ((n, _quote_end(tokenizer, lines, n, place % 2 == 1)) for n in itertools.chain(share, elsewhere) if n not in taken)
        found = next(((number, end) for number, end in ends if end is not None), None)
        if found is None:
            return None
        chosen.append(found)
    return chosen


def _quote_end(tokenizer: Tokenizer, lines: _Lines, number: int, marked: bool) -> int | None:
    """How many tokens of a line to quote: unless it is marked, those that stand once in the document and one more. None: it cannot be
    asked for."""
    if marked:
        body = lines.stripped[number]
        return _QUOTED_AFTER_NAME if _is_telling(tokenizer, lines, body, _QUOTED_AFTER_NAME) else None
    body = lines.bodies[number]
    for end in range(_QUOTED[0], _QUOTED[1] + 1):
        if not _is_telling(tokenizer, lines, body, end):
            continue
        if lines.whole.count(tokenizer.decode(body[: end - 1]).strip()) == 1:
            return end
    return None


def _is_telling(tokenizer: Tokenizer, lines: _Lines, body: list[int], end: int) -> bool:
    """Whether enough follows the first `end` tokens, and cannot be known from elsewhere."""
    if len(body) < end + _ANSWER[0]:
        return False
    found = _WORD.findall(tokenizer.decode(_answer(body, end)))
    return sum(len(word) for word in found if lines.whole.count(word) == 1) >= _RARE_LETTERS


def _answer(body: list[int], start: int) -> list[int]:
    return body[start : start + _ANSWER[1]]


def _window(lines: _Lines, room: int) -> tuple[int, list[Part]]:
    """The last `room` tokens, of their first line the end: the number of that line, and the parts."""
    first, parts = len(lines.tokens), []
    while room:
        first -= 1
        kept = lines.tokens[first][-room:]
        # A line that is cut, or carries a name, is not scored as running text.
        plain = len(kept) == len(lines.tokens[first]) and first not in lines.marked
        parts.append(Part(kept, 0, len(lines.texts[first].encode())) if plain else Part(kept))
        room -= len(kept)
    return first, parts[::-1]

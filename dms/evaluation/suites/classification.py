"""Many labelled lines of real text, and questions about the labels. A line's class is its first word: in code, the kind of statement.

    classification    return x.name => cedar       which label has a new line?
    label_word        #: $amber-fox return x.name  which first word have the lines of a label? The line of the question: #? $amber-fox return

Labels are drawn for each document, so that they can only be read from it. The examples of a class stand together, after the grouped order
of LongICLBench (arXiv 2404.02060), so that what the questions need is spread over the whole document; each class is asked for once, so that
no question says another's answer. Documents of both kinds take turns.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from dms.evaluation.data.document import EvaluationDocument, Frame, Text, Tokenizer, encode
from dms.evaluation.data.names import draw_names
from dms.evaluation.data.tasks import QUESTION, RECORD
from dms.evaluation.suites.layout import Part, Question, lay_out, room_for_parts

NUM_CLASSES = 4
CHANCE = {"classification": 1 / NUM_CLASSES, "label_word": 1 / NUM_CLASSES}
INSTRUCTION = "Each line above has a label, which depends on its first word. The lines below are labelled in the same way, or give a label's first word."
# Lines of each class that a document must at least show.
_LEAST_EXAMPLES = 2
_LINE_CHARS = (8, 60)
_FIRST_WORD = re.compile(r"[^\W\d_]{2,}(?!\w)")
# Characters of text that are read for each token of the document, and at least: most lines are of other classes.
_CHARS_PER_TOKEN, _LEAST_CHARS = 60, 40_000
# Stretches of text that are tried for a document: some have one class too few, or too small a one.
_TRIALS = 8


class _TooFewLines(ValueError):
    """What this stretch of the text holds does not fill a document."""


def num_chars(length: int) -> int:
    """Characters of text that a document of `length` tokens is chosen from."""
    return max(_LEAST_CHARS, length * _CHARS_PER_TOKEN)


def classification(
    tokenizer: Tokenizer, *, length: int, num_documents: int, seed: int, text: Text, frame: Frame
) -> list[EvaluationDocument]:
    """Documents of labelled lines, as many as fit: of one task or the other.

    Raises:
        ValueError: too short a length, or a text without enough lines that begin with the same words.
    """
    makers = (_classify, _recall_words)
    return [
        _make(makers[number % 2], tokenizer, text, Random(f"classification:{seed}:{length}:{number}"), frame, length)
        for number in range(num_documents)
    ]


def _make(make: Callable[..., EvaluationDocument], *arguments: Any) -> EvaluationDocument:
    """The document of the first stretch of text that fills one."""
    failed: ValueError | None = None
    for _ in range(_TRIALS):
        try:
            return make(*arguments)
        except ValueError as error:
            failed = failed or error
            # Another kind of fault, or a given text that has no further stretch.
            if not isinstance(error, _TooFewLines):
                break
    assert failed is not None, "at least one stretch was tried"
    raise failed


def _classify(tokenizer: Tokenizer, text: Text, rng: Random, frame: Frame, length: int) -> EvaluationDocument:
    classes = _lines_by_class(text, rng, length)
    labels = dict(zip(classes, (name.split("-")[0] for name in draw_names(rng, unseen=True)), strict=False))
    (line_end,) = encode(tokenizer, ["\n"])
    questions = {}
    for word in _shuffled(classes, rng):
        line, answer = encode(tokenizer, [f"{classes[word].pop()} =>", f" {labels[word]}"])
        questions[word] = Question("classification", line, answer, line_end, 0)
    examples = {word: classes[word] for word in _shuffled(classes, rng)}
    return _finish(tokenizer, frame, examples, lambda word, line: [f"{line} =>", f" {labels[word]}", "\n"], questions, length)


def _recall_words(tokenizer: Tokenizer, text: Text, rng: Random, frame: Frame, length: int) -> EvaluationDocument:
    classes = _lines_by_class(text, rng, length)
    labels = dict(zip(classes, draw_names(rng, unseen=True), strict=False))
    (line_end,) = encode(tokenizer, ["\n"])
    questions = {}
    for word in _shuffled(classes, rng):
        asks, label, answer = encode(tokenizer, [QUESTION, f" ${labels[word]}", f" {word}"])
        questions[word] = Question("label_word", asks + label, answer, line_end, 0)
    examples = {word: classes[word] for word in _shuffled(classes, rng)}
    return _finish(tokenizer, frame, examples, lambda word, line: [RECORD, f" ${labels[word]}", f" {line}", "\n"], questions, length)


def _shuffled(classes: dict[str, list[str]], rng: Random) -> list[str]:
    return rng.sample(list(classes), len(classes))


def _lines_by_class(text: Text, rng: Random, length: int) -> dict[str, list[str]]:
    """Different lines in random order under their first words: those that most of them begin with."""
    lines = list(dict.fromkeys(line.strip() for line in text.lines(rng, num_chars(length))))
    rng.shuffle(lines)
    classes: dict[str, list[str]] = {}
    for line in lines:
        word = _FIRST_WORD.match(line)
        if word and _LINE_CHARS[0] <= len(line) <= _LINE_CHARS[1]:
            classes.setdefault(word[0], []).append(line)
    largest = sorted(classes, key=lambda word: (-len(classes[word]), word))[:NUM_CLASSES]
    # One to ask for.
    least = 1 + _LEAST_EXAMPLES
    if len(largest) < NUM_CLASSES or len(classes[largest[-1]]) < least:
        found = ", ".join(f"{word!r} {len(classes[word])}" for word in largest) or "none"
        raise _TooFewLines(
            f"classification needs {NUM_CLASSES} first words with at least {least} different lines of {_LINE_CHARS[0]} to {_LINE_CHARS[1]} "
            f"characters each, and {len(lines)} lines of the text have: {found}; give more text, or text in shorter lines"
        )
    return {word: classes[word] for word in largest}


def _finish(
    tokenizer: Tokenizer,
    frame: Frame,
    examples: dict[str, list[str]],
    spell: Callable[[str, str], list[str]],
    questions: dict[str, Question],
    length: int,
) -> EvaluationDocument:
    """A class after the other, each with as many tokens as fit into its share; a question needs the nearest example of its class.

    examples: the lines of each class. spell: the pieces of a class's line.
    """
    room = room_for_parts(frame, list(questions.values()), length)
    parts: list[Part] = []
    asked = dict(questions)
    for number, (word, lines) in enumerate(examples.items()):
        share, first = room // (len(examples) - number), len(parts)
        for line in lines:
            tokens = [token for piece in encode(tokenizer, spell(word, line)) for token in piece]
            if len(tokens) > share:
                break
            parts.append(Part(tokens))
            share -= len(tokens)
            room -= len(tokens)
        else:
            raise _TooFewLines(
                f"the text has {len(lines)} lines to label that begin with {word!r}, and {share} tokens of their part stay empty; "
                "give more text or a shorter length"
            )
        if len(parts) - first < _LEAST_EXAMPLES:
            raise ValueError(f"{length} tokens hold fewer than {_LEAST_EXAMPLES} labelled lines of each class; lengthen the documents")
        asked[word] = replace(questions[word], evidence=len(parts) - 1)
    return lay_out(tokenizer, frame, parts, list(asked.values()), length=length)

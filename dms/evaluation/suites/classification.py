"""Many labelled lines of real text, and questions about the labels. A line's class is its first word: in code, the kind of statement.

    classification    return x.name => cedar       which label has a new line?
    label_word        #: $amber-fox return x.name  which first word have the lines of a label? The line of the question: #? $amber-fox return

Labels are drawn for each document, so that they can only be read from it. Documents of both kinds take turns.
"""

import re
from collections.abc import Iterator
from random import Random

from dms.evaluation.document import Document, Frame, Text, Tokenizer, encode
from dms.evaluation.lexicon import draw_names
from dms.evaluation.suites.layout import Part, Question, lay_out, room_for_parts
from dms.evaluation.tasks import QUESTION, RECORD

NUM_CLASSES = 4
CHANCE = {"classification": 1 / NUM_CLASSES, "label_word": 1 / NUM_CLASSES}
INSTRUCTION = "Each line above has a label, which depends on its first word. The lines below are labelled in the same way, or give a label's first word."
_NUM_QUESTIONS = 8
# Lines of each class that a document must at least show.
_LEAST_EXAMPLES = 2
_LINE_CHARS = (8, 60)
_FIRST_WORD = re.compile(r"[^\W\d_]{2,}(?!\w)")
# Characters of text that are read for each token of the document, and at least: most lines are of other classes.
_CHARS_PER_TOKEN, _LEAST_CHARS = 60, 40_000


def classification(tokenizer: Tokenizer, *, length: int, num_documents: int, seed: int, text: Text, frame: Frame) -> list[Document]:
    """Documents of labelled lines, as many as fit: of one task or the other.

    Raises:
        ValueError: too short a length, or a text without enough lines that begin with the same words.
    """
    makers = (_classify, _recall_words)
    return [
        makers[number % 2](tokenizer, text, Random(f"classification:{seed}:{length}:{number}"), frame, length)
        for number in range(num_documents)
    ]


def _classify(tokenizer: Tokenizer, text: Text, rng: Random, frame: Frame, length: int) -> Document:
    classes = _lines_by_class(text, rng, length)
    labels = dict(zip(classes, (name.split("-")[0] for name in draw_names(rng, unseen=True)), strict=False))
    (line_end,) = encode(tokenizer, ["\n"])
    questions = []
    asked = [rng.choice(list(classes)) for _ in range(_NUM_QUESTIONS)]
    for word in asked:
        line, answer = encode(tokenizer, [f"{classes[word].pop()} =>", f" {labels[word]}"])
        questions.append(Question("classification", line, answer, line_end, 0))
    examples = ((word, [f"{line} =>", f" {labels[word]}", "\n"]) for word, line in _in_turns(classes, rng))
    return _finish(tokenizer, frame, examples, questions, asked, length)


def _recall_words(tokenizer: Tokenizer, text: Text, rng: Random, frame: Frame, length: int) -> Document:
    classes = _lines_by_class(text, rng, length)
    labels = dict(zip(classes, draw_names(rng, unseen=True), strict=False))
    (line_end,) = encode(tokenizer, ["\n"])
    asked = rng.sample(list(classes), NUM_CLASSES)
    questions = []
    for word in asked:
        asks, label, answer = encode(tokenizer, [QUESTION, f" ${labels[word]}", f" {word}"])
        questions.append(Question("label_word", asks + label, answer, line_end, 0))
    examples = ((word, [RECORD, f" ${labels[word]}", f" {line}", "\n"]) for word, line in _in_turns(classes, rng))
    return _finish(tokenizer, frame, examples, questions, asked, length)


def _lines_by_class(text: Text, rng: Random, length: int) -> dict[str, list[str]]:
    """Different lines in random order under their first words: those that most of them begin with."""
    lines = list(dict.fromkeys(line.strip() for line in text.lines(rng, max(_LEAST_CHARS, length * _CHARS_PER_TOKEN))))
    rng.shuffle(lines)
    classes: dict[str, list[str]] = {}
    for line in lines:
        word = _FIRST_WORD.match(line)
        if word and _LINE_CHARS[0] <= len(line) <= _LINE_CHARS[1]:
            classes.setdefault(word[0], []).append(line)
    largest = sorted(classes, key=lambda word: (-len(classes[word]), word))[:NUM_CLASSES]
    least = _NUM_QUESTIONS + _LEAST_EXAMPLES
    if len(largest) < NUM_CLASSES or len(classes[largest[-1]]) < least:
        found = ", ".join(f"{word!r} {len(classes[word])}" for word in largest) or "none"
        raise ValueError(
            f"classification needs {NUM_CLASSES} first words with at least {least} different lines of {_LINE_CHARS[0]} to {_LINE_CHARS[1]} "
            f"characters each, and {len(lines)} lines of the text have: {found}; give more text, or text in shorter lines"
        )
    return {word: classes[word] for word in largest}


def _in_turns(classes: dict[str, list[str]], rng: Random) -> Iterator[tuple[str, str]]:
    """A line of each class in random order, and again, until those of one run out."""
    while all(classes.values()):
        for word in rng.sample(list(classes), len(classes)):
            yield word, classes[word].pop()


def _finish(
    tokenizer: Tokenizer,
    frame: Frame,
    examples: Iterator[tuple[str, list[str]]],
    questions: list[Question],
    asked: list[str],
    length: int,
) -> Document:
    """Examples until the next does not fit; each question needs the nearest of its class."""
    room = room_for_parts(frame, questions, length)
    parts: list[Part] = []
    shown: dict[str, list[int]] = {}
    for word, pieces in examples:
        tokens = [token for piece in encode(tokenizer, pieces) for token in piece]
        if len(tokens) > room:
            break
        shown.setdefault(word, []).append(len(parts))
        parts.append(Part(tokens))
        room -= len(tokens)
    else:
        raise ValueError(
            f"the text has {len(parts)} lines to label, and {room} of {length} tokens stay empty; give more text or a shorter length"
        )
    if min(len(shown.get(word, [])) for word in asked) < _LEAST_EXAMPLES:
        raise ValueError(f"{length} tokens hold fewer than {_LEAST_EXAMPLES} labelled lines of each class; lengthen the documents")
    questions = [
        Question(question.task, question.asked, question.answer, question.after, shown[word][-1])
        for question, word in zip(questions, asked, strict=True)
    ]
    return lay_out(tokenizer, frame, parts, questions, length=length)

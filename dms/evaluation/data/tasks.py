"""Documents with planted questions: seeded, for any tokenizer and length.

A document is running text with records planted at line borders, and questions whose answers stand in the records:

    #: $amber-fox 317                    a record: one name, one value          single, multi_key
    #: $cedar-owl 301 122                one name, several values               multi_value
    #? $amber-fox 317 $lime-reef 208     several names asked in one line        multi_query
    #: $dune-lark $amber-fox             a link; the answer spells the hops     chain_1 .. chain_3
    #: $glen-moss if not line:           a name and a piece of code             copy
    #+ $hawk-sand                        an event; the answer is their number   count
    #- $iris-pond 288                    looks like a record, never asked for

Names that occur in the surrounding text are not used, each name is asked for once, and the answer always follows its records,
so that every question has one answer. Used by pre-training, by the retrofit's evaluation and by `dms evaluate`.
"""

import itertools
import math
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from dms.evaluation.data.document import Answer, EvaluationDocument, Frame, Text, Tokenizer, encode, padding, plain_frame
from dms.evaluation.data.names import VALUES, draw_names

RECALL_TASKS = ("single", "multi_key", "multi_value", "multi_query")
CHAIN_TASKS = ("chain_1", "chain_2", "chain_3")
TASKS = (*RECALL_TASKS, *CHAIN_TASKS, "copy", "count")

RECORD, QUESTION, EVENT, DISTRACTOR = "#:", "#?", "#+", "#-"

# Records and text are placed below 1, questions at the end from 1 on.
_BEFORE_QUESTIONS = math.nextafter(1.0, 0.0)

# How often each kind is planted, when a document mixes them.
DEFAULT_MIX = {
    "multi_key": 8.0,
    "multi_value": 2.0,
    "multi_query": 2.0,
    "chain_1": 1.0,
    "chain_2": 0.5,
    "chain_3": 0.5,
    "copy": 1.0,
    "count": 0.5,
}


@dataclass
class _Item:
    """One planted thing: record lines, and one question line of (asked key, answer) pairs. `needs`: each pair's records."""

    task: str
    records: list[str]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    needs: list[list[int]] = field(default_factory=list)
    prefix: str = QUESTION


@dataclass
class _Block:
    """Consecutive tokens at a relative place of the document. `spans`: answers within; `record`: (item, number of its record)."""

    place: float
    tokens: list[int]
    role: list[int]
    item: int | None = None
    record: int | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)


def make_document(
    tokenizer: Tokenizer,
    text: Text,
    *,
    length: int,
    rng: Random,
    num_items: int,
    mix: dict[str, float] | None = None,
    questions: Literal["anywhere", "end"] = "anywhere",
    unseen_names: bool = False,
    strict: bool = True,
    frame: Frame | None = None,
) -> EvaluationDocument:
    """Plant up to `num_items` items in running text so that the document has exactly `length` tokens.

    mix: weight of each task (None: `DEFAULT_MIX`). questions: where they stand; "end" makes their distances uniform up to the
    whole document. unseen_names: use only names that training never uses; fewer items are planted where those run out.
    strict: refuse a draw of items that is longer than the document; otherwise leave out its last ones. frame: what stands around it
    (None: the tokenizer's first token); one with a middle needs questions at the end.

    Raises:
        ValueError: an unknown task, items that are longer than the document, or too little text to fill it.
    """
    frame = frame or plain_frame(tokenizer)
    assert questions == "end" or not frame.middle
    lines = text.lines(rng, length * 8)
    items, distractors = _choose_items(lines, rng, num_items, DEFAULT_MIX if mix is None else mix, unseen_names)
    (newline,) = encode(tokenizer, ["\n"])
    while True:
        blocks = _place_items(tokenizer, items, distractors, rng, questions, newline)
        room = length - len(frame.head) - len(frame.middle) - sum(len(block.tokens) for block in blocks)
        if room >= 0 or strict or not items:
            break
        items.pop()
    if room < 0:
        raise ValueError(
            f"{len(items)} planted items take {length - room} tokens, more than the document's {length}; plant fewer or lengthen it"
        )
    filler, num_bytes, gap = _fill(tokenizer, lines, room)
    if gap and len(filler) == len(lines):
        raise ValueError(f"the text has {len(lines)} lines, which leave {gap} of {length} tokens empty; give more text or a shorter length")
    blocks += filler
    # Whole lines leave a gap; line ends fill it and are not running text.
    head = frame.head + padding(tokenizer, gap)
    blocks.append(_Block(-1.0, head, [0] * min(1, len(frame.head)) + [1] * (len(head) - min(1, len(frame.head)))))
    blocks.append(_Block(_BEFORE_QUESTIONS, frame.middle, [1] * len(frame.middle)))
    blocks.sort(key=lambda block: block.place)
    return _join(blocks, items, num_bytes, length if questions == "anywhere" else None)


def _choose_items(
    lines: list[str], rng: Random, num_items: int, mix: dict[str, float], unseen_names: bool
) -> tuple[list[_Item], list[str]]:
    """Items with names that the text does not contain, and lines that nobody asks for, with names that no item uses."""
    whole = "".join(lines)
    names = [name for name in draw_names(rng, unseen_names) if f"${name}" not in whole]
    code = [line.strip() for line in lines if 8 <= len(line.strip()) <= 32] or ["pass  # nothing"]
    items: list[_Item] = []
    for _ in range(num_items):
        if len(names) < 8:
            break
        (task,) = rng.choices(list(mix), weights=list(mix.values()))
        items.append(_make_item(task, names, rng, rng.choice(code)))
    free = names[: max(2, num_items // 3)]
    return items, [f"{rng.choice((RECORD, DISTRACTOR))} ${name} {rng.choice(VALUES)}\n" for name in free]


def _make_item(task: str, names: list[str], rng: Random, code_line: str) -> _Item:
    """Build one item; `names` is consumed from its end."""
    if task in ("single", "multi_key", "multi_value", "copy"):
        key = names.pop()
        if task == "copy":
            value = f" {code_line}"
        else:
            values = rng.sample(VALUES, rng.randint(2, 3)) if task == "multi_value" else [rng.choice(VALUES)]
            value = "".join(f" {v}" for v in values)
        return _Item(task, [f"{RECORD} ${key}{value}\n"], [(f" ${key}", value)], [[0]])
    if task == "multi_query":
        pairs = [(f" ${names.pop()}", f" {rng.choice(VALUES)}") for _ in range(rng.randint(2, 3))]
        return _Item(task, [f"{RECORD}{key}{value}\n" for key, value in pairs], pairs, [[i] for i in range(len(pairs))])
    if task in CHAIN_TASKS:
        hops = int(task[-1])
        chain, end = [names.pop() for _ in range(hops + 1)], rng.choice(VALUES)
        records = [f"{RECORD} ${a} ${b}\n" for a, b in itertools.pairwise(chain)]
        records.append(f"{RECORD} ${chain[-1]} {end}\n")
        answer = "".join(f" ${name}" for name in chain[1:]) + f" {end}"
        return _Item(task, records, [(f" ${chain[0]}", answer)], [list(range(len(records)))])
    if task == "count":
        key, number = names.pop(), rng.randint(1, 6)
        events = [f"{EVENT} ${key}\n"] * number
        return _Item(task, events, [(f" ${key}", f" {number}")], [list(range(number))], prefix=QUESTION + EVENT)
    raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")


def _place_items(
    tokenizer: Tokenizer, items: list[_Item], distractors: list[str], rng: Random, questions: str, newline: list[int]
) -> list[_Block]:
    """Records anywhere, each question after its records. Every piece is tokenised by itself: spans are exact with any tokenizer."""
    pieces = [piece for item in items for piece in (*item.records, item.prefix, *(part for pair in item.pairs for part in pair))]
    encoded = iter(encode(tokenizer, pieces + distractors))
    blocks: list[_Block] = []
    for number, item in enumerate(items):
        places = [rng.random() for _ in item.records]
        for index, place in enumerate(places):
            tokens = next(encoded)
            blocks.append(_Block(place, tokens, [1] * len(tokens), number, index))
        question = _Block(1.0 + rng.random() if questions == "end" else rng.uniform(max(places), 1.0), next(encoded), [], number)
        question.role = [1] * len(question.tokens)
        for _ in item.pairs:
            for role, tokens in ((1, next(encoded)), (2, next(encoded))):
                if role == 2:
                    question.spans.append((len(question.tokens), len(question.tokens) + len(tokens)))
                question.tokens = question.tokens + tokens
                question.role += [role] * len(tokens)
        question.tokens = question.tokens + newline
        question.role += [1] * len(newline)
        blocks.append(question)
    for _ in distractors:
        tokens = next(encoded)
        blocks.append(_Block(rng.random(), tokens, [1] * len(tokens)))
    return blocks


def _fill(tokenizer: Tokenizer, lines: list[str], room: int) -> tuple[list[_Block], int, int]:
    """Whole lines of running text for at most `room` tokens: blocks, their bytes, and the tokens that are left."""
    taken: list[list[int]] = []
    num_bytes = 0
    for line, tokens in zip(lines, encode(tokenizer, lines), strict=True):
        if len(tokens) > room:
            break
        taken.append(tokens)
        room -= len(tokens)
        num_bytes += len(line.encode())
    return [_Block((i + 0.5) / len(taken), tokens, [0] * len(tokens)) for i, tokens in enumerate(taken)], num_bytes, room


def _join(blocks: list[_Block], items: list[_Item], num_bytes: int, prompt: int | None) -> EvaluationDocument:
    """prompt: None: the questions are at the end, and what stands before them is given."""
    input_ids: list[int] = []
    role: list[int] = []
    starts: dict[tuple[int, int], int] = {}
    asked: list[tuple[_Block, int, int]] = []
    for block in blocks:
        if block.item is not None and block.record is not None:
            starts[block.item, block.record] = len(input_ids)
        elif block.item is not None:
            asked.append((block, block.item, len(input_ids)))
        input_ids += block.tokens
        role += block.role
    answers = [
        Answer(items[item].task, at + start, at + end, min(starts[item, index] for index in needs))
        for block, item, at in asked
        for (start, end), needs in zip(block.spans, items[item].needs, strict=True)
    ]
    if prompt is None:
        prompt = sum(len(block.tokens) for block in blocks if block.place < 1.0)
    return EvaluationDocument(input_ids, role, answers, num_bytes, prompt)

"""Documents with planted questions: seeded, for any tokenizer and length.

A document is running text with records planted at line borders, and questions whose answers stand in the records:

    #: $amber 417                  a record: one key, one value           single, multi_key
    #: $cedar 301 122              one key, several values                multi_value
    #? $amber 417 $fern 208        several keys asked in one line         multi_query
    #: $dune $amber                a link; the answer spells the hops     chain_1 .. chain_3
    #: $glen if not line:          a key and a piece of code              copy
    #+ $hawk                       an event; the answer is their number   count
    #- $iris 288                   looks like a record, never asked for

Keys that occur in the surrounding text are not used, each key is asked for once, and the answer always follows its records,
so that every question has one answer. Used by pre-training, by the retrofit's evaluation and by `dms evaluate`.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

from dms.evaluation.lexicon import SEEN, UNSEEN, VALUES

RECALL_TASKS = ("single", "multi_key", "multi_value", "multi_query")
CHAIN_TASKS = ("chain_1", "chain_2", "chain_3")
TASKS = (*RECALL_TASKS, *CHAIN_TASKS, "copy", "count")

RECORD, QUESTION, EVENT, DISTRACTOR = "#:", "#?", "#+", "#-"

# How often each kind is planted, when a document mixes them.
DEFAULT_MIX = {"multi_key": 8.0, "multi_value": 2.0, "multi_query": 2.0, "chain_1": 1.0, "chain_2": 0.5, "chain_3": 0.5, "copy": 1.0, "count": 0.5}


class Tokenizer(Protocol):
    bos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict: ...


class Text(Protocol):
    def lines(self, rng: Random, num_chars: int) -> list[str]: ...


@dataclass(frozen=True)
class Answer:
    """Tokens `start..end-1` of the document answer a question; `evidence` is the first token of the furthest record needed."""

    task: str
    start: int
    end: int
    evidence: int


@dataclass(frozen=True)
class Document:
    """`role[i]`: 0 running text (and the first token), 1 planted and unpredictable, 2 answer. `num_bytes` of the running text."""

    input_ids: list[int]
    role: list[int]
    answers: list[Answer]
    num_bytes: int


@dataclass
class _Item:
    """One planted thing: its record lines, and one question line as (asked key text, answer text) pairs."""

    task: str
    records: list[str]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    # For each pair, which records its answer needs.
    needs: list[list[int]] = field(default_factory=list)
    prefix: str = QUESTION


def _make_item(task: str, keys: list[str], links: list[str], rng: Random, code_line: str) -> _Item:
    """Build one item; `keys` (asked for) and `links` (the further names of a chain) are consumed from their ends."""
    if task in ("single", "multi_key"):
        key, value = keys.pop(), rng.choice(VALUES)
        return _Item(task, [f"{RECORD} ${key} {value}"], [(f" ${key}", f" {value}")], [[0]])
    if task == "multi_value":
        key, values = keys.pop(), rng.sample(VALUES, rng.randint(2, 3))
        text = "".join(f" {value}" for value in values)
        return _Item(task, [f"{RECORD} ${key}{text}"], [(f" ${key}", text)], [[0]])
    if task == "multi_query":
        item = _Item(task, [])
        for index in range(rng.randint(2, 3)):
            key, value = keys.pop(), rng.choice(VALUES)
            item.records.append(f"{RECORD} ${key} {value}")
            item.pairs.append((f" ${key}", f" {value}"))
            item.needs.append([index])
        return item
    if task.startswith("chain_"):
        hops = int(task[-1])
        names, value = [keys.pop(), *(links.pop() for _ in range(hops))], rng.choice(VALUES)
        links = [f"{RECORD} ${a} ${b}" for a, b in zip(names, names[1:], strict=False)]
        records = [*links, f"{RECORD} ${names[-1]} {value}"]
        answer = "".join(f" ${name}" for name in names[1:]) + f" {value}"
        return _Item(task, records, [(f" ${names[0]}", answer)], [list(range(len(records)))])
    if task == "copy":
        key = keys.pop()
        return _Item(task, [f"{RECORD} ${key} {code_line}"], [(f" ${key}", f" {code_line}")], [[0]])
    if task == "count":
        key, number = keys.pop(), rng.randint(1, 6)
        return _Item(task, [f"{EVENT} ${key}"] * number, [(f" ${key}", f" {number}")], [list(range(number))], prefix=f"{QUESTION}{EVENT}")
    raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")


def make_document(
    tokenizer: Tokenizer,
    text: Text,
    *,
    length: int,
    rng: Random,
    num_items: int,
    mix: dict[str, float] | None = None,
    questions: Literal["anywhere", "end"] = "anywhere",
    unseen_keys: bool = False,
) -> Document:
    """Plant `num_items` items in running text so that the document has exactly `length` tokens.

    mix: weight of each task (None: `DEFAULT_MIX`). questions: where they stand; "end" makes their distances uniform up to the
    whole document. unseen_keys: ask only for keys that training never asks for. Raises ValueError where the items alone are
    longer than `length`.
    """
    mix = DEFAULT_MIX if mix is None else mix
    lines = text.lines(rng, length * 8)
    whole = "".join(lines)
    asked, never_asked = (UNSEEN, SEEN) if unseen_keys else (SEEN, UNSEEN)
    keys = [word for word in asked if f"${word}" not in whole]
    others = [word for word in never_asked if f"${word}" not in whole]
    rng.shuffle(keys)
    rng.shuffle(others)
    # The further names of a chain are always of those that training asks for.
    links = others if unseen_keys else keys
    code = [line.strip() for line in lines if 8 <= len(line.strip()) <= 32] or ["pass  # nothing"]

    items: list[_Item] = []
    for _ in range(num_items):
        if min(len(keys), len(links)) < 5:
            break
        (task,) = rng.choices(list(mix), weights=list(mix.values()))
        items.append(_make_item(task, keys, links, rng, rng.choice(code)))
    # Records and look-alikes that nobody asks for, with names that no item of this document uses.
    distractors = [
        f"{rng.choice((RECORD, DISTRACTOR))} ${word} {rng.choice(VALUES)}" for word in (others + keys)[: max(2, num_items // 3)]
    ]

    # Every piece is tokenised by itself: spans are exact with any tokenizer.
    pieces: list[str] = []
    for item in items:
        for record in item.records:
            pieces.append(record + "\n")
        pieces.append(item.prefix)
        for asked_text, answer in item.pairs:
            pieces += [asked_text, answer]
    pieces += [d + "\n" for d in distractors] + ["\n"]
    ids = iter(_encode(tokenizer, pieces))

    blocks: list[tuple[float, list[int], list[int], list[tuple[int, int]], tuple[int, list[int]] | None]] = []
    num_planted = 0
    for number, item in enumerate(items):
        places = [rng.random() for _ in item.records]
        record_ids = [next(ids) for _ in item.records]
        prefix = next(ids)
        question, role, spans = list(prefix), [1] * len(prefix), []
        for _ in item.pairs:
            key_ids, answer_ids = next(ids), next(ids)
            question += key_ids
            role += [1] * len(key_ids)
            spans.append((len(question), len(question) + len(answer_ids)))
            question += answer_ids
            role += [2] * len(answer_ids)
        at = 1.0 + rng.random() if questions == "end" else rng.uniform(max(places), 1.0)
        for index, (place, tokens) in enumerate(zip(places, record_ids, strict=True)):
            blocks.append((place, tokens, [1] * len(tokens), [], (number, [index])))
        blocks.append((at, question, role, spans, (number, [])))
        num_planted += sum(map(len, record_ids)) + len(question) + 1
    for _ in distractors:
        tokens = next(ids)
        blocks.append((rng.random(), tokens, [1] * len(tokens), [], None))
        num_planted += len(tokens)
    newline = next(ids)
    num_planted += (len(newline) - 1) * len(items)

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    num_filler = length - len(bos) - num_planted
    if num_filler < 0:
        raise ValueError(f"{num_items} planted items take {num_planted} tokens, more than the document's {length}; plant fewer or lengthen it")
    filler, num_bytes = [], 0
    used = 0
    for line, tokens in zip(lines, _encode(tokenizer, lines), strict=True):
        if used + len(tokens) > num_filler:
            break
        filler.append(tokens)
        used += len(tokens)
        num_bytes += len(line.encode())
    # The gap that whole lines leave is filled with line ends; they are not running text.
    gap = num_filler - used
    for index, tokens in enumerate(filler):
        blocks.append(((index + 0.5) / len(filler), tokens, [0] * len(tokens), [], None))
    blocks.sort(key=lambda block: block[0])

    input_ids, role = list(bos), [0] * len(bos)
    while gap >= len(newline) > 0:
        input_ids += newline
        role += [1] * len(newline)
        gap -= len(newline)
    input_ids += newline[:1] * gap
    role += [1] * gap
    starts: dict[tuple[int, int], int] = {}
    answers: list[Answer] = []
    asked_at: list[tuple[int, int, list[tuple[int, int]]]] = []
    for _, tokens, block_role, spans, owner in blocks:
        here = len(input_ids)
        if owner is not None and owner[1]:
            starts[owner[0], owner[1][0]] = here
        input_ids += tokens
        role += block_role
        if spans:
            asked_at.append((owner[0], here, spans))
            input_ids += newline
            role += [1] * len(newline)
    for number, here, spans in asked_at:
        item = items[number]
        for (start, end), needs in zip(spans, item.needs, strict=True):
            evidence = min(starts[number, index] for index in needs)
            answers.append(Answer(item.task, here + start, here + end, evidence))
    return Document(input_ids, role, answers, num_bytes)


def _encode(tokenizer: Tokenizer, pieces: list[str]) -> list[list[int]]:
    return tokenizer(pieces, add_special_tokens=False)["input_ids"]

"""What every evaluation document is made of, whatever it asks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Protocol


class Tokenizer(Protocol):
    bos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict: ...

    def decode(self, token_ids: list[int]) -> str: ...


class Text(Protocol):
    """lines: consecutive ones from a random place, `num_chars` characters of them where there are so many. texts: each whole text
    once, in random order."""

    def lines(self, rng: Random, num_chars: int) -> list[str]: ...

    def texts(self, rng: Random) -> Iterator[str]: ...


@dataclass(frozen=True)
class Answer:
    """Tokens `start..end-1` of the document answer a question; `evidence` is the first token of the furthest record needed."""

    task: str
    start: int
    end: int
    evidence: int


@dataclass(frozen=True)
class EvaluationDocument:
    """Tokens, what each is for, and the questions that are asked about them."""

    input_ids: list[int]
    role: list[int]
    """Of each token: 0 running text (and the first token), 1 planted and unpredictable, or not to be scored, 2 answer."""
    answers: list[Answer]
    num_bytes: int
    """Of the running text."""
    prompt: int = -1
    """Tokens that are given; those after it are decoded. Below 0: all are given."""

    def __post_init__(self) -> None:
        if self.prompt < 0:
            object.__setattr__(self, "prompt", len(self.input_ids))


@dataclass(frozen=True)
class Frame:
    """What stands around a document: `head` before it, `middle` between what is given and what is decoded."""

    head: list[int]
    middle: list[int] = field(default_factory=list)


def plain_frame(tokenizer: Tokenizer) -> Frame:
    """No more than the token that texts begin with, where the tokenizer has one."""
    return Frame([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])


def encode(tokenizer: Tokenizer, pieces: list[str]) -> list[list[int]]:
    """Each piece's tokens, without special ones."""
    return tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []


def padding(tokenizer: Tokenizer, count: int) -> list[int]:
    """`count` tokens that say nothing: line ends, or full stops where the tokenizer has no line ends."""
    line_end, full_stop = encode(tokenizer, ["\n", "."])
    return ((line_end or full_stop) * count)[:count]

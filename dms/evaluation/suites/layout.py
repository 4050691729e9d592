"""A document from parts that are given and questions that are decoded, of an exact length."""

from dataclasses import dataclass

from dms.evaluation.document import Answer, Document, Frame, Tokenizer, padding


@dataclass(frozen=True)
class Part:
    """Tokens that are given. role: that of all of them in the document; num_bytes: of running text."""

    tokens: list[int]
    role: int = 1
    num_bytes: int = 0


@dataclass(frozen=True)
class Question:
    """Tokens that ask, those that answer, and those that end the line. evidence: the number of the furthest part that it needs."""

    task: str
    asked: list[int]
    answer: list[int]
    after: list[int]
    evidence: int

    @property
    def num_tokens(self) -> int:
        return len(self.asked) + len(self.answer) + len(self.after)


def room_for_parts(frame: Frame, questions: list[Question], length: int) -> int:
    return length - len(frame.head) - len(frame.middle) - sum(question.num_tokens for question in questions)


def lay_out(tokenizer: Tokenizer, frame: Frame, parts: list[Part], questions: list[Question], *, length: int) -> Document:
    """Head, parts, middle, questions; line ends before the parts fill what they leave of `length`."""
    gap = room_for_parts(frame, questions, length) - sum(len(part.tokens) for part in parts)
    assert gap >= 0
    ids = frame.head + padding(tokenizer, gap)
    role = [1] * len(ids)
    starts = []
    for part in parts:
        starts.append(len(ids))
        ids += part.tokens
        role += [part.role] * len(part.tokens)
    ids += frame.middle
    role += [1] * len(frame.middle)
    prompt, answers = len(ids), []
    for question in questions:
        ids += question.asked
        answers.append(Answer(question.task, len(ids), len(ids) + len(question.answer), starts[question.evidence]))
        ids += question.answer + question.after
        role += [1] * len(question.asked) + [2] * len(question.answer) + [1] * len(question.after)
    return Document(ids, role, answers, sum(part.num_bytes for part in parts), prompt)

"""A document from parts that are given and questions that are decoded, of an exact length."""

from dataclasses import dataclass

from dms.evaluation.data.document import Answer, EvaluationDocument, Frame, Tokenizer, encode, padding


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


def lay_out(tokenizer: Tokenizer, frame: Frame, parts: list[Part], questions: list[Question], *, length: int) -> EvaluationDocument:
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
    return EvaluationDocument(ids, role, answers, sum(part.num_bytes for part in parts), prompt)


_USER, _ASSISTANT = "USER-TURN", "ASSISTANT-TURN"


def chat_frame(tokenizer, instruction: str) -> Frame:
    """The tokens of the chat template around a document; `instruction` ends the user's turn.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that is no frame around two turns.
    """
    name = getattr(tokenizer, "name_or_path", "") or "this model"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {name} has no chat template; evaluate without chat, or a model with one")
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    try:
        written = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:
        # A template raises what its author chose, jinja's errors and Python's own.
        raise ValueError(
            f"the chat template of {name} refuses two turns: {type(error).__name__}: {error}; evaluate without chat"
        ) from error
    if written.count(_USER) != 1 or written.count(_ASSISTANT) != 1 or written.index(_USER) > written.index(_ASSISTANT):
        raise ValueError(f"the chat template of {name} does not write each of two turns once and in order; evaluate without chat")
    before, after = written.split(_USER)
    head, middle = encode(tokenizer, [before, f"\n{instruction}{after.split(_ASSISTANT)[0]}"])
    return Frame(head, middle)

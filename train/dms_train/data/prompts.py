"""Prompts for the teacher to go on from: beginnings of documents, a column of prompts, or chats up to the last answer."""

from typing import Any

from pydantic import Field, model_validator

from dms_train.data.settings import Origin
from dms_train.data.tokenization import BadRow, Chats, Ids, Render, Rendered, everything, rendering, string_of


class Prompts(Origin):
    """As a source to train on; of chats all before the last answer, of other text its beginning."""

    tokens: int | None = Field(default=None, ge=1)
    """The prompt is the first so many tokens of a text; shorter texts are left out. None: the whole (not with builtin)."""

    @model_validator(mode="after")
    def _check(self):
        self.check_origin()
        self._refuse(("completion", "loss_on"), "in prompts: the completion is what is generated")
        if self.source == "builtin" and self.tokens is None:
            raise ValueError("prompts.tokens is missing: a built-in document has no end of its own; say how much of it is the prompt")
        if self.messages is not None and self.tokens is not None:
            raise ValueError("prompts.tokens has no effect beside prompts.messages; remove it")
        return self


def prompt_render(tokenizer: Any, prompts: Prompts, most: int) -> Render:
    """most: tokens that a prompt may have; longer ones are left out. Raises ValueError as `make_render`."""
    chosen = _ChatPrompts(tokenizer, prompts) if prompts.messages is not None else _TextPrompts(tokenizer, prompts)
    render = rendering(prompts, chosen)

    def each(rows: list) -> list[Rendered]:
        return [_fitting(made, prompts.tokens, most) for made in render(rows)]

    return each


def _fitting(made: Rendered, asked: int | None, most: int) -> Rendered:
    if made.left_out:
        return made
    if asked is not None and len(made.ids) < asked:
        return Rendered(made.where, left_out="shorter than prompts.tokens")
    ids = made.ids if asked is None else made.ids[:asked]
    return made._replace(ids=ids) if len(ids) <= most else Rendered(made.where, left_out="longer than the context leaves room for")


class _TextPrompts:
    def __init__(self, tokenizer: Any, prompts: Prompts):
        self.ids, self.column = Ids(tokenizer), prompts.prompt or prompts.field

    def text(self, values: dict[str, Any]) -> str:
        return string_of(values, self.column, "prompts")

    def write(self, rows: list[dict[str, Any]]) -> list[Rendered]:
        return [everything(ids) for ids in self.ids.begin([row[self.column] for row in rows])]


class _ChatPrompts(Chats):
    def write(self, rows: list[dict[str, Any]]) -> list[Rendered]:
        return [self._prompt(row) for row in rows]

    def _prompt(self, row: dict[str, Any]) -> Rendered:
        turns = self.turns(row)
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        # A chat that ends with a question is one as it stands.
        before = turns[: answers[-1]] if answers and answers[-1] == len(turns) - 1 else turns
        try:
            if not before:
                raise BadRow("begins with its only answer: there is no prompt")
            text = self.template(before, self.options(row), with_prompt=True)
        except BadRow as error:
            return Rendered("", left_out="bad", problem=str(error))
        return everything(self.tokenizer(text, add_special_tokens=False)["input_ids"])

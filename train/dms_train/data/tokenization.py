"""From a record to a document: its columns as tokens, and which predictions the loss counts.

The prediction at a token is that of the next one. T: tokens of the document.
"""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from dms.config import nearest
from dms.io.vocabulary import check_tokens
from dms_train.data.settings import Condition, Filter, Origin
from dms_train.data.shards import Record


class Rendered(NamedTuple):
    """A record as a document, or why it is none."""

    where: str
    """What messages call it."""
    ids: np.ndarray = np.zeros(0, np.int32)
    """[T] int32; none where it is left out."""
    counted: np.ndarray = np.zeros(0, bool)
    """[T]: whether the loss counts the prediction at the token."""
    left_out: str = ""
    """Why it is no document: filtered, empty, without_completions or bad; empty where it is one."""
    problem: str = ""
    """What is wrong with a bad one."""


class BadRecord(Exception):
    """A record that does not fit the recipe; the text goes on after its place: "FILE:3 has no text"."""


Render = Callable[[list[Record]], list[Rendered]]


def columns_of(origin: Origin) -> list[str]:
    """The columns that are read."""
    content = (
        [origin.messages, origin.tools] if origin.messages else [origin.prompt, origin.completion] if origin.prompt else [origin.field]
    )
    return list(dict.fromkeys([name for name in content if name is not None] + list(origin.filter.where)))


def make_render(tokenizer: Any, origin: Origin) -> Render:
    """Raises ValueError where the tokenizer cannot do what the source asks for."""
    if origin.messages is not None:
        return rendering(origin, Chats(tokenizer, origin))
    return rendering(origin, _Pairs(tokenizer, origin) if origin.prompt is not None else _Texts(tokenizer, origin))


def checking_tokens(render: Render, tokenizer: Any, num_embeddings: int) -> Render:
    """As `render`, and raise ValueError for tokens beyond the model's embedding. Such a record is not left out as bad: tokenizer and model
    do not fit."""

    def each(records: list[Record]) -> list[Rendered]:
        made = render(records)
        for rendered in made:
            if not rendered.left_out:
                check_tokens(rendered.ids.tolist(), tokenizer, num_embeddings, rendered.where)
        return made

    return each


class RecordFormat(Protocol):
    """How records of one kind become documents. Records are given as values by column."""

    def text(self, values: dict[str, Any]) -> str:
        """The whole text, for filters. Raises BadRecord."""

    def tokenize(self, records: list[dict[str, Any]]) -> list[Rendered]:
        """Those that passed the filters, without `where`."""


def rendering(origin: Origin, format: RecordFormat) -> Render:
    """Filter and tokenise: one Rendered for each record, in order."""

    def each(records: list[Record]) -> list[Rendered]:
        left_out = [_left_out(record, origin, format) for record in records]
        passing = [record.values or {} for record, left in zip(records, left_out, strict=True) if left is None]
        passed = iter(format.tokenize(passing))
        return [left or next(passed)._replace(where=record.where) for record, left in zip(records, left_out, strict=True)]

    return each


def _left_out(record: Record, origin: Origin, format: RecordFormat) -> Rendered | None:
    """Why a record is no document, or None."""
    if record.values is None:
        return Rendered(record.where, left_out="bad", problem=f"{record.where} {record.problem}")
    try:
        text = format.text(record.values)
        if not text.strip():
            return Rendered(record.where, left_out="empty")
        # JSON allows half of a surrogate pair, which no tokenizer reads.
        text.encode("utf-8")
        return None if passes(origin.filter, record.values, text) else Rendered(record.where, left_out="filtered")
    except UnicodeEncodeError as error:
        return Rendered(record.where, left_out="bad", problem=f"{record.where} is no Unicode text: {error}")
    except BadRecord as error:
        return Rendered(record.where, left_out="bad", problem=f"{record.where} {error}")


def passes(rules: Filter, values: dict[str, Any], text: str) -> bool:
    if rules.min_chars is not None and len(text) < rules.min_chars:
        return False
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return False
    if rules.matches is not None and re.search(rules.matches, text) is None:
        return False
    if rules.excludes is not None and re.search(rules.excludes, text) is not None:
        return False
    return all(_holds(condition, column, values) for column, condition in rules.where.items())


def _holds(condition: Condition, column: str, values: dict[str, Any]) -> bool:
    if column not in values:
        raise BadRecord(f"has no {column!r}, which data.filter.where asks for; it has: {', '.join(values)}")
    value = values[column]
    if value is None:
        return False
    if condition.eq is not None and value != condition.eq:
        return False
    if condition.ne is not None and value == condition.ne:
        return False
    if condition.one_of is not None and value not in condition.one_of:
        return False
    bounds = [bound for bound in (condition.lt, condition.le, condition.gt, condition.ge) if bound is not None]
    if bounds and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise BadRecord(f"has {value!r} under {column!r}, which data.filter.where compares with the number {bounds[0]:g}")
    return (
        (condition.lt is None or value < condition.lt)
        and (condition.le is None or value <= condition.le)
        and (condition.gt is None or value > condition.gt)
        and (condition.ge is None or value >= condition.ge)
    )


def string_of(values: dict[str, Any], column: str, setting: str) -> str:
    if not isinstance(values.get(column), str):
        raise BadRecord(f"has no text under {setting} {column!r}; it has: {', '.join(values)}")
    return values[column]


class Ids:
    """The tokenizer's special tokens around a text, once each whatever the text already holds."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id

    def begin(self, texts: list[str]) -> list[list[int]]:
        """Ids as the tokenizer makes them, without the end that some add; a text that spells the first special token out does not get
        it twice."""
        bos = self.tokenizer.bos_token
        spelled = [bool(bos) and text.startswith(bos) for text in texts]
        made: list[list[int]] = [[] for _ in texts]
        for with_bos in (False, True):
            places = [place for place, spells in enumerate(spelled) if spells == with_bos]
            if places:
                ids = self.tokenizer([texts[place] for place in places], add_special_tokens=not with_bos)["input_ids"]
                for place, found in zip(places, ids, strict=True):
                    ended = bool(found) and found[-1] == self.eos and not texts[place].endswith(self.tokenizer.eos_token or "")
                    made[place] = found[:-1] if ended and self.eos is not None else found
        return made

    def end(self, ids: list[int]) -> list[int]:
        return ids if self.eos is None or (ids and ids[-1] == self.eos) else [*ids, self.eos]


def everything(ids: list[int]) -> Rendered:
    """A document all of whose predictions the loss counts."""
    return Rendered("", np.asarray(ids, np.int32), np.ones(len(ids), bool))


class _Texts:
    """One column of text."""

    def __init__(self, tokenizer: Any, origin: Origin):
        self.ids, self.origin = Ids(tokenizer), origin

    def text(self, values: dict[str, Any]) -> str:
        return string_of(values, self.origin.field, "data.field")

    def tokenize(self, records: list[dict[str, Any]]) -> list[Rendered]:
        return [everything(self.ids.end(ids)) for ids in self.ids.begin([record[self.origin.field] for record in records])]


class _Pairs:
    """Prompt and completion, tokenised apart so that no token spans both."""

    def __init__(self, tokenizer: Any, origin: Origin):
        assert origin.prompt is not None and origin.completion is not None
        self.ids, self.loss_on = Ids(tokenizer), origin.loss_on
        self.prompt, self.completion = origin.prompt, origin.completion

    def text(self, values: dict[str, Any]) -> str:
        prompt = string_of(values, self.prompt, "data.prompt")
        completion = string_of(values, self.completion, "data.completion")
        return prompt + completion if completion else ""

    def tokenize(self, records: list[dict[str, Any]]) -> list[Rendered]:
        prompts = self.ids.begin([record[self.prompt] for record in records])
        texts = [record[self.completion] for record in records]
        completions = self.ids.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        made = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = self.ids.end([*prompt, *completion])
            rendered = everything(ids)
            if self.loss_on == "completions":
                rendered = rendered._replace(counted=predicting(len(ids), [(len(prompt), len(ids))]))
            made.append(rendered)
        return made


def predicting(length: int, spans: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens predict a token of the spans [start, end)."""
    counted = np.zeros(length, bool)
    for start, end in spans:
        counted[max(0, start - 1) : end - 1] = True
    return counted


class Chats:
    """Chats by the tokenizer's template. The assistant's tokens are those that the template marks ({% generation %}); where it marks
    none, those between the prompt before each of its turns and the turn's end."""

    def __init__(self, tokenizer: Any, origin: Origin):
        assert origin.messages is not None
        self.tokenizer, self.origin, self.column = tokenizer, origin, origin.messages
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise ValueError(
                f"data.messages: the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use a model with one, or data.prompt and data.completion"
            )
        self._check_options("\n".join(template.values()) if isinstance(template, dict) else template)
        self.is_marked = isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        if origin.loss_on == "completions":
            if not tokenizer.is_fast:
                raise ValueError("data.loss_on: completions needs a fast tokenizer, which gives the characters of each token")
            self._check_spans()

    def _check_options(self, template: str) -> None:
        """Raises ValueError for what the template does not use, and for what is no option of it."""
        arguments = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        if taken := [name for name in self.origin.template if name in arguments]:
            raise ValueError(f"data.template.{taken[0]} is no option of a chat template but what dms itself passes to it; remove it")
        used = set(re.findall(r"[^\W\d]\w*", " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.S))))
        given = {f"data.template.{name}": name for name in self.origin.template}
        for setting, name in (given | ({"data.tools": "tools"} if self.origin.tools else {})).items():
            if name not in used:
                raise ValueError(
                    f"{setting} has no effect: the chat template of {self.tokenizer.name_or_path!r} does not use {name!r}"
                    f"{nearest(name, used)}; remove it"
                )

    def _check_spans(self) -> None:
        """Raises ValueError where a plain chat's completions cannot be told from its prompts."""
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        try:
            self._spans(turns, self.origin.template)
        except BadRecord as error:
            raise ValueError(f"data.loss_on: completions cannot be used with this model: a chat {error}; use loss_on: all") from None

    def text(self, values: dict[str, Any]) -> str:
        return "\n".join(turn["content"] or "" for turn in self.turns(values))

    def turns(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        column = self.column
        turns = values.get(column)
        if not isinstance(turns, list) or not turns:
            raise BadRecord(f"has no list of messages under data.messages {column!r}; it has: {', '.join(values)}")
        for turn in turns:
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content", ""), str | None):
                raise BadRecord(f"has a message under {column!r} that is no {{role: text, content: text}}: {str(turn)[:80]}")
        return [{**turn, "content": turn.get("content")} for turn in turns]

    def options(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the template gets besides the messages. Raises BadRecord for tools that are not a list of JSON schemas."""
        column = self.origin.tools
        if column is None:
            return self.origin.template
        if column not in values:
            raise BadRecord(
                f"has no {column!r}, which data.tools names; it has: {', '.join(values)} (a record without tools has null there)"
            )
        tools = values[column]
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) if tools.strip() else None
            except ValueError as error:
                raise BadRecord(f"has a text under data.tools {column!r} that is not JSON: {error}") from None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise BadRecord(f"has no list of JSON schemas under data.tools {column!r}: {str(tools)[:80]}")
        return {**self.origin.template, "tools": tools or None}

    def tokenize(self, records: list[dict[str, Any]]) -> list[Rendered]:
        return [self._render(record) for record in records]

    def _render(self, record: dict[str, Any]) -> Rendered:
        try:
            turns, options = self.turns(record), self.options(record)
            if self.origin.loss_on == "all":
                return everything(self.tokenizer(self.template(turns, options), add_special_tokens=False)["input_ids"])
            ids, spans = self._spans(turns, options)
            if not spans:
                return Rendered("", left_out="without_completions")
            return Rendered("", np.asarray(ids, np.int32), predicting(len(ids), spans))
        except BadRecord as error:
            return Rendered("", left_out="bad", problem=str(error))

    def template(self, turns: list[dict[str, Any]], options: dict[str, Any], *, with_prompt: bool = False) -> str:
        """The text of a chat. with_prompt: with the beginning of an answer after it."""
        return self._apply(turns, tokenize=False, add_generation_prompt=with_prompt, **options)

    def _apply(self, turns: list[dict[str, Any]], **arguments: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(turns, **arguments)
        except Exception as error:
            # A template raises what its author chose, jinja's errors and Python's own.
            raise BadRecord(f"is refused by the chat template: {type(error).__name__}: {error}") from error

    def _spans(self, turns: list[dict[str, Any]], options: dict[str, Any]) -> tuple[list[int], list[tuple[int, int]]]:
        """The chat's ids, and the spans [start, end) of the assistant's tokens."""
        if self.is_marked:
            made = self._apply(turns, return_dict=True, return_assistant_tokens_mask=True, **options)
            edges = np.flatnonzero(np.diff([0, *made["assistant_masks"], 0]))
            return made["input_ids"], list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        whole = self.template(turns, options)
        made = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = (np.array(side) for side in zip(*made["offset_mapping"], strict=True))
        spans = []
        for start, end in self._assistant_characters(turns, options, whole):
            # The loss counts whole tokens; one on the border would be half the prompt's.
            if ((starts < start) & (ends > start)).any() or ((starts < end) & (ends > end)).any():
                raise BadRecord("has a token that is half an assistant's turn and half what the template writes around it")
            inside = np.flatnonzero((starts >= start) & (ends <= end) & (ends > starts))
            if len(inside):
                spans.append((int(inside[0]), int(inside[-1]) + 1))
        return made["input_ids"], spans

    def _assistant_characters(self, turns: list[dict[str, Any]], options: dict[str, Any], whole: str) -> list[tuple[int, int]]:
        """Characters of each assistant's turn: from the end of its prompt to where the chat without later turns ends."""
        found = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self.template(turns[:number], options, with_prompt=True)
            after = self.template(turns[: number + 1], options)
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRecord(
                    f"is written otherwise by the chat template once more turns follow (message {number + 1}), and the template "
                    "does not mark the assistant's text ({% generation %})"
                )
            found.append((len(before), len(after)))
        return found

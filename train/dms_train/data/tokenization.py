"""From a row to a document: which of its columns, as which tokens, and which of their predictions the loss counts.

The prediction made at a token is that of the next one. T: tokens of the document.
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
from dms_train.data.shards import Row


class Rendered(NamedTuple):
    """ids_T int32, counted_T bool. where: what messages call it. left_out: "", or why it is none: filtered,
    empty, without_completions or bad, with `problem`."""

    where: str
    ids: np.ndarray | None = None
    counted: np.ndarray | None = None
    left_out: str = ""
    problem: str = ""


class BadRow(Exception):
    """A row that is not as the recipe says."""


Render = Callable[[list[Row]], list[Rendered]]


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
    return rendering(origin, _Pairs(tokenizer, origin) if origin.prompt is not None else Texts(tokenizer, origin))


def with_rows(render: Render, tokenizer: Any, num_rows: int) -> Render:
    """Refuse tokens that an embedding of `num_rows` rows has none for. Such a row is not left out as a bad one: the model is at fault."""

    def each(rows: list[Row]) -> list[Rendered]:
        made = render(rows)
        for rendered in made:
            if not rendered.left_out:
                check_tokens(rendered.ids, tokenizer, num_rows, rendered.where)
        return made

    return each


class Writer(Protocol):
    """text(values): a row's text, for filters; raises BadRow. write(rows): what passed them."""

    def text(self, values: dict[str, Any]) -> str: ...

    def write(self, rows: list[dict[str, Any]]) -> list[Rendered]: ...


def rendering(origin: Origin, writer: Writer) -> Render:
    def each(rows: list[Row]) -> list[Rendered]:
        left_out = [_left_out(row, origin, writer) for row in rows]
        passed = iter(writer.write([row.values for row, left in zip(rows, left_out, strict=True) if left is None]))
        return [left or next(passed)._replace(where=row.where) for row, left in zip(rows, left_out, strict=True)]

    return each


def _left_out(row: Row, origin: Origin, writer: Writer) -> Rendered | None:
    """Why a row is no document; None if it is one."""
    if row.values is None:
        return Rendered(row.where, left_out="bad", problem=f"{row.where} {row.problem}")
    try:
        text = writer.text(row.values)
        if not text.strip():
            return Rendered(row.where, left_out="empty")
        # Half of a surrogate pair is legal in JSON and no tokenizer reads it.
        text.encode("utf-8")
        return None if passes(origin.filter, row.values, text) else Rendered(row.where, left_out="filtered")
    except UnicodeEncodeError as error:
        return Rendered(row.where, left_out="bad", problem=f"{row.where} is no Unicode text: {error}")
    except BadRow as error:
        return Rendered(row.where, left_out="bad", problem=f"{row.where} {error}")


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
        raise BadRow(f"has no {column!r}, which data.filter.where asks for; it has: {', '.join(values)}")
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
        raise BadRow(f"has {value!r} under {column!r}, which data.filter.where compares with the number {bounds[0]:g}")
    return (
        (condition.lt is None or value < condition.lt)
        and (condition.le is None or value <= condition.le)
        and (condition.gt is None or value > condition.gt)
        and (condition.ge is None or value >= condition.ge)
    )


def string_of(values: dict[str, Any], column: str, setting: str) -> str:
    if not isinstance(values.get(column), str):
        raise BadRow(f"has no text under {setting} {column!r}; it has: {', '.join(values)}")
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
    return Rendered("", np.asarray(ids, np.int32), np.ones(len(ids), bool))


class Texts:
    def __init__(self, tokenizer: Any, origin: Origin):
        self.ids, self.origin = Ids(tokenizer), origin

    def text(self, values: dict[str, Any]) -> str:
        return string_of(values, self.origin.field, "data.field")

    def write(self, rows: list[dict]) -> list[Rendered]:
        return [everything(self.ids.end(ids)) for ids in self.ids.begin([row[self.origin.field] for row in rows])]


class _Pairs:
    """Prompt and completion, tokenised apart, so that the border between them is a border of tokens."""

    def __init__(self, tokenizer: Any, origin: Origin):
        self.ids, self.origin = Ids(tokenizer), origin

    def text(self, values: dict[str, Any]) -> str:
        prompt = string_of(values, self.origin.prompt, "data.prompt")
        completion = string_of(values, self.origin.completion, "data.completion")
        return prompt + completion if completion else ""

    def write(self, rows: list[dict]) -> list[Rendered]:
        prompts = self.ids.begin([row[self.origin.prompt] for row in rows])
        texts = [row[self.origin.completion] for row in rows]
        completions = self.ids.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        made = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = self.ids.end([*prompt, *completion])
            rendered = everything(ids)
            if self.origin.loss_on == "completions":
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
    """Chats by the tokenizer's template; its own marks of what the assistant says, or else its prompts, tell the spans."""

    def __init__(self, tokenizer: Any, origin: Origin):
        self.tokenizer, self.origin = tokenizer, origin
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
                raise ValueError("data.loss_on: completions needs a fast tokenizer, which says where in the text its tokens stand")
            self._try_out()

    def _check_options(self, template: str) -> None:
        """Raises ValueError for what the template does not use, and for what is no option of it."""
        arguments = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        if taken := [name for name in self.origin.template if name in arguments]:
            raise ValueError(f"data.template.{taken[0]} is no option of a chat template but what dms itself gives to it; remove it")
        used = set(re.findall(r"[^\W\d]\w*", " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.S))))
        given = {f"data.template.{name}": name for name in self.origin.template}
        for setting, name in (given | ({"data.tools": "tools"} if self.origin.tools else {})).items():
            if name not in used:
                raise ValueError(
                    f"{setting} has no effect: the chat template of {self.tokenizer.name_or_path!r} does not use {name!r}"
                    f"{nearest(name, used)}; remove it"
                )

    def _try_out(self) -> None:
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        try:
            self._spans(turns, self.origin.template)
        except BadRow as error:
            raise ValueError(f"data.loss_on: completions cannot be used with this model: a chat {error}; use loss_on: all") from None

    def text(self, values: dict[str, Any]) -> str:
        return "\n".join(turn["content"] or "" for turn in self.turns(values))

    def turns(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        turns, column = values.get(self.origin.messages), self.origin.messages
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"has no list of messages under data.messages {column!r}; it has: {', '.join(values)}")
        for turn in turns:
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content", ""), str | None):
                raise BadRow(f"has a message under {column!r} that is no {{role: text, content: text}}: {str(turn)[:80]}")
        return [{**turn, "content": turn.get("content")} for turn in turns]

    def options(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the template gets of a row besides its messages. Raises BadRow for tools that are none."""
        column = self.origin.tools
        if column is None:
            return self.origin.template
        if column not in values:
            raise BadRow(f"has no {column!r}, which data.tools names; it has: {', '.join(values)} (a row without tools has null there)")
        tools = values[column]
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) if tools.strip() else None
            except ValueError as error:
                raise BadRow(f"has a text under data.tools {column!r} that is not JSON: {error}") from None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise BadRow(f"has no list of JSON schemas under data.tools {column!r}: {str(tools)[:80]}")
        return {**self.origin.template, "tools": tools or None}

    def write(self, rows: list[dict]) -> list[Rendered]:
        return [self._render(row) for row in rows]

    def _render(self, row: dict[str, Any]) -> Rendered:
        try:
            turns, options = self.turns(row), self.options(row)
            if self.origin.loss_on == "all":
                return everything(self.tokenizer(self.template(turns, options), add_special_tokens=False)["input_ids"])
            ids, spans = self._spans(turns, options)
            if not spans:
                return Rendered("", left_out="without_completions")
            return Rendered("", np.asarray(ids, np.int32), predicting(len(ids), spans))
        except BadRow as error:
            return Rendered("", left_out="bad", problem=str(error))

    def template(self, turns: list[dict[str, Any]], options: dict[str, Any], *, with_prompt: bool = False) -> str:
        """The text of a chat. with_prompt: and the beginning of an answer."""
        return self._apply(turns, tokenize=False, add_generation_prompt=with_prompt, **options)

    def _apply(self, turns: list[dict[str, Any]], **arguments: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(turns, **arguments)
        except Exception as error:
            # A template raises what its author chose, jinja's errors and Python's own.
            raise BadRow(f"is refused by the chat template: {type(error).__name__}: {error}") from error

    def _spans(self, turns: list[dict[str, Any]], options: dict[str, Any]) -> tuple[list[int], list[tuple[int, int]]]:
        """The chat's ids, and the spans of tokens that the assistant says."""
        if self.is_marked:
            made = self._apply(turns, return_dict=True, return_assistant_tokens_mask=True, **options)
            edges = np.flatnonzero(np.diff([0, *made["assistant_masks"], 0]))
            return made["input_ids"], list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        whole = self.template(turns, options)
        made = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = (np.array(side) for side in zip(*made["offset_mapping"], strict=True))
        spans = []
        for start, end in self._said(turns, options, whole):
            # A token on the border would be half the prompt's.
            if ((starts < start) & (ends > start)).any() or ((starts < end) & (ends > end)).any():
                raise BadRow("has a token that is half an assistant's turn and half what the template writes around it")
            inside = np.flatnonzero((starts >= start) & (ends <= end) & (ends > starts))
            if len(inside):
                spans.append((int(inside[0]), int(inside[-1]) + 1))
        return made["input_ids"], spans

    def _said(self, turns: list[dict[str, Any]], options: dict[str, Any], whole: str) -> list[tuple[int, int]]:
        """Characters of each assistant's turn: from the end of its prompt to where the chat without later turns ends."""
        said = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self.template(turns[:number], options, with_prompt=True)
            after = self.template(turns[: number + 1], options)
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRow(
                    f"is written otherwise by the chat template once more turns follow (message {number + 1}), and the template "
                    "does not mark what the assistant says ({% generation %})"
                )
            said.append((len(before), len(after)))
        return said

"""The recipe's section `data`: sources, how they are mixed, and how documents become sequences."""

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from dms.strict_config import Strict
from dms_train.data.compressed import SUFFIXES

Kind = Literal["builtin", "text", "jsonl", "parquet", "dataset"]
Value = str | bool | int | float
# The sources that are files here.
LOCAL = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}


def suffixes_of(source: str) -> list[str]:
    """Suffixes of the files that a local source reads from a folder."""
    return [LOCAL[source], *(LOCAL[source] + packed for packed in SUFFIXES if source != "parquet")]


def path_of(origin: "Origin") -> str:
    """Of an origin that is not builtin, which has one."""
    assert origin.path is not None
    return origin.path


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


class Condition(Strict):
    """What a column's value must be; all that is given must hold. A record whose value is missing (null) is left out."""

    eq: Value | None = None
    """Equal to this."""
    ne: Value | None = None
    """Not equal to this."""
    one_of: list[Value] | None = Field(default=None, min_length=1)
    """One of these."""
    lt: float | None = None
    """Less than."""
    le: float | None = None
    """At most."""
    gt: float | None = None
    """Greater than."""
    ge: float | None = None
    """At least."""

    @model_validator(mode="after")
    def _check(self):
        if all(value is None for value in vars(self).values()):
            raise ValueError("a condition is empty; give one or more of eq, ne, one_of, lt, le, gt, ge")
        return self


class Filter(Strict):
    """Which documents are read. min_chars, max_chars, matches and excludes look at the whole text, chat turns joined."""

    min_chars: int | None = Field(default=None, ge=1)
    """Least length in characters."""
    max_chars: int | None = Field(default=None, ge=1)
    """Greatest length in characters."""
    matches: Annotated[str, AfterValidator(_pattern)] | None = None
    """A regular expression that the text must contain a match of."""
    excludes: Annotated[str, AfterValidator(_pattern)] | None = None
    """A regular expression that the text must contain no match of."""
    where: dict[str, Condition] = Field(default={})
    """Conditions on other columns, by name."""

    @model_validator(mode="after")
    def _check(self):
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"filter.min_chars {self.min_chars} is above max_chars {self.max_chars}: no document would pass")
        return self


class Origin(Strict):
    """Where records come from, and what of a record is a document."""

    source: Kind
    """builtin: standard-library sources with planted tasks; text (a document a file), jsonl, parquet: local files; dataset: an id
    for `datasets`."""
    path: str | None = None
    """File, folder or glob (text, jsonl, parquet), or the dataset's id (dataset). Files of text and jsonl may be compressed, which their
    suffix tells: .gz, .bz2, .xz, .zst. A compressed .jsonl is read from its beginning to its end, 256 records shuffled at a time: records
    that are sorted should be shuffled before they are compressed. A .json file that is one list is not read: source jsonl wants an
    object a line."""
    config: str | None = None
    """dataset: the configuration's name."""
    split: str = "train"
    """dataset only."""
    streaming: bool = False
    """dataset only: read while it is fetched, without storing it first."""
    field: str = "text"
    """The column or key that holds a document's text."""
    messages: str | None = None
    """Instead of `field`: the column of a chat, a list of {role, content}, written out by the tokenizer's chat template, with all that
    a message has besides, such as tool_calls. Arguments of calls reach the template as they are: objects as objects, JSON strings as
    strings. Arrow (parquet, dataset) gives all objects of a column the same keys, with null for those that one did not have, and nothing
    tells such a null from a given one: there keys with null are left out, also in `tools`. Nulls in lists, in
    maps and in columns of type JSON are kept; so is every null of jsonl."""
    tools: str | None = None
    """With `messages`: the column of each record's tools, for the chat template: a list of JSON schemas, or JSON of such a list. A record
    without tools has null, "" or [] there."""
    template: dict[str, JsonValue] = Field(default={})
    """With `messages`: options of the chat template, by the names that it has for them, such as {enable_thinking: false}."""
    prompt: str | None = None
    """Instead of `field`: the column of a prompt, with `completion`."""
    completion: str | None = None
    """The column of the completion, with `prompt`."""
    loss_on: Literal["all", "completions"] = "all"
    """completions: the loss counts the predictions of assistant turns, or of the completion, alone."""
    items: list[int] = Field(default=[20, 40], min_length=2, max_length=2)
    """builtin: how many tasks are planted in a document, from and to."""
    filter: Filter = Filter()

    @property
    def label(self) -> str:
        """What messages call it."""
        return "builtin" if self.source == "builtin" else f"{self.source} {self.path}"

    def is_given(self, name: str) -> bool:
        return getattr(self, name) != Origin.model_fields[name].default

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if self.is_given(name):
                raise ValueError(f"data.{name} has no effect {why}; remove it")

    def check_origin(self) -> None:
        """Raises ValueError for what is missing, and for what has no effect."""
        if self.source == "builtin":
            self._refuse(("path",), "with source: builtin (choose source text, jsonl, parquet or dataset)")
            self._refuse(("field", "messages", "prompt", "completion", "loss_on", "filter"), "with source: builtin")
        elif self.path is None:
            needed = "a dataset id" if self.source == "dataset" else "a file, folder or glob"
            raise ValueError(f"data.path is missing: source {self.source} needs {needed}")
        else:
            self._refuse(("items",), f"with source: {self.source}")
        if self.source != "dataset":
            self._refuse(("config", "split", "streaming"), f"with source: {self.source}")
        if self.source == "text":
            self._refuse(("field", "messages", "prompt", "completion"), "with source: text, where a file is a document")
            if self.filter.where:
                raise ValueError("data.filter.where has no effect with source: text, which has no columns; remove it")
        if self.messages is not None:
            self._refuse(("prompt", "completion"), "beside data.messages")
        else:
            self._refuse(("tools", "template"), "without data.messages, which the chat template writes out")
        if self.messages is not None or self.prompt is not None:
            self._refuse(("field",), "beside data.messages or data.prompt")
        if not 0 <= self.items[0] <= self.items[1]:
            raise ValueError(f"data.items is {self.items}; give [from, to] with 0 <= from <= to")

    def check_trained(self) -> None:
        """As `check_origin`, and that a record is a whole document to train on."""
        self.check_origin()
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            raise ValueError(f"data.{missing} is missing: prompt and completion name a column each")
        if self.loss_on == "completions" and self.messages is None and self.prompt is None:
            raise ValueError("data.loss_on: completions needs messages, or prompt and completion: other text has no completions")


class Source(Origin):
    """One of several sources."""

    weight: float | list[list[float]] = 1.0
    """Its share of the tokens, relative to the others' weights. A list of [step, weight] is a schedule over optimizer steps: linear
    between its points, level before the first and after the last."""

    @model_validator(mode="after")
    def _check(self):
        self.check_trained()
        points = self.points
        if any(len(point) != 2 for point in points):
            raise ValueError(f"weight is {self.weight}; give a number, or a list of [step, weight]")
        steps = [step for step, _ in points]
        if not points or any(weight < 0 for _, weight in points):
            raise ValueError(f"weight is {self.weight}; weights are 0 or above")
        if steps != sorted(set(steps)) or any(step < 0 or step != int(step) for step in steps):
            raise ValueError(f"weight is {self.weight}; its steps are whole numbers that rise")
        return self

    @property
    def points(self) -> list[list[float]]:
        return self.weight if isinstance(self.weight, list) else [[0, self.weight]]

    def weight_at(self, step: int) -> float:
        """The weight in optimizer step 1, 2, ..."""
        points = self.points
        if step <= points[0][0]:
            return points[0][1]
        for (before, low), (after, high) in itertools.pairwise(points):
            if step <= after:
                return low + (high - low) * (step - before) / (after - before)
        return points[-1][1]


class Prompts(Origin):
    """Prompts to complete, from the same kinds of sources as training data: of chats all before the last answer, of other text its beginning."""

    tokens: int | None = Field(default=None, ge=1)
    """Length of a prompt: the first tokens of a text; shorter texts are left out. None: the whole text (not with builtin)."""

    @model_validator(mode="after")
    def _check(self):
        self.check_origin()
        self._refuse(("completion", "loss_on"), "in prompts: the completion is what is generated")
        if self.source == "builtin" and self.tokens is None:
            raise ValueError("prompts.tokens is missing: a built-in document is all prompt otherwise; give the prompt's length")
        if self.messages is not None and self.tokens is not None:
            raise ValueError("prompts.tokens has no effect beside prompts.messages; remove it")
        return self


class Data(Origin):
    """Where documents come from, one source given here or several under `sources`, and how sequences are made of them."""

    source: Kind | None = None  # type: ignore[assignment]  # None where `sources` are given; read it by all_sources
    sources: list[Source] | None = Field(default=None, min_length=1)
    """Several sources, each with its weight, instead of `source`."""
    length: int = Field(ge=8)
    """Tokens of each sequence."""
    long_documents: Literal["split", "drop"] = "split"
    """Documents longer than `length`: split into pieces of that length, or left out. Either way they are counted."""
    fill: Literal["cut", "pad"] | None = None
    """The end of a sequence where no whole document fits: cut one, whose rest goes on in another sequence, or pad. None: cut, or pad where
    a source has loss_on: completions or long_documents is drop."""
    balance_rows: int | None = Field(default=None, ge=1)
    """Sequences of like cost that are put into one step together; a divisor of batch_size. Ranks wait least where it is at least ranks x
    micro_batch_size; a larger number mixes each step less. None: the largest divisor up to 4."""
    bad_shards: Literal["refuse", "skip"] = "refuse"
    """A file, the rest of a damaged one, a row group or a record that cannot be read: an error that names it, or skipped, counted and
    reported. Tokens beyond the model's embedding are an error either way."""
    prefetch: int = Field(default=2, ge=0)
    """Steps made ahead of the one that trains, with a window of steps planned ahead of those; 0: neither."""
    workers: int = Field(default=1, ge=1, le=64)
    """Threads that read and tokenise, on each node. The data does not depend on it."""

    @model_validator(mode="after")
    def _check(self):
        if (self.source is None) == (self.sources is None):
            raise ValueError("data.source is missing; give source, or several under sources" if self.source is None else _BOTH)
        if self.sources is None:
            self.check_trained()
            return self
        self._refuse(_INLINE, "beside data.sources, where each source has its own")
        knots = sorted({1, *(max(1, int(step)) for source in self.sources for step, _ in source.points)})
        for step in knots:
            if not any(source.weight_at(step) > 0 for source in self.sources):
                raise ValueError(f"data.sources: all weights are 0 at step {step}; give one of them a weight above 0")
        return self

    @property
    def all_sources(self) -> list[Source]:
        if self.sources is not None:
            return self.sources
        return [Source(**{name: getattr(self, name) for name in Origin.model_fields})]

    @property
    def packs(self) -> bool:
        """Whether a sequence may hold several documents or padding."""
        return any(source.source != "builtin" for source in self.all_sources)

    @property
    def cuts(self) -> bool:
        """Whether documents are cut to fill sequences."""
        if self.fill is not None:
            return self.fill == "cut"
        return self.long_documents == "split" and all(source.loss_on == "all" for source in self.all_sources)

    def describe(self) -> str:
        """A short name for model cards."""
        return ", ".join(_describe(source) for source in self.all_sources)


_BOTH = "data.source and data.sources are both given; give one of them"
_INLINE = tuple(name for name in Origin.model_fields if name != "source")


def _describe(source: Any) -> str:
    if source.source == "builtin":
        return "builtin"
    return f"{source.source}: {source.path if source.source == 'dataset' else source.path.rstrip('/').rsplit('/', 1)[-1]}"

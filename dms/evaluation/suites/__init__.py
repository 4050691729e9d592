"""Suites: held-out documents made alike, whose questions stand at the end and are decoded."""

from collections.abc import Callable
from random import Random
from typing import Any

from dms.config import nearest
from dms.evaluation.data.document import EvaluationDocument, Text, plain_frame
from dms.evaluation.data.text_sources import GivenText, OnceText, StdlibText
from dms.evaluation.suites import classification, passages, records
from dms.evaluation.suites import word_counts as words
from dms.evaluation.suites.layout import chat_frame
from dms.evaluation.suites.running_text import running_text

_MODULES = {
    "needle": records,
    "records": records,
    "passages": passages,
    "classification": classification,
    "words": words,
    "one_pass": records,
}

SUITES: dict[str, Callable[..., list[EvaluationDocument]]] = {
    "needle": records.needle,
    "records": records.records,
    "passages": passages.passages,
    "classification": classification.classification,
    "words": words.words,
    "text": running_text,
    "one_pass": records.one_pass,
}
# What `dms evaluate` measures where nothing is named; one_pass is the evaluation at a run's end.
DEFAULT_SUITES = tuple(name for name in SUITES if name != "one_pass")

# Characters of text that a document of so many tokens is made from. The suite `words` reads no text, and `text` divides its own.
_NUM_CHARS = {name: module.num_chars for name, module in _MODULES.items() if module is not words}

# The accuracy of guessing, for each task; 0 where an answer cannot be guessed.
CHANCE: dict[str, float] = {task: chance for module in _MODULES.values() for task, chance in module.CHANCE.items()}


def make_suite(
    name: str,
    tokenizer,
    *,
    length: int,
    num_documents: int,
    seed: int = 7,
    text: Text | None = None,
    chat: bool = False,
    **settings: int,
) -> list[EvaluationDocument]:
    """Documents of exactly `length` tokens each, a function of the arguments.

    text: what they are made of; None: held-out files of the built-in text; words are made of none. Documents of a GivenText share no line. chat: as the user's and the assistant's turn, through the
    tokenizer's template. settings: `stride` of text, `num_items` of records and one_pass.

    Raises:
        ValueError: an unknown suite, a setting that it has not, or documents that cannot be made as asked, with what to change.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{nearest(name, SUITES)}; the suites are {', '.join(SUITES)}")
    for setting, value in {"length": length, "num_documents": num_documents, **settings}.items():
        if value is not None and value < 1:
            raise ValueError(f"{setting} is {value}; give at least 1")
    known = {"text": ["stride"], "records": ["num_items"], "one_pass": ["num_items"]}.get(name, [])
    for setting in settings:
        if setting not in known:
            raise ValueError(f"the suite {name!r} has no setting {setting!r}; it has {', '.join(known) or 'none'}")
    if name == "text":
        if chat:
            raise ValueError("the suite 'text' is running text and has no turns; evaluate it without chat")
        options: dict[str, Any] = dict(settings)
    else:
        frame = chat_frame(tokenizer, _MODULES[name].INSTRUCTION) if chat else plain_frame(tokenizer)
        options = {**settings, "frame": frame}
    text = text or StdlibText(held_out=True)
    if isinstance(text, GivenText) and name in _NUM_CHARS:
        text = _without_sharing(text, name, _NUM_CHARS[name](length), num_documents, Random(f"{name}:{seed}:{length}"))
    return SUITES[name](tokenizer, length=length, num_documents=num_documents, seed=seed, text=text, **options)


def _without_sharing(text: GivenText, name: str, num_chars: int, num_documents: int, rng: Random) -> OnceText:
    """Intervals are of documents drawn independently: those that share lines would claim more than they know."""
    enough_for = max(1, text.num_chars // num_chars)
    if num_documents > enough_for:
        raise ValueError(
            f"{num_documents} documents of the suite {name!r} that share no line take {num_chars} characters each, and the text has "
            f"{text.num_chars}, enough for {enough_for}; take at most {enough_for} documents, a shorter length, or "
            f"{num_documents * num_chars} characters of text"
        )
    return text.once(rng)

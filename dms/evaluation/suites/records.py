"""Planted records, asked for at the end: the tasks of `dms/evaluation/data/tasks.py`."""

from random import Random

from dms.evaluation.data.document import EvaluationDocument, Frame, Text, Tokenizer
from dms.evaluation.data.names import VALUES
from dms.evaluation.data.tasks import TASKS, make_document

CHANCE = dict.fromkeys(TASKS, 0.0) | dict.fromkeys(("single", "multi_key", "multi_query"), 1 / len(VALUES)) | {"count": 1 / 6}
INSTRUCTION = "Each line below begins with #? and repeats names of the records above, each followed by what the records say of it."
_TOKENS_PER_ITEM = 2048 / 24
# Training asks for keys most of all; here every task is to have enough questions.
EVEN_MIX = {
    "multi_key": 3.0,
    "multi_value": 2.0,
    "multi_query": 2.0,
    "chain_1": 2.0,
    "chain_2": 2.0,
    "chain_3": 2.0,
    "copy": 2.0,
    "count": 2.0,
}


def num_chars(length: int) -> int:
    """Characters of text that `make_document` reads for `length` tokens."""
    return 8 * length


def records(
    tokenizer: Tokenizer,
    *,
    length: int,
    num_documents: int,
    seed: int,
    text: Text,
    frame: Frame,
    num_items: int | None = None,
    mix: dict[str, float] | None = EVEN_MIX,
    single_every: int | None = None,
) -> list[EvaluationDocument]:
    """Documents of mixed tasks. mix: their weights, None: training's. single_every: each document of that many has a single record.

    num_items: planted in each; None: 24 at 2048 tokens, and in proportion at other lengths, as far as names go and as they fit.

    Raises:
        ValueError: a length that holds no item, more items than fit, or too little text.
    """
    documents = []
    for number in range(num_documents):
        single = single_every is not None and number % single_every == single_every - 1
        document = make_document(
            tokenizer,
            text,
            length=length,
            rng=Random(f"evaluation:{seed}:{length}:{number}"),
            num_items=1 if single else num_items or max(1, round(length / _TOKENS_PER_ITEM)),
            mix={"single": 1.0} if single else mix,
            questions="end",
            unseen_names=True,
            strict=num_items is not None,
            frame=frame,
        )
        if not document.answers:
            raise ValueError(f"a length of {length} tokens holds no planted item; lengthen it")
        documents.append(document)
    return documents


def needle(tokenizer: Tokenizer, **options) -> list[EvaluationDocument]:
    """Documents that hide a single record each."""
    return records(tokenizer, single_every=1, **options)


def one_pass(tokenizer: Tokenizer, **options) -> list[EvaluationDocument]:
    """Documents of the evaluation at a run's end: training's mix of tasks, and every eighth document has a single record."""
    return records(tokenizer, mix=None, single_every=8, **options)

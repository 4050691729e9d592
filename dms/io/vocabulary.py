"""Tokens that a model has no row for: its embedding has rows for other tokens than its tokenizer makes."""

from collections.abc import Iterable, Sequence
from typing import Any

_MEND = "use the tokenizer that the model was trained with, or give the embedding more rows first (model.resize_token_embeddings)"


def num_embeddings(config: Any) -> int:
    """The rows of the embedding of a model's text decoder."""
    return config.get_text_config().vocab_size


def check_tokenizer(tokenizer: Any, num_rows: int) -> None:
    """Raises ValueError for a tokenizer of another model: whose own vocabulary, which any text may come to, goes beyond the rows.

    A model may have more rows than its tokenizer has tokens, and a tokenizer may list added tokens that the model never had, such as
    one for images: these are refused where a text holds them, by `check_tokens`.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= num_rows}
    if own := sorted(beyond.keys() - getattr(tokenizer, "added_tokens_decoder", {}).keys()):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} is another model's: the embedding has {num_rows} rows, and {len(own)} tokens have "
            f"none, {beyond[own[0]]!r} (number {own[0]}) the first; {_MEND}"
        )


def check_tokens(ids: Sequence[int], tokenizer: Any, num_rows: int, where: str) -> None:
    """Raises ValueError for tokens of a text that have no row. where: what messages call the text."""
    number = int(max(ids, default=0))
    if number >= num_rows:
        raise ValueError(
            f"{where} holds the token {tokenizer.convert_ids_to_tokens(number)!r}, number {number}, and the embedding of the model has "
            f"{num_rows} rows; take it out of the text or of the chat template, {_MEND}"
        )


def padding_id(tokenizer: Any, num_rows: int) -> int:
    """A token that can stand where none is read: the tokenizer's padding where it has a row."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in known if number is not None and number < num_rows)


def check_documents(documents: Iterable[Any], tokenizer: Any, num_rows: int) -> None:
    """`check_tokens` for documents of an evaluation."""
    for number, document in enumerate(documents, 1):
        check_tokens(document.input_ids, tokenizer, num_rows, f"document {number} of the evaluation")

"""Tokens that a model has no embedding for, because its tokenizer makes others than it was trained with."""

from collections.abc import Iterable, Sequence
from typing import Any

_CURE = "use the tokenizer that the model was trained with, or give the embedding more rows first (model.resize_token_embeddings)"


def num_embeddings(config: Any) -> int:
    """Tokens that the text decoder has embeddings for."""
    return config.get_text_config().vocab_size


def check_tokenizer(tokenizer: Any, num_rows: int) -> None:
    """Raises ValueError for a tokenizer of another model: any text may hold tokens of its own vocabulary, and some have no embedding.

    num_rows: of the embedding. A model may have more rows than its tokenizer has tokens, and a tokenizer may list added tokens that the
    model never had, such as one for images: `check_tokens` refuses those where a text holds them.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= num_rows}
    if own := sorted(beyond.keys() - getattr(tokenizer, "added_tokens_decoder", {}).keys()):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} is another model's: the embedding has {num_rows} rows, and {len(own)} tokens have "
            f"none, {beyond[own[0]]!r} (number {own[0]}) the first; {_CURE}"
        )


def check_tokens(ids: Sequence[int], tokenizer: Any, num_rows: int, where: str) -> None:
    """Raises ValueError for tokens of a text that have no embedding. where: what messages call the text."""
    number = int(max(ids, default=0))
    if number >= num_rows:
        raise ValueError(
            f"{where} holds the token {tokenizer.convert_ids_to_tokens(number)!r}, number {number}, and the embedding of the model has "
            f"{num_rows} rows; take it out of the text or of the chat template, {_CURE}"
        )


def padding_id(tokenizer: Any, num_rows: int) -> int:
    """A token for padding: the tokenizer's own where it has an embedding."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in known if number is not None and number < num_rows)


def check_documents(documents: Iterable[Any], tokenizer: Any, num_rows: int) -> None:
    """`check_tokens` for documents of an evaluation."""
    for number, document in enumerate(documents, 1):
        check_tokens(document.input_ids, tokenizer, num_rows, f"document {number} of the evaluation")

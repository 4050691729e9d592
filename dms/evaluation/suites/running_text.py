"""Running text in strided windows: each window's last tokens are scored, with all before them as context."""

from random import Random

from dms.evaluation.document import Document, Text, plain_frame
from dms.evaluation.token_bytes import encode_with_sizes

# Characters of one text that are read for each token that is wanted: more than tokens have.
_CHARS_PER_TOKEN = 32


def running_text(tokenizer, *, length: int, num_documents: int, seed: int, text: Text, stride: int | None = None) -> list[Document]:
    """Windows of `length` tokens that move by `stride` through a stretch of the text; no token is scored twice.

    stride: tokens scored in each; None: an eighth of `length`.

    Raises:
        ValueError: a stride that is not within the window, or too little text.
    """
    stride = max(1, length // 8) if stride is None else stride
    head = plain_frame(tokenizer).head
    if not 1 <= stride < length - len(head):
        raise ValueError(f"stride is {stride} and the windows have {length} tokens; give one from 1 to {length - len(head) - 1}")
    window = length - len(head)
    ids, sizes = _stretch(tokenizer, text, Random(f"text:{seed}:{length}"), window, stride, num_documents)
    documents = []
    for end in range(window, window + num_documents * stride, stride):
        scored = sum(sizes[end - stride : end])
        documents.append(Document(head + ids[end - window : end], [1] * (length - stride) + [0] * stride, [], scored, length - stride))
    return documents


def _stretch(tokenizer, text: Text, rng: Random, window: int, stride: int, num_windows: int) -> tuple[list[int], list[int]]:
    """Consecutive tokens for all windows, from a random place, and the bytes of each."""
    wanted = window + (num_windows - 1) * stride
    ids: list[int] = []
    sizes: list[int] = []
    for whole in text.texts(rng):
        found = encode_with_sizes(tokenizer, _cut(whole, wanted * _CHARS_PER_TOKEN, rng))
        ids += found[0]
        sizes += found[1]
        if len(ids) >= wanted:
            start = rng.randint(0, len(ids) - wanted)
            return ids[start:], sizes[start:]
    fit = (len(ids) - window) // stride + 1
    raise ValueError(
        f"{num_windows} windows of {window} tokens that move by {stride} need {wanted} tokens and the text has {len(ids)}; "
        + (f"take at most {fit} documents" if fit > 0 else "shorten the windows")
        + ", a smaller stride, or more text"
    )


def _cut(whole: str, num_chars: int, rng: Random) -> str:
    """Of a text that is much longer than needed, a part that begins with a line."""
    if len(whole) <= num_chars:
        return whole
    start = whole.rfind("\n", 0, rng.randint(0, len(whole) - num_chars)) + 1
    return whole[start : start + num_chars]

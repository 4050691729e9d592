"""Running text in strided windows: each window's last tokens are scored, with all before them as context."""

import itertools
from collections.abc import Iterator
from random import Random

from dms.evaluation.data.document import EvaluationDocument, Text, plain_frame
from dms.evaluation.data.token_bytes import encode_with_sizes

# Characters that are read for each token of a window, where a text is much longer than all windows: more than tokens have.
_CHARS_PER_TOKEN = 16


def running_text(
    tokenizer, *, length: int, num_documents: int, seed: int, text: Text, stride: int | None = None
) -> list[EvaluationDocument]:
    """Windows of `length` tokens, each in one text and from as many texts and places as there are; no token is scored twice.

    The windows of a text lie `stride` apart, so that a small text gives neighbours, which share what stands before. Texts that are
    shorter than a window are joined with others.

    stride: tokens scored in each; None: an eighth of `length`.

    Raises:
        ValueError: a stride that is not within the window, or too little text.
    """
    stride = stride_of(length) if stride is None else stride
    head = plain_frame(tokenizer).head
    if not 1 <= stride < length - len(head):
        raise ValueError(f"stride is {stride} and the windows have {length} tokens; give one from 1 to {length - len(head) - 1}")
    window = length - len(head)
    rng = Random(f"text:{seed}:{length}")
    parts = _in_turns(text, rng, num_documents, window * _CHARS_PER_TOKEN)
    stretches = list(itertools.islice(_stretches(tokenizer, parts, window), num_documents))
    fit = [(len(ids) - window) // stride + 1 for ids, _ in stretches]
    if sum(fit) < num_documents:
        raise ValueError(
            f"{num_documents} windows of {window} tokens that move by {stride} are more than the text holds; "
            + (f"take at most {sum(fit)} documents" if fit else "shorten the windows")
            + ", a smaller stride, or more text"
        )
    documents = []
    for (ids, sizes), num_windows, count in zip(stretches, fit, _shares(fit, num_documents), strict=True):
        for number in _spread(rng, num_windows, count):
            end = window + number * stride
            scored = sum(sizes[end - stride : end])
            documents.append(
                EvaluationDocument(head + ids[end - window : end], [1] * (length - stride) + [0] * stride, [], scored, length - stride)
            )
    return documents


def stride_of(length: int) -> int:
    """Tokens at a window's end that are scored, where nothing else is said."""
    return max(1, length // 8)


def _in_turns(text: Text, rng: Random, count: int, num_chars: int) -> Iterator[str]:
    """A part of each text, in random order, and again. Texts are whole, but for those much longer than `count` times `num_chars`: of
    these about `num_chars` characters at `count` places."""
    for round_parts in itertools.zip_longest(*(_parts(whole, rng, count, num_chars) for whole in text.texts(rng))):
        yield from (part for part in round_parts if part is not None)


def _parts(whole: str, rng: Random, count: int, num_chars: int) -> list[str]:
    if len(whole) <= count * num_chars:
        return [whole]
    parts = []
    for place in range(count):
        start = rng.randint(place * len(whole) // count, (place + 1) * len(whole) // count - num_chars)
        end, half = start + num_chars, start + num_chars // 2
        # From line to line where there are such, and never into the next part.
        parts.append(whole[whole.find("\n", start, half) + 1 or start : whole.rfind("\n", half, end) + 1 or end])
    rng.shuffle(parts)
    return parts


def _stretches(tokenizer, parts: Iterator[str], window: int) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and the bytes of each, at least a window of them; parts with fewer are joined."""
    short: tuple[list[int], list[int]] = [], []
    for part in parts:
        ids, sizes = encode_with_sizes(tokenizer, part)
        if len(ids) >= window:
            yield ids, sizes
            continue
        short = short[0] + ids, short[1] + sizes
        if len(short[0]) >= window:
            yield short
            short = [], []


def _shares(fit: list[int], total: int) -> list[int]:
    """How many windows of each stretch: as even as what it has allows."""
    counts = [0] * len(fit)
    while sum(counts) < total:
        open_places = [place for place, most in enumerate(fit) if counts[place] < most]
        for place in open_places[: total - sum(counts)]:
            counts[place] += 1
    return counts


def _spread(rng: Random, num_windows: int, count: int) -> list[int]:
    """A random window of each of `count` equal parts, in order."""
    return [rng.randrange(part * num_windows // count, (part + 1) * num_windows // count) for part in range(count)]

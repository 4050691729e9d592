"""How many bytes of a text each of its tokens stands for, so that bits per byte compare over tokenizers."""

import itertools
import re
from collections.abc import Callable, Iterable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def encode_with_sizes(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """A text's tokens and the bytes of each; their sum is the text's.

    Where tokens spell bytes (byte-level BPE, SentencePiece with byte fallback), a part of a character has its own bytes. Where they do
    not spell the text (WordPiece; normalisation that changes it), white space counts with the token after it and a character of several
    tokens with its first.

    Raises:
        ValueError: tokens that do not spell the text, and a tokenizer that does not say where they stand.
    """
    ids = tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]
    data = text.encode()
    literal = {token: token.encode() for token in tokenizer.get_added_vocab()}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    for spell in (_spell_byte_level, _spell_sentencepiece):
        sizes = _spelled_sizes(tokens, literal, spell, data)
        if sizes is not None:
            return ids, sizes
    return ids, _sizes_by_offsets(tokenizer, text)


def _spelled_sizes(tokens: list[str], literal: dict[str, bytes], spell: Callable[[str], bytes | None], data: bytes) -> list[int] | None:
    """None: spelled so, the tokens are not the text."""
    pieces: list[bytes] = []
    for token in tokens:
        piece = literal[token] if token in literal else spell(token)
        if piece is None:
            return None
        pieces.append(piece)
    joined, sizes = b"".join(pieces), [len(piece) for piece in pieces]
    # SentencePiece begins texts with a space of its own.
    if joined == b" " + data:
        sizes[0] -= 1
    elif joined != data:
        return None
    return sizes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, the other bytes for the characters from 256 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _spell_byte_level(token: str) -> bytes | None:
    return bytes(_ALPHABET[char] for char in token) if _ALPHABET.keys() >= set(token) else None


def _spell_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _sizes_by_offsets(tokenizer, text: str) -> list[int]:
    if not tokenizer.is_fast:
        raise ValueError(
            "bytes of tokens: this tokenizer's tokens do not spell the text and it has no fast version, which says where they stand"
        )
    ends: Iterable[int] = (
        end for _, end in tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"][0]
    )
    until = [0, *itertools.accumulate(len(char.encode()) for char in text)]
    borders = [until[end] for end in itertools.accumulate(ends, max)]
    borders[-1:] = [until[-1]] if borders else []
    return [end - start for start, end in itertools.pairwise([0, *borders])]

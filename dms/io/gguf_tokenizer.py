"""The tokenizer that a GGUF file describes, made from its vocabulary and merges by the rules that its names stand for.

transformers' own conversion differs from release to release, and splits text by another rule than some files name: releases up to 5.18
make another kind of tokenizer of Gemma's, and all take the digits of smollm together.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dms.io.gguf_file import GGUFError, GGUFHeader

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"

# How text is cut before bytes are merged, by the names in tokenizer.ggml.pre. Patterns are of the kind that `regex` knows.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = r"[^\r\n\p{L}\p{N}]?[" + _UPPER + "]*[" + _LOWER + "]+", r"[^\r\n\p{L}\p{N}]?[" + _UPPER + "]+[" + _LOWER + "]*"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}"
_PATTERNS = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
}
# GPT-2's pattern, which ByteLevel has of its own; before it, where text is cut at each digit.
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "granite-docling", "roberta-bpe", "gigachat", "trillion")
_GPT2_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Tokenizers that take a whole piece that is a token, whatever the merges say, and begin every text with bos if nothing else is said.
_WHOLE_PIECES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
_NORMALIZED = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "olmo")
# Ids of sentencepiece vocabularies that name none.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build(header: GGUFHeader, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer with the file's special tokens and chat template, compared with the file's vocabulary. name: what messages call it.

    Warns where the file names no rule, or an unknown one, for cutting text.

    Raises:
        ValueError: no vocabulary, one of a kind that is not known, or tokens that would get other ids than in the file.
    """
    tokens, kind = _setting(header, "tokens"), _setting(header, "model")
    if not tokens or kind is None:
        raise GGUFError(f"{header.path} holds no tokenizer; give the model that the file was made from")
    if kind == "gpt2":
        backend = _byte_level(header, tokens)
    elif kind in ("llama", "gemma4"):
        # Runs of spaces stand in files as such, and are spelled here as sentencepiece writes them.
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        backend = _sentencepiece(header, tokens)
    else:
        raise GGUFError(
            f"{header.path} has a tokenizer of the kind {kind!r}, and gpt2 and llama are read; give the model that the file was made from"
        )
    _add_special(backend, header, tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=name,
        chat_template=header.values.get("tokenizer.chat_template"),
        add_bos_token=_adds(header, "bos", default=kind == "llama" or _setting(header, "pre") in _WHOLE_PIECES),
        add_eos_token=_adds(header, "eos", default=False),
        clean_up_tokenization_spaces=False,
        model_max_length=header.of_model("context_length") or int(1e30),
        **{ours: _special(header, theirs, tokens) for ours, theirs in _NAMES.items()},
    )
    _check(tokenizer, header, tokens)
    return tokenizer


def _setting(header: GGUFHeader, key: str) -> Any:
    return header.values.get(f"tokenizer.ggml.{key}")


def _adds(header: GGUFHeader, what: str, *, default: bool) -> bool:
    found = _setting(header, f"add_{what}_token")
    # Without a token there is nothing to add.
    return bool(default if found is None else found) and _special_id(header, what) is not None


def _special_id(header: GGUFHeader, what: str) -> int | None:
    found = _setting(header, f"{what}_token_id")
    return _SENTENCEPIECE_IDS.get(what) if found is None and _setting(header, "model") == "llama" else found


def _special(header: GGUFHeader, what: str, tokens: Sequence[str]) -> str | None:
    index = _special_id(header, what)
    if index is not None and not 0 <= index < len(tokens):
        raise GGUFError(f"{header.path} is damaged: its {what} token is {index}, and it has {len(tokens)} tokens; fetch it again")
    return None if index is None else tokens[index]


def _types(header: GGUFHeader, tokens: Sequence[str]) -> Sequence[int]:
    return _setting(header, "token_type") or [_NORMAL] * len(tokens)


def _merges(header: GGUFHeader) -> list[tuple[str, str]] | None:
    merges = _setting(header, "merges")
    # A token may begin with a space, but the separating one is not the first character.
    return None if merges is None else [(m[:cut], m[cut + 1 :]) for m in merges for cut in [m.index(" ", 1)]]


def _byte_level(header: GGUFHeader, tokens: Sequence[str]) -> Tokenizer:
    pre, merges = _setting(header, "pre"), _merges(header)
    if merges is None:
        raise GGUFError(f"{header.path} has a byte-level vocabulary without merges; give the model that the file was made from")
    known = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(known, merges, ignore_merges=pre in _WHOLE_PIECES))
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    if pre in _PATTERNS:
        cuts: list[Any] = [pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")]
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        if pre not in _GPT2 + _GPT2_DIGITS:
            warnings.warn(
                f"{header.path} cuts text by a rule named {pre!r} (tokenizer.ggml.pre), which is not known here: text is cut as GPT-2 does, "
                "and some of it may become other tokens than those that the model was trained on",
                stacklevel=4,
            )
        cuts = [pre_tokenizers.Digits(individual_digits=True)] if pre in _GPT2_DIGITS else []
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: GGUFHeader, tokens: Sequence[str]) -> Tokenizer:
    unknown = _special(header, "unknown", tokens)
    merges = _merges(header) or _implied_merges(header, tokens)
    known = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(known, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # Without the setting llama.cpp adds a space.
    has_prefix = _setting(header, "add_space_prefix") is not False
    if has_prefix and any(
        kind == _USER_DEFINED and not token.strip(_SPACE) for token, kind in zip(tokens, _types(header, tokens), strict=True)
    ):
        raise GGUFError(
            f"{header.path} has a tokenizer that begins texts with a space and takes runs of spaces as one, which is not read; give the model "
            "that the file was made from"
        )
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if has_prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _implied_merges(header: GGUFHeader, tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Merges in the order of the scores of what they make: sentencepiece merges the pair whose piece has the highest score."""
    scores = _setting(header, "scores")
    if scores is None or len(scores) != len(tokens):
        raise GGUFError(f"{header.path} has a vocabulary of pieces without merges or scores; give the model that the file was made from")
    normal = {token: index for index, (token, kind) in enumerate(zip(tokens, _types(header, tokens), strict=True)) if kind == _NORMAL}
    found = []
    for token, index in normal.items():
        for cut in range(1, len(token)):
            left, right = normal.get(token[:cut]), normal.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def _add_special(backend: Tokenizer, header: GGUFHeader, tokens: Sequence[str]) -> None:
    """Control tokens, which stand for themselves and are no text, and tokens that are matched whole wherever they stand in text."""
    types = _types(header, tokens)
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    # Runs of spaces are found in text as the normalizer leaves it.
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=not token.strip(_SPACE), special=False) for token in whole])


def _check(tokenizer: PreTrainedTokenizerFast, header: GGUFHeader, tokens: Sequence[str]) -> None:
    """Raises ValueError with the first difference between a tokenizer and the file's."""
    if len(tokenizer) != len(tokens):
        extra = next((token for token, index in tokenizer.get_vocab().items() if index >= len(tokens)), None)
        raise _different(
            header, f"it would have {len(tokenizer)} tokens instead of {len(tokens)}" + (f", such as {extra!r}" if extra else "")
        )
    for index, (ours, theirs) in enumerate(zip(tokenizer.convert_ids_to_tokens(list(range(len(tokens)))), tokens, strict=True)):
        if ours != theirs:
            raise _different(header, f"token {index} would be {ours!r} instead of {theirs!r}")
    for ours, theirs in _NAMES.items():
        if getattr(tokenizer, f"{ours}_id") != _special_id(header, theirs):
            raise _different(header, f"{ours} would be {getattr(tokenizer, ours)!r} instead of token {_special_id(header, theirs)}")
    if tokenizer.chat_template != header.values.get("tokenizer.chat_template"):
        raise _different(header, "it would have another chat template")


def _different(header: GGUFHeader, what: str) -> GGUFError:
    return GGUFError(f"the tokenizer made of {header.path} is not the file's: {what}; give the model that the file was made from")

"""Tokenizers made of GGUF files: the file's tokens, by the rules that the file names, however transformers would do it."""

import itertools
import random
import re

import pytest
from transformers import AutoTokenizer

from dms.io import base_models, gguf_file, gguf_tokenizer

gguf = pytest.importorskip("gguf")

import gguf_writing  # noqa: E402 - needs gguf

TEXT = "def read(path):\n    return open(path).read()  # 12 345\n\nchain $amber = 317; it's <|endoftext|> x\ty é日本🙂"
SPLITS = "Ab12345 it's IT'S  camelCase\n\ny //x\n  1"


@pytest.fixture(scope="module")
def embedded():
    return base_models.load_base("builtin:tiny", "float32", "cpu"), base_models.load_tokenizer("builtin:tiny")


@pytest.fixture
def build(embedded, tmp_path):
    """`build(pre=..., tokens=..., ...)`: the tokenizer of a file with the embedded model's vocabulary, changed in these keys."""

    def build(**options):
        path = gguf_writing.write(tmp_path / "one.gguf", *embedded, vocabulary=options)
        return base_models.load_tokenizer(str(path))

    return build


def test_it_encodes_as_the_original(build, embedded):
    ours, theirs = build(), embedded[1]
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    # The embedded tokenizer cuts after line ends first, which GPT-2's rule does not.
    for line in TEXT.splitlines():
        assert ours(line)["input_ids"] == theirs(line)["input_ids"], line
    assert ours.decode(ours(TEXT)["input_ids"]) == TEXT
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>", None)
    assert ours.model_max_length == 2048
    said = ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "user: hello\n" and ours.chat_template == gguf_writing.CHAT


def test_it_is_saved_and_loaded_as_it_is(build, tmp_path):
    ours = build(pre="smollm", add_bos_token=True)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = ours(TEXT)["input_ids"]
    assert ids[0] == ours.bos_token_id and again(TEXT)["input_ids"] == ids
    assert again.chat_template == ours.chat_template and again.special_tokens_map == ours.special_tokens_map


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "Ab|12345| it|'s| IT|'|S| | camelCase|\n|\n|y| //|x|\n | 1"),
        ("smollm", "Ab|1|2|3|4|5| it|'s| IT|'|S| | camelCase|\n|\n|y| //|x|\n  |1"),
        ("llama-bpe", "Ab|123|45| it|'s| IT|'S| | camelCase|\n\n|y| //|x|\n| | |1"),
        ("qwen2", "Ab|1|2|3|4|5| it|'s| IT|'S| | camelCase|\n\n|y| //|x|\n| | |1"),
        ("tekken", "Ab|1|2|3|4|5| it|'s| IT|'S| | camel|Case|\n\n|y| //|x|\n| | |1"),
        ("gpt-4o", "Ab|123|45| it's| IT'S| | camel|Case|\n\n|y| //|x|\n| | |1"),
    ],
)
def test_text_is_cut_as_the_file_says(pre, pieces, build, recwarn):
    backend = build(pre=pre).backend_tokenizer
    found = [SPLITS[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(SPLITS)]
    assert "|".join(found) == pieces and not recwarn


def test_an_unknown_rule_is_said(build):
    with pytest.warns(UserWarning, match=r"one.gguf cuts text by a rule named 'nobody' \(tokenizer.ggml.pre\), which is not known here"):
        build(pre="nobody")
    with pytest.warns(UserWarning, match="a rule named None"):
        build(pre=None)


def test_what_rules_say_of_merges_and_first_tokens(build):
    llama = build(pre="llama-bpe", add_bos_token=None)
    assert llama.backend_tokenizer.model.ignore_merges and llama("x")["input_ids"][0] == llama.bos_token_id
    other = build(pre="gpt-2", add_bos_token=None)
    assert not other.backend_tokenizer.model.ignore_merges and other("x")["input_ids"][0] != other.bos_token_id
    assert build(add_eos_token=True)("x")["input_ids"][-1] == other.eos_token_id
    # Qwen's files are made for composed letters.
    assert build(pre="qwen2")("e\u0301")["input_ids"] == other("é")["input_ids"]


# Pieces with the scores by which they are merged, best first; then what else a sentencepiece vocabulary has.
PIECES = [chr(0x2581), *"abcd", "ab", "\u2581a", "cd", "abc", "\u2581ab", "bcd", "\u2581\u2581c", "abcd", "dd", "dda"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "   ", "  ", "<b>"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 4, 4]
SCORES = [0.0, 0.0, 0.0, *[0.0] * 256, *(-float(index) for index in range(len(PIECES))), -1000.0, -1000.0, -1000.0]
PIECEWISE = {
    "model": "llama",
    "pre": "default",
    "tokens": TOKENS,
    "scores": SCORES,
    "token_type": TYPES,
    "merges": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "padding_token_id": None,
    "add_bos_token": True,
    "add_space_prefix": False,
}


def reference(text):
    """As sentencepiece does: whole tokens first, the longest; then the pair with the best score, the leftmost, again and again."""
    found = []
    for part in re.split(r"(   |  |<b>|</s>)", text):
        if part in ("   ", "  ", "<b>", "</s>"):
            found.append(TOKENS.index(part))
            continue
        pieces = list(part.replace(" ", "\u2581"))
        while True:
            pairs = [(PIECES.index(a + b), at) for at, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in PIECES]
            if not pairs:
                break
            at = min(pairs)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        for piece in pieces:
            found += [TOKENS.index(piece)] if piece in PIECES else [3 + byte for byte in piece.encode()]
    return found


def test_sentencepiece(build):
    tokenizer = build(**PIECEWISE)
    drawn = random.Random(0)
    texts = [
        "".join(drawn.choice(["a", "b", "c", "d", " ", "  ", "é", "<b>", "</s>"]) for _ in range(drawn.randrange(1, 30)))
        for _ in range(300)
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *reference(text)], text
        assert tokenizer.decode(ids[1:]) == text
    assert any(TOKENS.index("  ") in reference(text) for text in texts)
    prefixed = build(**PIECEWISE | {"add_space_prefix": None, "add_bos_token": None, "token_type": [*TYPES[:-3], 1, 1, 4]})
    ids = prefixed("abc d")["input_ids"]
    assert ids == [1, *reference(" abc d")] and prefixed.decode(ids, skip_special_tokens=True) == "abc d"


def refusal(build, **options):
    with pytest.raises(gguf_file.GGUFError, match=r"one\.gguf") as caught:
        build(**options)
    return str(caught.value)


def test_what_is_refused(build, embedded):
    tokens = [token for token, _ in sorted(embedded[1].get_vocab().items(), key=lambda item: item[1])]
    assert "has a tokenizer of the kind 'bert', and gpt2 and llama are read" in refusal(build, model="bert")
    assert "holds no tokenizer" in refusal(build, model=None)
    assert "a byte-level vocabulary without merges" in refusal(build, merges=None)
    assert "a vocabulary of pieces without merges or scores" in refusal(build, **PIECEWISE | {"scores": None})
    assert "begins texts with a space and takes runs of spaces as one" in refusal(build, **PIECEWISE | {"add_space_prefix": True})
    assert "its bos token is 5000, and it has 2048 tokens" in refusal(build, bos_token_id=5000)
    # Of two equal tokens one gets no id.
    assert "it would have 2047 tokens instead of 2048" in refusal(build, tokens=[*tokens[:-1], tokens[5]])


def test_differences_are_named(build, monkeypatch):
    whole = gguf_tokenizer.PreTrainedTokenizerFast

    def changed(change):
        def make(**options):
            tokenizer = whole(**options)
            change(tokenizer)
            return tokenizer

        monkeypatch.setattr(gguf_tokenizer, "PreTrainedTokenizerFast", make)
        return refusal(build)

    assert "it would have 2049 tokens instead of 2048, such as '<more>'" in changed(lambda t: t.add_tokens(["<more>"]))
    assert "eos_token would be 'x' instead of token 0" in changed(lambda t: setattr(t, "eos_token", "x"))
    assert "it would have another chat template" in changed(lambda t: setattr(t, "chat_template", "other"))
    assert "token 2 would be" in changed(
        lambda t: setattr(t, "convert_ids_to_tokens", lambda ids: ["<|endoftext|>", "<|pad|>", *map(str, ids[2:])])
    )

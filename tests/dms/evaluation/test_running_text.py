"""Strided windows: no token scored twice, none left out, and bytes that are exact with any kind of tokenizer."""

import itertools
import json
import unicodedata
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from dms.evaluation.data.text_sources import GivenText, split_lines, stdlib_files
from dms.evaluation.data.token_bytes import encode_with_sizes
from dms.evaluation.suites import make_suite
from dms.io import base_models

ROOT = Path(__file__).resolve().parents[3]
PROSE = (ROOT / "LICENSE").read_text(encoding="utf-8")
ODD = "naïve 日本語のテキスト。 🙂👩‍🚀 Łańcucki – 12 €\n\n\tend \u2028 of  it\u00a0\n"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.add_tokens([" $amber", "naïve"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama-2's: words begin with a mark, characters that are no tokens fall back to bytes."""
    tokenizer = Tokenizer(kinds.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [chr(byte) for byte in range(33, 127)]
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=95, show_progress=False)
    tokenizer.train_from_iterator([" ".join(PROSE.split())], trainer)
    spec = json.loads(tokenizer.to_str())
    # Trained as special tokens they would be cut out of texts that spell them.
    spec["added_tokens"] = spec["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(spec))


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator([PROSE], trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


def composing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece, wordpiece, composing])
def test_the_bytes_of_all_tokens_are_those_of_the_text(make):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    for text in (PROSE, ODD, " " + ODD, ODD.strip(), unicodedata.normalize("NFD", ODD), "a $amber b"):
        ids, sizes = encode_with_sizes(tokenizer, text)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] and len(ids) == len(sizes)
        assert sum(sizes) == len(text.encode()) and min(sizes) >= 0


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_parts_of_characters_have_their_own_bytes(make):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), clean_up_tokenization_spaces=False)
    text = "at 日本🙂 end"
    ids, sizes = encode_with_sizes(tokenizer, text)
    inside = 0
    for first in range(len(ids)):
        for last in range(first + 1, len(ids) + 1):
            part = tokenizer.decode(ids[first:last])
            if "\ufffd" in part:
                inside += 1
            elif first:
                # The decoder strips the first space of all.
                assert sum(sizes[first:last]) == len(part.encode()) + (make is sentencepiece and text.encode()[sum(sizes[:first])] == 32)
    assert inside > 20 and max(sizes[3:8]) <= 3


@pytest.fixture(scope="module")
def embedded():
    return base_models.load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def numbered():
    """Tokens that say where they stand: of one text, and of many."""
    words = [f"w{number}" for number in range(4000)]
    tokenizer = Tokenizer(kinds.WordLevel({"[UNK]": 0} | {word: number for number, word in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), words


@pytest.mark.parametrize("stride", [None, 1, 7])
def test_a_text_that_is_just_enough_gives_all_its_windows_in_order(numbered, tmp_path, stride):
    tokenizer, words = numbered
    step = stride or 25
    (tmp_path / "one.txt").write_text(" ".join(words[: 200 + 5 * step]))
    settings = {"length": 200, "text": GivenText([tmp_path]), **({} if stride is None else {"stride": stride})}
    documents = make_suite("text", tokenizer, num_documents=6, **settings)
    for number, document in enumerate(documents):
        assert document.input_ids == list(range(1 + number * step, 201 + number * step)) and document.prompt == 200 - step
        assert document.role == [1] * (200 - step) + [0] * step
        assert document.num_bytes == sum(len(f" {words[token - 1]}") for token in document.input_ids[-step:])
    with pytest.raises(ValueError, match=r"7 windows of 200 .* take at most 6 documents, a smaller stride"):
        make_suite("text", tokenizer, num_documents=7, **settings)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbffirst\n")
    (tmp_path / "two.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "second"}\n')
    assert sorted(GivenText([tmp_path]).texts(Random(0))) == ["first\n", "second"]


def scored_places(documents):
    return [place for document in documents for place in document.input_ids[document.prompt :]]


def test_windows_are_spread_over_the_whole_text_and_score_no_token_twice(numbered, tmp_path):
    tokenizer, words = numbered
    (tmp_path / "one.txt").write_text(" ".join(words))
    seen = set()
    for seed in range(6):
        documents = make_suite("text", tokenizer, length=80, num_documents=40, seed=seed, text=GivenText([tmp_path]))
        places = scored_places(documents)
        assert len(set(places)) == len(places) == 400
        assert all(one == two - 1 for document in documents for one, two in itertools.pairwise(document.input_ids))
        assert [sum(place // 1000 == quarter for place in places) for quarter in range(4)] == pytest.approx([100] * 4, abs=20)
        seen.update(places)
    assert len(seen) > 1200


def test_windows_come_from_as_many_texts_and_places_as_there_are(numbered, tmp_path):
    """Eight texts of a few windows, then also one that is much longer than what is read of it."""
    tokenizer, words = numbered
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(" ".join(words[number * 100 : (number + 1) * 100]))
    for count, expected in ((5, [1] * 5), (8, [1] * 8), (19, [2] * 5 + [3] * 3)):
        assert sorted(windows_of_each_text(tokenizer, tmp_path, count).values()) == expected
    (tmp_path / "long.txt").write_text("\n".join(words[800:]))
    assert windows_of_each_text(tokenizer, tmp_path, 27) == dict.fromkeys(range(8), 1) | {8: 19}


def windows_of_each_text(tokenizer, folder, count) -> Counter:
    documents = make_suite("text", tokenizer, length=40, num_documents=count, text=GivenText([folder]))
    begins, ends = ([min(document.input_ids[place] - 1, 800) // 100 for document in documents] for place in (0, -1))
    assert begins == ends and len(documents) == count
    assert len(set(scored_places(documents))) == len(scored_places(documents))
    return Counter(begins)


def test_a_text_much_longer_than_its_windows_is_read_in_places(numbered, tmp_path):
    tokenizer, words = numbered
    (tmp_path / "long.txt").write_text("\n".join(words))
    documents = make_suite("text", tokenizer, length=16, num_documents=8, text=GivenText([tmp_path]))
    starts = sorted(document.input_ids[0] for document in documents)
    assert all(number * 500 - 60 < start <= (number + 1) * 500 + 60 for number, start in enumerate(starts)), starts


def test_texts_shorter_than_a_window_are_joined(numbered, tmp_path):
    tokenizer, words = numbered
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(" ".join(words[number * 10 : (number + 1) * 10]))
    documents = make_suite("text", tokenizer, length=25, num_documents=10, stride=5, text=GivenText([tmp_path]))
    tokens = [token for document in documents for token in document.input_ids]
    assert len(set(tokens)) == len(tokens) == 250


def test_built_in_windows_are_of_different_files(embedded):
    documents = make_suite("text", embedded, length=200, num_documents=24)
    files = [path.read_text(errors="replace") for path in stdlib_files(held_out=True)]
    found = []
    for document in documents:
        assert document.input_ids[0] == embedded.bos_token_id and document.num_bytes == len(scored(embedded, document).encode())
        (first, last) = (embedded.decode(part).strip() for part in (document.input_ids[8:40], document.input_ids[-32:]))
        found.append({number for number, text in enumerate(files) if first in text and last in text})
    assert all(found) and len(set.union(*(texts for texts in found if len(texts) == 1))) >= 20


def scored(tokenizer, document) -> str:
    return tokenizer.decode(document.input_ids[document.prompt :])


def test_windows_that_divide_characters_lose_no_byte(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    (tmp_path / "odd.txt").write_text("日本🙂€é " * 40, encoding="utf-8")
    text = GivenText([tmp_path])
    divided = 0
    for count in range(1, 16):
        documents = make_suite("text", tokenizer, length=20, num_documents=count, stride=3, text=text)
        divided += sum("\ufffd" in scored(tokenizer, document) for document in documents)
        for document in documents:
            assert "\ufffd" in scored(tokenizer, document) or document.num_bytes == len(scored(tokenizer, document).encode())
            assert 3 <= document.num_bytes <= 4
    assert divided > 20
    # All windows of a text: together they score all that stands behind the first window's context, to the byte.
    ids, sizes = encode_with_sizes(tokenizer, "日本🙂€é " * 40)
    most = (len(ids) - 20) // 3 + 1
    documents = make_suite("text", tokenizer, length=20, num_documents=most, stride=3, text=text)
    assert sum(document.num_bytes for document in documents) == sum(sizes[17 : 17 + 3 * most])


def test_the_embedded_tokenizer_reads_a_text_as_its_lines(embedded):
    """The embedded model was trained on lines that were tokenised each by itself."""
    lines = Path(pytest.__file__).read_text().splitlines(keepends=True)
    alone = [token for line in lines for token in embedded(line, add_special_tokens=False)["input_ids"]]
    assert embedded("".join(lines), add_special_tokens=False)["input_ids"] == alone


def test_given_text_reads_files_folders_and_rows(tmp_path):
    (tmp_path / "one.txt").write_text("first text\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "two.md").write_text("# second\n\ntext\n")
    (tmp_path / "three.jsonl").write_text('{"body": "third\\u2028text"}\n\n{"body": "fourth"}\n')
    (tmp_path / "other.bin").write_bytes(b"\xff\xfe")
    texts = GivenText([tmp_path], field="body")
    assert sorted(texts.texts(Random(0))) == ["# second\n\ntext\n", "first text\n", "fourth", "third\u2028text"]
    lines = texts.lines(Random(1), 10_000)
    assert sorted(lines) == sorted(["# second\n", "\n", "text\n", "first text\n", "fourth\n", "third\n", "text\n"])
    assert len(texts.lines(Random(1), 3)) < len(lines)
    assert list(GivenText([tmp_path / "one.txt"]).texts(Random(0))) == ["first text\n"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("no.jsonl", '{"body": "x"}\n', "line 1 has no text under 'text'; it has body; name the field"),
        ("no.jsonl", '{"text": "x"}\n[1\n', "line 2 is no JSON"),
        ("no.txt", "   \n", "there is no text in"),
        ("no.bin", None, "is no text in UTF-8"),
        ("missing.txt", None, "there is no file or folder"),
        ("folder", None, "holds no .txt, .md, .jsonl file"),
    ],
)
def test_text_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    elif name == "no.bin":
        path.write_bytes(b"\xff\xfe\xfd")
    elif name == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=message):
        GivenText([path])


def test_long_paragraphs_become_lines_of_their_sentences():
    paragraph = " ".join(f"Sentence {n} has some words, and “these”!" for n in range(20)) + " " + "word " * 100 + "字" * 600
    lines = split_lines(f"short\n\n{paragraph}\nend")
    assert lines[:2] == ["short\n", "\n"] and lines[-1] == "end\n" and lines[2] == "Sentence 0 has some words, and “these”!\n"
    assert max(map(len, lines)) <= 241 and "".join("".join(lines[2:-1]).split()) == "".join(paragraph.split())


def test_a_stretch_of_a_long_text_begins_at_a_line(embedded, tmp_path):
    (tmp_path / "long.txt").write_text("".join(f"{n} bottles of beer\n" for n in range(20_000)))
    text = GivenText([tmp_path])
    begins = {tuple(make_suite("text", embedded, length=64, num_documents=2, seed=seed, text=text)[0].input_ids) for seed in range(6)}
    assert len(begins) == 6


def test_lines_are_read_once_and_in_order(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(f"text {number} line {line:03}\n" for line in range(100)))
    text = GivenText([tmp_path])
    assert text.num_chars == 3 * 100 * 16
    once = text.once(Random(0))
    taken = [once.lines(Random(1), 500) for _ in range(9)]
    lines = [line for stretch in taken for line in stretch]
    assert len(set(lines)) == len(lines) and all(480 <= sum(map(len, stretch)) <= 520 for stretch in taken)
    assert lines != [line for _ in range(9) for line in text.once(Random(2)).lines(Random(1), 500)]
    with pytest.raises(ValueError, match=r"has 4800 characters, and 9 stretches .* fewer than 500 are left; take fewer documents"):
        once.lines(Random(1), 500)
    assert len(text.once(Random(0)).lines(Random(1), 10_000)) == 300

"""Suites: exact lengths, answers that follow from the prompt and from nowhere else, guesses at the level that CHANCE says."""

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from random import Random
from string import ascii_lowercase

import pytest

from dms.evaluation.data.names import is_unseen
from dms.evaluation.data.tasks import TASKS
from dms.evaluation.data.text_sources import GivenText, StdlibText, stdlib_files
from dms.evaluation.engine.run_end import make_documents
from dms.evaluation.suites import CHANCE, SUITES, classification, make_suite
from dms.evaluation.suites import word_counts as words
from dms.io import base_models

ROOT = Path(__file__).resolve().parents[3]
BEGINS = ("return", "raise", "class", "import", "assert")
ASKING = [name for name in SUITES if name != "text"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


@pytest.fixture(scope="module")
def embedded():
    return base_models.load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def wordpiece():
    """Of another kind: lower case, no line ends, no first token."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train([str(path) for path in stdlib_files(held_out=False)[:12]], vocab_size=1200, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def prose():
    return GivenText([*sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "LICENSE"])


@pytest.mark.parametrize("kind", ["embedded", "wordpiece"])
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("length", [512, 901])
def test_lengths_are_exact_and_questions_are_at_the_end(request, kind, suite, length):
    documents = make_suite(suite, request.getfixturevalue(kind), length=length, num_documents=4)
    assert len(documents) == 4
    for document in documents:
        assert len(document.input_ids) == len(document.role) == length and 0 < document.prompt < length
        assert 2 not in document.role[: document.prompt]
        if suite == "text":
            assert document.role[document.prompt :] == [0] * (length // 8) and not document.answers
            continue
        answered = [place for place, role in enumerate(document.role) if role == 2]
        assert answered == sorted(place for a in document.answers for place in range(a.start, a.end)) != []
        assert all(a.evidence < document.prompt < a.start for a in document.answers)
        assert {a.task for a in document.answers} <= set(CHANCE)


@pytest.mark.parametrize("suite", SUITES)
def test_documents_are_functions_of_their_seed(embedded, suite):
    one, again, other = (make_suite(suite, embedded, length=512, num_documents=2, seed=seed) for seed in (3, 3, 4))
    assert one == again and one[0] != other[0] != other[1]


@pytest.mark.parametrize("suite", ASKING)
def test_names_are_unseen_and_text_is_held_out(embedded, suite):
    lines = {line.strip() for path in stdlib_files(held_out=True) for line in path.read_text(errors="replace").splitlines()}
    for document in make_suite(suite, embedded, length=700, num_documents=4):
        text = embedded.decode(document.input_ids)
        names = re.findall(r"^#[:?+-]\+? \$([a-z]+-[a-z]+)", text, re.M)
        assert all(is_unseen(name) for name in names) and (names or document.answers[0].task == "classification")
        running = [token for token, role in zip(document.input_ids, document.role, strict=True) if role == 0]
        assert all(line.strip() in lines for line in embedded.decode(running).removeprefix("<|endoftext|>").splitlines())


def test_records(embedded):
    """Every task of the suite about as often; needles alone; and the run's own evaluation, which asks for keys most of all."""
    asked = Counter(
        answer.task for document in make_suite("records", embedded, length=1024, num_documents=32) for answer in document.answers
    )
    assert set(asked) == set(TASKS) - {"single"} and max(asked.values()) < 6 * min(asked.values())
    needles = make_suite("needle", embedded, length=512, num_documents=8)
    assert [[answer.task for answer in document.answers] for document in needles] == [["single"]] * 8
    own = make_documents(embedded, num_documents=16, length=512, num_items=6)
    assert own[7].answers == needles[7].answers and own[7].input_ids == needles[7].input_ids
    assert Counter(answer.task for document in own for answer in document.answers).most_common(1)[0][0] == "multi_key"
    number = {length: len(make_suite("records", embedded, length=length, num_documents=1)[0].answers) for length in (256, 1024, 3072)}
    assert 1 <= number[256] < number[1024] < number[3072]


def occurrences(tokens: list[int], within: list[int]) -> int:
    return sum(within[at : at + len(tokens)] == tokens for at in range(len(within)))


@pytest.mark.parametrize("kind", ["embedded", "wordpiece"])
@pytest.mark.parametrize("source", ["built-in", "prose"])
def test_passages_stand_once_and_word_for_word(request, kind, source, prose):
    tokenizer, found = request.getfixturevalue(kind), Counter()
    marker = len(tokenizer("#?", add_special_tokens=False)["input_ids"])
    # Not every stretch serves, and which depends on the tokenizer, thus on this Python's library: the prose has enough for two draws each.
    for document in make_suite("passages", tokenizer, length=600, num_documents=5, text=prose if source == "prose" else None):
        prompt = document.input_ids[: document.prompt]
        given, start = tokenizer.decode(prompt), document.prompt
        for answer in document.answers:
            quote, reply = document.input_ids[start : answer.start], document.input_ids[answer.start : answer.end]
            assert 4 <= len(reply) <= 6
            if answer.task == "marked_passage":
                # The marker, the name, and the two tokens that are quoted after it.
                assert occurrences(quote[marker:-2], prompt) == 1
            else:
                assert given.count(tokenizer.decode(quote).strip()) == 1
            # What answers follows what asks, in the prompt as in the question, and stands nowhere else.
            tail = quote[marker:] if answer.task == "marked_passage" else quote
            assert occurrences(tail + reply, prompt) == occurrences(reply, prompt) == 1
            assert occurrences(tail + reply, prompt[answer.evidence : answer.evidence + 60]) == 1
            found[answer.task] += 1
            start = answer.end + len(tokenizer("\n", add_special_tokens=False)["input_ids"])
        assert start == len(document.input_ids)
    assert found["passage"] == found["marked_passage"] == 10


def test_passages_are_spread_over_the_document(embedded):
    documents = make_suite("passages", embedded, length=1024, num_documents=12)
    places = [a.evidence / d.prompt for d in documents for a in d.answers]
    shares = [sum(int(place * 4) == quarter for place in places) / len(places) for quarter in range(4)]
    assert len(places) == 96 and min(shares) > 0.15, shares


def test_classes_and_labels_follow_from_the_prompt(embedded):
    asked = Counter()
    for document in make_suite("classification", embedded, length=600, num_documents=8):
        prompt = embedded.decode(document.input_ids[: document.prompt])
        if document.answers[0].task == "classification":
            labels = {line.split()[0]: label for line, label in re.findall(r"^(\w.*) => (\w+)$", prompt, re.M)}
        else:
            labels = {label: line.split()[0] for label, line in re.findall(r"^#: (\S+) (.*)$", prompt, re.M)}
        # Some lines' first words go on with other signs: `return(x)`.
        labels = {re.match(r"\$?[\w-]+", word)[0]: label for word, label in labels.items()}
        start = document.prompt
        for answer in document.answers:
            question = embedded.decode(document.input_ids[start : answer.start])
            given = embedded.decode(document.input_ids[answer.start : answer.end]).strip()
            if answer.task == "classification":
                line = question.removesuffix(" =>")
                assert f"\n{line} =>" not in prompt
                assert given == labels[re.match(r"\w+", line)[0]]
            else:
                assert re.match(rf"{given}\b", labels[question.removeprefix("#? ")])
            asked[answer.task] += 1
            start = answer.end + 1
    assert asked == {"classification": 16, "label_word": 16}


def classes_in_order(tokenizer, document) -> list[str]:
    """Of each labelled line its label."""
    prompt = tokenizer.decode(document.input_ids[: document.prompt])
    return re.findall(r"^\w.* => (\w+)$" if document.answers[0].task == "classification" else r"^#: (\S+) .*$", prompt, re.M)


@pytest.mark.parametrize("length", [512, 1500])
def test_examples_of_a_class_stand_together_and_no_class_is_asked_for_twice(embedded, length):
    places, orders = [], []
    for document in make_suite("classification", embedded, length=length, num_documents=12):
        labels = classes_in_order(embedded, document)
        groups = [label for label, _ in itertools.groupby(labels)]
        assert len(groups) == len(set(groups)) == classification.NUM_CLASSES == len(document.answers)
        # Parts of equal numbers of tokens, in lines of 8 to 60 characters.
        assert max(Counter(labels).values()) < 5 * min(Counter(labels).values())
        answers = {tuple(document.input_ids[a.start : a.end]) for a in document.answers}
        assert len(answers) == len(document.answers)
        evidence = sorted(a.evidence for a in document.answers)
        # The last example of each class: after it another class begins, or the questions.
        text = [embedded.decode(document.input_ids[place : document.prompt]) for place in evidence]
        rest = [re.findall(r"=> (\w+)$" if document.answers[0].task == "classification" else r"^#: (\S+)", part, re.M) for part in text]
        assert [part[0] for part in rest] == groups and [len(set(part)) for part in rest] == [4, 3, 2, 1]
        assert all(part.count(part[0]) == 1 for part in rest)
        places += [place / length for place in evidence]
        orders.append([groups.index(answer_label(embedded, document, a)) for a in document.answers])
    # Evenly over the document, asked in an order that does not follow theirs.
    shares = [sum(low <= place < low + 0.25 for place in places) for low in (0.1, 0.35, 0.6, 0.75)]
    assert min(shares) >= 8, shares
    assert len(set(map(tuple, orders))) > 6


def test_a_stretch_of_text_with_too_few_lines_of_a_class_is_passed_over(embedded):
    """As some are in the built-in text of some versions of Python."""

    class Poor(StdlibText):
        draws, num_poor = 0, 3

        def lines(self, rng, num_chars):
            self.draws += 1
            found = super().lines(rng, num_chars)
            return found[:20] if self.draws <= self.num_poor else found

    text = Poor(held_out=True)
    (document,) = make_suite("classification", embedded, length=512, num_documents=1, text=text)
    assert len(document.input_ids) == 512 and text.draws > 3
    text.num_poor = math.inf
    with pytest.raises(ValueError, match="give more text"):
        make_suite("classification", embedded, length=512, num_documents=1, text=text)


def answer_label(tokenizer, document, answer) -> str:
    if answer.task == "classification":
        return tokenizer.decode(document.input_ids[answer.start : answer.end]).strip()
    return tokenizer.decode(document.input_ids[: answer.start]).rsplit("#? ", 1)[1]


def test_the_words_are_those_that_stand_most_often(embedded):
    for document in make_suite("words", embedded, length=700, num_documents=6):
        task = document.answers[0].task
        entries = re.findall(r"^#: (\S+) (\d+)$", embedded.decode(document.input_ids[: document.prompt]), re.M)
        questions = re.findall(r"^#[?] (\S+) (\d+)$", embedded.decode(document.input_ids[document.prompt :]), re.M)
        assert len(questions) == len(document.answers) == {"common_words": 8, "frequent_words": 4}[task]
        for name, word in questions:
            (first, most), (_, second) = Counter(w for n, w in entries if n == name).most_common(2)
            assert first == word and most >= 2 * second > 0


def test_counts_keep_their_proportions():
    for scale in range(1, 60):
        common, frequent = words.counts("common_words", scale), words.counts("frequent_words", scale)
        assert common[0] == 3 * common[1] and len(set(common[1:])) == 1
        assert frequent[0] == 2 * frequent[1] and sorted(frequent, reverse=True) == frequent and len(frequent) == 8


def test_guesses_are_right_as_often_as_chance_says(embedded):
    rng = Random(0)
    for suite, task, options in [
        ("classification", "classification", r"=> (\w+)$"),
        ("words", "frequent_words", r"^#: NAME (\d+)$"),
        ("words", "common_words", r"^#: NAME (\d+)$"),
    ]:
        right = asked = 0
        for document in make_suite(suite, embedded, length=400, num_documents=80):
            prompt, start = embedded.decode(document.input_ids[: document.prompt]), document.prompt
            for answer in document.answers:
                question = embedded.decode(document.input_ids[start : answer.start])
                start = answer.end + 1
                if answer.task == task:
                    pattern = options.replace("NAME", re.escape(question.removeprefix("#? ")))
                    guess = rng.choice(sorted(set(re.findall(pattern, prompt, re.M))))
                    right += guess == embedded.decode(document.input_ids[answer.start : answer.end]).strip()
                    asked += 1
        deviation = (CHANCE[task] * (1 - CHANCE[task]) / asked) ** 0.5
        assert abs(right / asked - CHANCE[task]) < 3 * deviation and asked > 100, (task, right, asked)


@pytest.mark.parametrize("suite", ASKING)
def test_chats_give_the_prompt_to_the_user_and_the_rest_to_the_assistant(wordpiece, suite):
    wordpiece.chat_template = TEMPLATE
    try:
        for document in make_suite(suite, wordpiece, length=777, num_documents=2, chat=True):
            given, decoded = (
                wordpiece.decode(document.input_ids[: document.prompt]),
                wordpiece.decode(document.input_ids[document.prompt :]),
            )
            assert len(document.input_ids) == len(document.role) == 777 and document.answers
            assert given.replace(" ", "").startswith("<user>") and given.replace(" ", "").endswith("</user><assistant>")
            assert "below" in given[-200:] and "assistant" not in decoded
            assert all(a.evidence < document.prompt < a.start for a in document.answers)
    finally:
        wordpiece.chat_template = None


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only one turn') }}", "refuses two turns.*only one turn"),
        ("{{ messages[0].content }}", "does not write each of two turns once"),
    ],
)
def test_templates_that_are_no_frame_are_refused(wordpiece, template, message):
    wordpiece.chat_template = template
    try:
        with pytest.raises(ValueError, match=message):
            make_suite("records", wordpiece, length=777, num_documents=1, chat=True)
    finally:
        wordpiece.chat_template = None


@pytest.mark.parametrize(
    "suite, given, message",
    [
        ("record", {}, "unknown suite 'record' .did you mean 'records'"),
        ("words", {"num_documents": 0}, "num_documents is 0"),
        ("words", {"stride": 8}, "'words' has no setting 'stride'"),
        ("text", {"chat": True}, "no turns; evaluate it without chat"),
        ("text", {"stride": 512}, "stride is 512 and the windows have 512 tokens; give one from 1 to 510"),
        ("records", {"length": 12}, "12 tokens"),
        ("records", {"num_items": 90}, "more than the document's 512"),
        ("passages", {"length": 64}, "passages need at least .* lengthen it"),
        ("classification", {"length": 100}, "fewer than 2 labelled lines of each class; lengthen"),
        ("words", {"length": 40}, "hold no list of . entries with this tokenizer; lengthen"),
    ],
)
def test_what_cannot_be_made_is_refused(embedded, suite, given, message):
    with pytest.raises(ValueError, match=message):
        make_suite(suite, embedded, **{"length": 512, "num_documents": 2, **given})


@pytest.mark.parametrize(
    "suite, message",
    [
        ("records", "the text has 300 lines, which leave .* give more text"),
        ("passages", "each document takes 4096; give more text"),
        ("classification", "needs 4 first words .* give more text"),
        ("text", "2 windows of 4095 tokens that move by 512 are more than the text holds; shorten"),
    ],
)
def test_too_little_text_is_refused(embedded, tmp_path, suite, message):
    (tmp_path / "short.txt").write_text("".join(f"A line, number {n}.\n" for n in range(300)))
    with pytest.raises(ValueError, match=message):
        make_suite(suite, embedded, length=4096, num_documents=2 if suite == "text" else 1, text=GivenText([tmp_path]))


@pytest.mark.parametrize("suite", ["needle", "records", "passages", "classification"])
def test_documents_of_a_given_text_share_no_line(embedded, tmp_path, suite):
    """`enough for` is exact: so many can be made, of different lines, and not one more."""
    rng = Random(0)
    odd = ["".join(rng.choices(ascii_lowercase, k=9)) for _ in range(9000)]
    (tmp_path / "a.txt").write_text("".join(f"{rng.choice(BEGINS)} {word} {word[::-1]} w{n:06}\n" for n, word in enumerate(odd)))
    text = GivenText([tmp_path])
    with pytest.raises(
        ValueError, match=rf"90 documents of the suite '{suite}' that share no line take .* enough for \d+; take at most"
    ) as found:
        make_suite(suite, embedded, length=512, num_documents=90, text=text)
    most = int(re.search(r"enough for (\d+)", str(found.value))[1])
    documents = make_suite(suite, embedded, length=512, num_documents=most, text=text)
    lines = [set(re.findall(r"w\d{6}", embedded.decode(document.input_ids))) for document in documents]
    assert most > 5 and min(map(len, lines)) > 5 and len(set.union(*lines)) == sum(map(len, lines))
    with pytest.raises(ValueError, match=f"enough for {most}; take at most {most} documents"):
        make_suite(suite, embedded, length=512, num_documents=most + 1, text=text)


def test_passages_that_find_no_other_stretch_say_so(embedded, tmp_path):
    (tmp_path / "same.txt").write_text("A line that is like the others, the whole text long.\n" * 200)
    with pytest.raises(ValueError, match=r"2 stretches that share no line have been read.* take fewer documents"):
        make_suite("passages", embedded, length=512, num_documents=2, text=GivenText([tmp_path]))


def test_text_without_lines_that_stand_once_is_refused(embedded, tmp_path):
    (tmp_path / "same.txt").write_text("A line that is like the others, the whole text long.\n" * 2000)
    with pytest.raises(ValueError, match="give text that repeats itself less"):
        make_suite("passages", embedded, length=512, num_documents=1, text=GivenText([tmp_path]))


def test_every_task_has_its_chance():
    assert CHANCE["classification"] == 1 / classification.NUM_CLASSES and CHANCE["frequent_words"] == 1 / 8
    assert all(0 <= chance < 0.5 for chance in CHANCE.values()) and len(CHANCE) == 9 + 2 + 2 + 2


def test_the_built_in_text_is_whole_and_in_random_order():
    text = StdlibText(held_out=True)
    one, other = ([next(texts), next(texts)] for texts in (text.texts(Random(0)), text.texts(Random(1))))
    assert one != other and one[0] != one[1]
    assert sum(1 for _ in text.texts(Random(0))) == len(stdlib_files(held_out=True))

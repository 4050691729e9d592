"""Planted documents: exact length, exact spans, answers that stand in the records and nowhere else."""

import re
from random import Random

import pytest
from dms_train.pretrain import train_tokenizer

from dms.evaluation.data.names import FIRST_WORDS, SECOND_WORDS, VALUES, WORDS, draw_names, is_unseen
from dms.evaluation.data.tasks import TASKS, make_document
from dms.evaluation.data.text_sources import StdlibText, stdlib_files


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(1024, 512)


@pytest.fixture(scope="module")
def text():
    return StdlibText(held_out=True)


def solve(prefix: str, task: str) -> str:
    """An independent reader: answer the question that `prefix` ends with, from the text alone."""
    key = re.findall(r"\$(\S+)$", prefix)[0]
    if task == "count":
        return f" {len(re.findall(rf'^#[+] [$]{key}$', prefix, re.M))}"
    records = dict(re.findall(r"^#: \$(\S+) (.*)$", prefix, re.M))
    value, answer = records[key], ""
    while task.startswith("chain") and value.startswith("$"):
        answer += f" {value}"
        value = records[value[1:]]
    return f"{answer} {value}"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("questions", ["anywhere", "end"])
@pytest.mark.parametrize("unseen", [False, True])
def test_every_answer_follows_from_the_text_before_it(tokenizer, text, task, questions, unseen):
    found = 0
    for seed in range(6):
        document = make_document(
            tokenizer, text, length=400, rng=Random(seed), num_items=3, mix={task: 1.0}, questions=questions, unseen_names=unseen
        )
        assert len(document.input_ids) == len(document.role) == 400
        for answer in document.answers:
            prefix = tokenizer.decode(document.input_ids[1 : answer.start])
            given = tokenizer.decode(document.input_ids[answer.start : answer.end])
            assert given == solve(prefix, task)
            key = re.findall(r"\$(\S+)$", prefix)[0]
            assert is_unseen(key) == unseen
            assert answer.evidence < answer.start and document.role[answer.start : answer.end] == [2] * (answer.end - answer.start)
            assert tokenizer.decode(document.input_ids[answer.evidence :]).startswith("#+" if task == "count" else "#:")
            found += 1
    assert found >= 12


def test_distances_reach_over_the_whole_document(tokenizer, text):
    distances = []
    for seed in range(30):
        document = make_document(tokenizer, text, length=600, rng=Random(seed), num_items=8, mix={"multi_key": 1.0}, questions="end")
        distances += [(a.start - a.evidence) / 600 for a in document.answers]
    quartiles = [sum(int(d * 4) == q for d in distances) / len(distances) for q in range(4)]
    assert min(quartiles) > 0.12, quartiles


def test_documents_are_functions_of_their_seed(tokenizer, text):
    one, two, other = (make_document(tokenizer, text, length=300, rng=Random(seed), num_items=4) for seed in (1, 1, 2))
    assert one == two != other


def test_bytes_are_those_of_the_running_text(tokenizer, text):
    document = make_document(tokenizer, text, length=300, rng=Random(0), num_items=4)
    running = [token for token, role in zip(document.input_ids, document.role, strict=True) if role == 0][1:]
    assert len(tokenizer.decode(running).encode()) == document.num_bytes


def test_too_many_items_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="more than the document's 64"):
        make_document(tokenizer, text, length=64, rng=Random(0), num_items=20)


def test_unknown_task_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="unknown task 'singel'"):
        make_document(tokenizer, text, length=200, rng=Random(0), num_items=1, mix={"singel": 1.0})


def test_held_out_files_and_names_are_apart(tokenizer, text):
    assert not set(stdlib_files(True)) & set(stdlib_files(False)) and len(set(WORDS)) == len(WORDS)
    names = {unseen: set(draw_names(Random(0), unseen)) for unseen in (False, True)}
    assert min(map(len, names.values())) > 80 and not names[True] & names[False]
    for unseen in (False, True):
        words = [word for name in names[unseen] for word in name.split("-")]
        assert len(words) == len(set(words))


def test_every_planted_word_and_value_is_one_token(tokenizer):
    for piece, count in [(" $amber", 1), ("-fox", 1), (" 317", 1), ("#:", 1), (f" ${FIRST_WORDS[-1]}-{SECOND_WORDS[-1]} {VALUES[-1]}", 3)]:
        assert len(tokenizer(piece)["input_ids"]) == count, piece

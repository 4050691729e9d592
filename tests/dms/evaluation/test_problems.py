"""Answers are found and compared as written in the docstrings; problems have their length, one answer, and clear errors."""

import json
import re

import pytest

from dms.evaluation.data.problems import AnswerRule, canonical, make_chains, read_problems
from dms.io import base_models


@pytest.fixture(scope="module")
def tokenizer():
    return base_models.load_tokenizer("builtin:tiny")


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("1,234", 1234, True),
        ("$1,234.00", "1234", True),
        ("-$5", "$-5", True),
        ("0.5", "2/4", True),
        (".5", 0.5, True),
        ("50%", r"50\%", True),
        (" Paris.", "paris", True),
        ("x + 1", "X  +  1", True),
        ("1,2", "12", False),
        ("-3", "3", False),
        ("1/0", "1", False),
        ("1e3", "1000", False),
    ],
)
def test_equal_answers_have_one_form(ours, theirs, same):
    assert (canonical(ours) == canonical(theirs)) == same


@pytest.mark.parametrize(
    ("pattern", "first", "text", "answer"),
    [
        (None, False, "so 3 apples and 1,250.50 pears.", "2501/2"),
        (None, False, r"thus \boxed{\frac{1}{2}} and not 7", r"\frac{1}{2}"),
        (None, False, r"\boxed{3} or better \boxed{4", "3"),
        (None, False, "10-5 is v2.5", "5"),
        (None, False, "none at all", None),
        (r"#### (\S+)", False, "1 #### 2 #### 3", "3"),
        (r"\d+", True, "1 2 3", "1"),
        (r"answer: (yes|no)", False, "Answer: 3", None),
        (r"a(x)?", False, "a", None),
    ],
)
def test_the_rule_finds_the_answer(pattern, first, text, answer):
    assert AnswerRule(pattern, first).extract(text) == answer


@pytest.mark.parametrize(("pattern", "said"), [("(", "no regular expression"), ("(a)(b)", "has 2 groups")])
def test_a_pattern_that_cannot_work_is_refused(pattern, said):
    with pytest.raises(ValueError, match=said):
        AnswerRule(pattern)


def test_a_chain_leads_to_its_answer(tokenizer):
    made = make_chains(tokenizer, num_problems=4, length=512, num_hops=5, num_chains=3, seed=1)
    again = make_chains(tokenizer, num_problems=2, length=512, num_hops=5, num_chains=3, seed=1)
    assert made.problems[:2] == again.problems and made.problems[0] != made.problems[1]
    for problem in made.problems:
        assert len(problem.input_ids) == 512 == made.length
        text = tokenizer.decode(problem.input_ids[1:])
        records = dict(re.findall(r"^#: \$(\S+) \$?(\S+)$", text, re.M))
        name, hops = re.search(r"#\? \$(\S+)$", text)[1], 0
        while name in records:
            name, hops = records[name], hops + 1
        assert (name, hops) == (problem.answer, 6)
        numbers = [value for value in records.values() if value.isdigit()]
        assert made.chance == 1 / len(numbers) == 1 / len(set(numbers))
    said = " $amber-fox $dune-lark 317 and 4"
    assert re.search(made.stop, said) and made.rule.extract(said) == "317"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length": 64}, "more than the prompt's 64"),
        ({"num_chains": 0}, "num_chains is 0"),
        ({"num_hops": 60, "length": 4096}, "need"),
    ],
)
def test_chains_that_do_not_fit_are_refused(tokenizer, given, said):
    with pytest.raises(ValueError, match=said):
        make_chains(tokenizer, **{"num_problems": 1, "length": 512} | given)


def test_long_prompts_have_as_many_records_as_there_are_names(tokenizer):
    """One in 64 tokens would be more names than there are."""
    made = make_chains(tokenizer, num_problems=2, length=8168)
    numbers = []
    for problem in made.problems:
        assert len(problem.input_ids) == 8168
        records = re.findall(r"^#: \$(\S+) \$?(\S+)$", tokenizer.decode(problem.input_ids[1:]), re.M)
        assert len(dict(records)) == len(records) > 60
        numbers.append(sum(value.isdigit() for _, value in records))
    assert made.chance == pytest.approx(sum(1 / number for number in numbers) / 2) and max(numbers) < 8168 // 64


def write(tmp_path, *lines):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_problems_are_read(tmp_path, tokenizer):
    path = write(
        tmp_path, {"prompt": "2 + 2 =", "answer": 4}, "", {"prompt": "capital?", "answer": " Paris "}, {"prompt": "x", "answer": "9"}
    )
    found = read_problems(path, tokenizer, answer_pattern=r"is (\w+)", stop=["\n", "Q:"], limit=2)
    assert [problem.answer for problem in found.problems] == ["4", "paris"]
    assert list(found.problems[0].input_ids) == tokenizer("2 + 2 =")["input_ids"]
    assert (found.name, found.chance, found.chat_template, found.length) == ("sums", 0.0, False, None)
    assert re.search(found.stop, "so Q:") and not re.search(found.stop, "Q")


def test_a_byte_order_mark_is_no_part_of_the_first_problem(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "2 + 2 =", "answer": 4})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [problem.answer for problem in read_problems(path, tokenizer).problems] == ["4"]


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = base_models.load_tokenizer("builtin:tiny")
    message = {"role": "user", "content": "2 + 2"}
    path = write(tmp_path, {"messages": [message], "answer": 4}, {"prompt": "2 + 2", "answer": 4})
    with pytest.raises(ValueError, match="the tokenizer has none"):
        read_problems(path, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    found = read_problems(path, tokenizer)
    assert [tokenizer.decode(problem.input_ids) for problem in found.problems] == ["<user>2 + 2<a>", "2 + 2"]
    assert found.chat_template
    both = read_problems(path, tokenizer, chat_template=True)
    assert both.problems[0] == both.problems[1]
    with pytest.raises(ValueError, match="turned off"):
        read_problems(path, tokenizer, chat_template=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "answer"', "line 2: no JSON"),
        ([1], "line 2: a list"),
        ({"question": "a", "answer": 1}, "the fields are question, answer"),
        ({"prompt": "a", "messages": [], "answer": 1}, "either prompt or messages"),
        ({"prompt": "a"}, "answer is None"),
        ({"prompt": "a", "answer": True}, "answer is True"),
        ({"prompt": "a", "answer": "one\n#### 2"}, "the answer alone"),
        ({"prompt": "a", "answer": " "}, "the answer alone"),
        ({"prompt": "", "answer": 1}, "prompt is ''"),
        ({"messages": [{"role": "user"}], "answer": 1}, "objects with role and content"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, said):
    path = write(tmp_path, {"prompt": "a", "answer": 1}, line)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_problems(path, tokenizer)


def test_a_file_without_problems_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="is no file"):
        read_problems(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(ValueError, match="is empty"):
        read_problems(write(tmp_path, ""), tokenizer)
    with pytest.raises(ValueError, match="stop strings"):
        read_problems(write(tmp_path, ""), tokenizer, stop=[""])
    with pytest.raises(ValueError, match="give a list"):
        read_problems(write(tmp_path, ""), tokenizer, stop="\n\n")

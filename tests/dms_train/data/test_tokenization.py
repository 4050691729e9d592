"""Chats, prompts with completions, filters: the right tokens, and the loss on exactly those that were asked for."""

import copy

import pytest
from dms_train.data.settings import Filter, Origin
from dms_train.data.shards import Record
from dms_train.data.tokenization import columns_of, make_render

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|endoftext|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Says how many turns there are at the start: nothing that is written before a turn stays as it was.
REWRITING = "{{ messages | length }}" + PLAIN
CHAT = [
    {"role": "user", "content": "how do I import os?"},
    {"role": "assistant", "content": "import os"},
    {"role": "user", "content": "and sys?"},
    {"role": "assistant", "content": "import sys\nprint(sys.path)"},
]


@pytest.fixture
def with_template(tokenizer):
    def make(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return make


def origin(**changes):
    return Origin(source="jsonl", path="x.jsonl", **changes)


def render(tokenizer, place, *rows):
    return make_render(tokenizer, place)([Record(f"x.jsonl:{number}", row) for number, row in enumerate(rows, 1)])


def counted_text(tokenizer, rendered):
    """What the loss is asked to predict."""
    return tokenizer.decode([rendered.ids[place + 1] for place in range(len(rendered.ids) - 1) if rendered.counted[place]])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_loss_counts_what_the_assistant_says_to_the_token(with_template, template):
    tokenizer = with_template(template)
    (made,) = render(tokenizer, origin(messages="chat", loss_on="completions"), {"chat": CHAT})
    assert tokenizer.decode(made.ids) == "".join(f"<|{m['role']}|>\n{m['content']}<|endoftext|>\n" for m in CHAT)
    end = "<|endoftext|>" if template == MARKED else "<|endoftext|>\n"
    assert counted_text(tokenizer, made) == f"import os{end}import sys\nprint(sys.path){end}"
    (everything,) = render(tokenizer, origin(messages="chat"), {"chat": CHAT})
    assert everything.counted.all() and (everything.ids == made.ids).all()


def test_a_chat_without_an_answer_has_nothing_to_count(with_template):
    for template in (PLAIN, MARKED):
        (made,) = render(with_template(template), origin(messages="chat", loss_on="completions"), {"chat": CHAT[:1]})
        assert made.left_out == "without_completions"


def test_a_template_that_rewrites_earlier_turns_is_refused_at_once(with_template):
    with pytest.raises(ValueError, match=r"loss_on: completions cannot be used with this model.*use loss_on: all"):
        make_render(with_template(REWRITING), origin(messages="chat", loss_on="completions"))
    (made,) = render(with_template(REWRITING), origin(messages="chat"), {"chat": CHAT})
    assert made.counted.all()


def test_a_template_that_drops_earlier_reasoning_is_refused_where_it_does(with_template):
    """As those of reasoning models do: only the last turn keeps what was thought."""
    dropping = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}")
    thinking = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>import os"}, *CHAT[2:]]
    first, second = render(with_template(dropping), origin(messages="chat", loss_on="completions"), {"chat": CHAT}, {"chat": thinking})
    assert first.left_out == "" and second.left_out == "bad" and "message 2" in second.problem


def test_chats_need_a_template(tokenizer):
    with pytest.raises(ValueError, match="has no chat template"):
        make_render(tokenizer, origin(messages="chat"))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("hello", "has no list of messages"),
        ([], "has no list of messages"),
        ([{"role": "user", "text": 3, "content": 4}], "is no {role: text, content: text}"),
        ([{"content": "x"}], "is no {role: text, content: text}"),
    ],
)
def test_what_is_no_chat_is_bad(with_template, chat, message):
    (made,) = render(with_template(PLAIN), origin(messages="chat"), {"chat": chat})
    assert made.left_out == "bad" and message in made.problem


def test_prompt_and_completion_meet_at_a_token(tokenizer):
    place = origin(prompt="p", completion="c", loss_on="completions")
    (made,) = render(tokenizer, place, {"p": "def f(x):\n    ret", "c": "urn x + 1"})
    assert counted_text(tokenizer, made) == "urn x + 1<|endoftext|>"
    assert made.ids.tolist() == tokenizer("def f(x):\n    ret")["input_ids"] + tokenizer("urn x + 1")["input_ids"] + [
        tokenizer.eos_token_id
    ]
    (everything,) = render(tokenizer, origin(prompt="p", completion="c"), {"p": "a", "c": "b"})
    assert everything.counted.all()


def test_special_tokens_that_a_text_spells_out_come_once(tokenizer):
    spelled, ended = render(tokenizer, origin(), {"text": "<|endoftext|>import os"}, {"text": "import os<|endoftext|>"})
    for made in (spelled, ended):
        assert made.ids.tolist().count(tokenizer.eos_token_id) == (2 if made is spelled else 1)


def test_rows_that_are_no_documents(tokenizer):
    made = render(tokenizer, origin(), {"other": "x"}, {"text": "  \n"}, {"text": "\ud800 half"}, {"text": "fine"})
    assert [row.left_out for row in made] == ["bad", "empty", "bad", ""]
    assert "x.jsonl:1 has no text under data.field 'text'; it has: other" in made[0].problem and "Unicode" in made[2].problem


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"min_chars": 5}, "bcd"),
        ({"max_chars": 5}, "ab"),
        ({"matches": "^ban"}, "c"),
        ({"excludes": "an"}, "abd"),
        ({"where": {"lang": {"eq": "en"}}}, "ab"),
        ({"where": {"lang": {"ne": "en"}}}, "c"),
        ({"where": {"lang": {"one_of": ["de", "fr"]}}}, "c"),
        ({"where": {"score": {"ge": 2}}}, "bc"),
        ({"where": {"score": {"gt": 1, "lt": 3}}}, "b"),
        ({"where": {"score": {"le": 1.5}}, "min_chars": 1}, "a"),
    ],
)
def test_filters(tokenizer, rules, kept):
    rows = [
        {"id": "a", "text": "kiwi", "lang": "en", "score": 1},
        {"id": "b", "text": "apple", "lang": "en", "score": 2.0},
        {"id": "c", "text": "banana", "lang": "de", "score": 3},
        {"id": "d", "text": "cherries", "lang": None, "score": None},
    ]
    made = render(tokenizer, origin(filter=rules), *rows)
    assert "".join(row["id"] for row, found in zip(rows, made, strict=True) if not found.left_out) == kept
    assert {found.left_out for found in made} == {"", "filtered"}


def test_filters_say_what_they_cannot_compare(tokenizer):
    rules = {"where": {"score": {"gt": 1}}}
    text, missing = render(tokenizer, origin(filter=rules), {"text": "x", "score": "high"}, {"text": "x"})
    assert "'high' under 'score', which data.filter.where compares with the number 1" in text.problem
    assert "has no 'score'" in missing.problem
    assert columns_of(origin(filter=rules)) == ["text", "score"] and Filter(**rules).min_chars is None

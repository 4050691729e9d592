"""A conversation: only new tokens are fed, what is said is what the whole text gives, and a cache that no longer fits is left."""

import pytest
import torch
from dms_train import chat
from dms_train.chat import Conversation, converse, render, stop_tokens
from transformers import LogitsProcessor

import dms
from dms.io import base_models
from dms.retrofitting import gate_parameters

# Special tokens around what is said, so that it is cut into tokens alike wherever it stands.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}<|pad|>{{ m['content'] CHANGED }}<|pad|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant<|pad|>{% endif %}"
)
FIRST, SECOND = "def first(x):\n    return x + 1\n" * 4, "import os, sys, json, math, time"


@pytest.fixture(scope="module")
def build(tiny_folder):
    """`build(mode)`: the tiny model, in float32, with gates that evict about half; None: without gates."""

    def make(mode: str | None):
        model = base_models.load_base(str(tiny_folder), "float32", "cpu")
        if mode is None:
            return model
        dms.retrofit(model, dms.DMSConfig(window=4, scale=1.0, offset=0.0))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in gate_parameters(model).values():
                parameter.normal_(0, 0.3, generator=generator)
        return dms.set_mode(model, mode) or model

    return make


@pytest.fixture
def tokenizer(tiny_folder):
    loaded = base_models.load_tokenizer(str(tiny_folder))
    loaded.chat_template = TEMPLATE.replace("CHANGED", "")
    return loaded


class Says(LogitsProcessor):
    """Has the model say given tokens and then what ends a turn; afterwards what it likes."""

    def __init__(self, tokens: list[int], end: int | None):
        self.left = [*tokens] + ([] if end is None else [end])

    def __call__(self, input_ids, scores):
        if self.left:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, self.left.pop(0)] = 0.0
            return forced
        return scores


def talk(model, tokenizer, **options):
    """A conversation whose first answer is fixed."""
    said = Says(tokenizer("return 7")["input_ids"], tokenizer.pad_token_id)
    return Conversation(model, tokenizer, **{"max_new_tokens": 12, "do_sample": False, "logits_processor": [said]} | options)


@pytest.fixture
def fed(monkeypatch):
    """Counts the tokens that a model's passes read."""

    def count(model):
        seen = []
        model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        return seen

    return count


@pytest.mark.parametrize("mode", [None, "dense", "evict"])
def test_only_new_tokens_are_fed_and_the_answer_is_that_of_the_whole_text(build, tokenizer, fed, mode):
    model = build(mode)
    conversation, seen = talk(model, tokenizer), fed(model)
    first = conversation.turn(FIRST)
    assert first.reply == "return 7" and first.is_whole and first.num_read == seen[0] == len(render(tokenizer, conversation.messages[:1]))
    assert sum(seen) == len(conversation.fed) == conversation.cache.get_seq_length()
    cache, before = conversation.cache, len(conversation.fed)
    seen.clear()
    second = conversation.turn(SECOND)
    whole = render(tokenizer, conversation.messages[:3])
    assert conversation.cache is cache and second.notes == ()
    assert second.num_read == seen[0] == len(whole) - before and sum(seen) == len(conversation.fed) - before
    # The reference: nothing is cached, and what is evicted is masked.
    ids = torch.tensor([whole])
    with torch.no_grad():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), use_cache=False, max_new_tokens=12, do_sample=False, eos_token_id=conversation.stops
        )
    assert conversation.fed == expected[0, : len(conversation.fed)].tolist() and second.num_new == expected.shape[1] - len(whole)
    if mode == "evict":
        report = cache.report(warn=False)
        assert report.alive < report.seen and f"{report.alive:,} of {report.seen:,} KV entries alive, CR {report.cr:.2f}" in str(second)
    else:
        assert f"dense: {cache.get_seq_length()} tokens in the cache" in str(second)


def test_an_answer_that_was_cut_goes_on_from_the_same_cache(build, tokenizer):
    conversation = talk(build("evict"), tokenizer, max_new_tokens=2, logits_processor=[Says(tokenizer("return 7 + 8")["input_ids"], None)])
    first = conversation.turn(FIRST)
    assert not first.is_whole and "stopped at --max-new-tokens" in str(first) and "return 7 + 8".startswith(first.reply)
    cache, before = conversation.cache, len(conversation.fed)
    second = conversation.turn(SECOND)
    assert conversation.cache is cache and second.num_read == len(render(tokenizer, conversation.messages[:3])) - before


def test_a_template_that_rewrites_earlier_turns_begins_again(build, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("CHANGED", "| replace('return', '')")
    conversation = talk(build("evict"), tokenizer)
    conversation.turn(SECOND)
    cache = conversation.cache
    second = conversation.turn(SECOND)
    assert conversation.cache is not cache and second.num_read == len(render(tokenizer, conversation.messages[:3]))
    assert len(second.notes) == 1 and "renders earlier turns otherwise than they were read" in second.notes[0]


@pytest.mark.parametrize("reason", ["rotary", "cache"])
def test_where_no_cache_can_be_kept_each_turn_reads_all(build, tokenizer, monkeypatch, capsys, reason):
    model = build("evict")
    if reason == "rotary":
        monkeypatch.setattr(chat.hf_compat, "rotary_changes", lambda model: {model: []})
    else:
        model.dms.takes_cache = False
    conversation = talk(model, tokenizer)
    converse(conversation, [SECOND])
    assert "each turn reads the whole conversation" in capsys.readouterr().err
    second = conversation.turn(SECOND)
    assert conversation.cache is None and second.num_read == len(render(tokenizer, conversation.messages[:3])) and second.notes == ()


def test_lines_and_commands(build, tokenizer, capsys):
    conversation = talk(build("evict"), tokenizer, system="short answers", max_new_tokens=2)
    last = converse(conversation, ["\n", f"{SECOND}\n", "/rest\n", "/reset\n", f"{SECOND}\n", "/exit\n", f"{SECOND}\n"])
    out, err = capsys.readouterr()
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"] and conversation.messages[-1][
        "content"
    ] == last.reply
    assert last.num_read == len(render(tokenizer, conversation.messages[:2]))
    assert (
        err.count("KV entries alive, CR") == 2 and "/rest is no command: /reset starts over" in err and "starts over, with an empty" in err
    )
    assert "short answers" not in out and SECOND not in out


def test_a_turn_that_failed_is_not_part_of_the_conversation(build, tokenizer, capsys):
    conversation = talk(build("evict"), tokenizer)
    conversation.turn(SECOND)
    cache = conversation.cache
    assert converse(conversation, ["word " * 600]) is None
    assert "tokens and the model's context is 512; start over with /reset" in capsys.readouterr().err
    assert len(conversation.messages) == 2 and conversation.cache is cache

    def asked(words: int) -> list[dict]:
        return [*conversation.messages, {"role": "user", "content": "word " * words}]

    fitting = next(words for words in range(512, 0, -1) if len(render(tokenizer, asked(words))) < 508)
    assert fitting > 50
    turn = conversation.turn("word " * fitting)
    assert conversation.cache is cache and len(turn.notes) == 1 and "start over soon with /reset" in turn.notes[0]

    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("broken in the middle")

    conversation = talk(build("evict"), tokenizer)
    conversation.turn(SECOND)
    conversation.sampling["logits_processor"] = [Broken()]
    with pytest.raises(RuntimeError, match="in the middle"):
        conversation.turn(SECOND)
    assert len(conversation.messages) == 2 and conversation.cache is None and conversation.fed == []


def test_what_ends_a_turn(build, tokenizer):
    model = build(None)
    assert stop_tokens(model, tokenizer) == {0, 1} and tokenizer.eos_token_id == 0
    model.generation_config.eos_token_id = [0, 5]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} and\n{% endfor %}"
    assert stop_tokens(model, tokenizer) == {0, 5}
    tokenizer.chat_template = "{{ raise_exception('user and assistant must alternate') }}"
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == {0}


def test_templates_that_are_missing_or_refuse(build, tokenizer, tiny_folder):
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}x"
    Conversation(build(None), tokenizer, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"refuses the roles system, user: no system message"):
        Conversation(build(None), tokenizer, max_new_tokens=1, system="short")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*leave out --chat"):
        Conversation(build(None), tokenizer, max_new_tokens=1)

"""Continuous batching against `generate` on each prompt alone."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from wrappers import build_wrapper

import dms
from dms.batching import Continuation, Observer, Prompt, generate_batch, sample_seed
from dms.cache import DMSCache
from dms.modes import set_mode

NEW = 12
LENGTHS = (1, 30, 7, 2, 45, 4)
# Name -> mode, family and options of the gates.
MODELS = {
    "evict": ("evict", "llama", {}),
    "several windows": ("evict", "llama", {"window": (2, 8, 20), "sinks": 1}),
    "decided by the next": ("evict", "llama", {"alignment": "next"}),
    "sliding layers": ("evict", "gemma3_text", {}),
    "dense": ("dense", "llama", {}),
    "dense sliding": ("dense", "gemma3_text", {}),
}


@pytest.fixture(scope="module")
def model_of(build_gated):
    """`model_of(name)`: of MODELS, in its mode, made once. Leave it as it is."""
    made: dict[tuple, torch.nn.Module] = {}

    def get(name: str):
        mode, family, options = MODELS[name]
        key = (family, *options.items())
        if key not in made:
            made[key] = build_gated(family, hidden_size=32, **options)
        set_mode(made[key], mode)
        return made[key]

    return get


def make_prompts(lengths=LENGTHS, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 97, (length,), generator=generator).tolist() for length in lengths]


def alone(model, ids, seed=None, **options) -> list[int]:
    """What `generate` adds to a prompt."""
    if seed is not None:
        torch.manual_seed(seed)
    ids_1T = torch.tensor([ids])
    out = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), pad_token_id=0, **options)
    return out[0, len(ids) :].tolist()


class Sizes(Observer):
    """How many sequences each step had, and of which kind the caches are."""

    def __init__(self):
        self.steps, self.read, self.kinds = [], [], set()

    def prompt_read(self, prompt, cache):
        self.read.append(prompt)
        self.kinds.add(type(cache))

    def stepped(self, rows, lengths, cache, seconds):
        assert seconds > 0 and len(set(rows)) == len(rows) == len(lengths)
        self.steps.append(len(rows))
        self.kinds.add(type(cache))


@pytest.mark.parametrize(
    "name",
    [name if name in ("evict", "several windows", "dense sliding") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_tokens_are_those_of_each_prompt_alone(name, model_of):
    model, prompts = model_of(name), make_prompts()
    options = {"max_new_tokens": NEW, "do_sample": False}
    # Said early by some, late by others, and never by the rest.
    said = [alone(model, ids, **options) for ids in prompts]
    options["eos_token_id"] = [said[0][0], said[1][3], said[3][7]]
    expected = [alone(model, ids, **options) for ids in prompts]
    assert len({len(tokens) for tokens in expected}) > 2 and max(map(len, expected)) == NEW
    for size in (1, 3, 16) if name == "dense" else (3,):
        sizes = Sizes()
        found = list(generate_batch(model, prompts, max_batch_size=size, observer=sizes, **options))
        assert [continuation.tokens for continuation in sorted(found)] == expected
        assert [continuation.prompt for continuation in sorted(found)] == sizes.read == list(range(len(prompts)))
        assert {c.finish_reason for c in found} == {"eos", "length"}
        assert all((c.finish_reason == "eos") == (c.tokens[-1] in options["eos_token_id"]) for c in found)
        assert sizes.kinds == {DMSCache if MODELS[name][0] == "evict" else DynamicCache}
        # Every step is full until nothing waits.
        joins = [tokens for tokens in expected if len(tokens) > 1]
        assert sum(sizes.steps) == sum(len(tokens) - 1 for tokens in joins) and sizes.steps[0] == min(size, len(joins))
        assert sizes.steps == sorted(sizes.steps, reverse=True)


@pytest.mark.parametrize(("name", "chunk"), [("evict", 5), ("dense sliding", None)])
def test_prompts_are_read_in_parts(name, chunk, model_of):
    model, prompts = model_of(name), make_prompts()
    expected = [alone(model, ids, max_new_tokens=6, do_sample=False) for ids in prompts]
    lengths = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    found = sorted(generate_batch(model, prompts, max_new_tokens=6, do_sample=False, prefill_chunk_size=chunk, max_batch_size=4))
    hook.remove()
    assert [c.tokens for c in found] == expected and max(lengths) == (chunk or 45)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("evict", {"top_p": 0.9, "temperature": 0.7}),
        ("dense", {"top_k": 9, "repetition_penalty": 1.4}),
        pytest.param("evict", {"top_k": 0}, marks=pytest.mark.slow),
        pytest.param("evict", {"top_k": 9, "repetition_penalty": 1.4}, marks=pytest.mark.slow),
    ],
)
def test_samples_draw_as_generate_does_whoever_is_beside_them(name, options, model_of):
    """More samples than there is room for, of which some come later than others of their prompt."""
    model, prompts = model_of(name), make_prompts((9, 40))
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": 5} | options
    expected = [(n, s, alone(model, ids, sample_seed(7, n, s), **options)) for n, ids in enumerate(prompts) for s in range(4)]
    for size in (3, 16):
        sizes = Sizes()
        found = sorted(generate_batch(model, prompts, seed=7, num_return_sequences=4, max_batch_size=size, observer=sizes, **options))
        assert [c[:3] for c in found] == expected and sizes.read == [0, 1]
    assert len({tuple(tokens) for _, _, tokens in expected}) > 4
    others = generate_batch(model, prompts, seed=8, num_return_sequences=4, **options)
    assert [c[:3] for c in sorted(others)] != expected
    # Seeds of one's own, in another order.
    own = [Prompt(ids, [sample_seed(7, n, s) for s in (2, 0)]) for n, ids in enumerate(prompts)]
    found = sorted(generate_batch(model, own, **options))
    assert [c.tokens for c in found] == [expected[4 * n + s][2] for n in range(2) for s in (2, 0)]


def test_samples_of_a_prompt_share_its_pages(build_gated):
    """Those that join later too: what the prompt keeps is in memory once."""
    model = build_gated(page_size=16)
    model.dms.page_size = 16
    held = []

    class Pages(Observer):
        def stepped(self, rows, lengths, cache, seconds):
            tables = [layer.store.page_table[:, :, 0] for layer in cache.layers]
            held.append([len(table.unique()) for table in tables])

    set_mode(model, "evict")
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 6, "eos_token_id": list(range(2, 50))}
    found = list(generate_batch(model, make_prompts((120,)), max_batch_size=3, observer=Pages(), **options))
    assert len(found) == 6 and len({len(c.tokens) for c in found}) > 1
    # Two KV heads a layer, whose first pages are full.
    assert len(held) > 2 and all(pages == [2, 2] for pages in held)


def test_continuations_come_as_they_end_and_prompts_as_there_is_room(model_of):
    model, given = model_of("evict"), []
    said = [alone(model, ids, max_new_tokens=NEW, do_sample=False) for ids in make_prompts()]
    eos = said[2][2]

    def prompts():
        for number, ids in enumerate(make_prompts()):
            given.append(number)
            yield torch.tensor(ids)

    found = generate_batch(model, prompts(), max_batch_size=3, max_new_tokens=NEW, do_sample=False, eos_token_id=eos)
    assert given == []
    first = next(found)
    assert isinstance(first, Continuation) and len(given) == 3
    rest = list(found)
    order = [first.prompt, *(c.prompt for c in rest)]
    assert sorted(order) == list(range(len(LENGTHS))) and order != sorted(order)
    assert list(generate_batch(model, [], max_new_tokens=1)) == []


def test_stopping_criteria_and_processors_see_one_sequence(model_of):
    model, prompts = model_of("dense"), make_prompts((9, 30, 4))

    class Says(StoppingCriteria):
        def __init__(self, token):
            self.token = token

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == self.token

    class Forbid(LogitsProcessor):
        """The token that comes after the sequence's first."""

        def __call__(self, input_ids, scores):
            return scores.index_fill(1, input_ids[0, :1] + 1, -torch.inf)

    options = {"max_new_tokens": 15, "do_sample": False, "logits_processor": [Forbid()], "min_new_tokens": 4, "eos_token_id": 3}
    said = [alone(model, ids, **options) for ids in prompts]
    given = [Prompt(prompts[0], stopping_criteria=[Says(said[0][6])]), *prompts[1:]]
    found = sorted(generate_batch(model, given, stopping_criteria=[Says(said[1][2])], **options))
    for tokens, stops, continuation in zip(said, ({said[0][6], said[1][2]}, {said[1][2]}, {said[1][2]}), found, strict=True):
        end = next((n + 1 for n, token in enumerate(tokens) if token in stops), len(tokens))
        assert continuation.tokens == tokens[:end] and (continuation.finish_reason == "stop") == (end < len(tokens))


def test_stop_strings():
    from evicting import embedded

    model, tokenizer = embedded()
    set_mode(model, "evict")
    prompts = tokenizer(["import os\nimport ", "def f(self, x):\n    return "])["input_ids"]
    options = {"max_new_tokens": 30, "do_sample": False, "stop_strings": ["\n"], "tokenizer": tokenizer}
    found = sorted(generate_batch(model, prompts, **options))
    assert [c.tokens for c in found] == [alone(model, ids, **options) for ids in prompts]
    assert "stop" in {c.finish_reason for c in found}


def test_evict_bias_is_of_the_call_and_the_model_is_free_between_steps(model_of):
    model, prompts = model_of("evict"), make_prompts()
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = [alone(model, ids, **options) for ids in prompts]
    expected = [alone(model, ids, evict_bias=3.0, **options) for ids in prompts]
    assert plain != expected
    found = []
    for continuation in generate_batch(model, prompts, evict_bias=3.0, max_batch_size=2, **options):
        found.append(continuation)
        assert model.dms.evict_bias == 0.0
        assert alone(model, prompts[continuation.prompt], **options) == plain[continuation.prompt]
    assert [c.tokens for c in sorted(found)] == expected
    running = generate_batch(model, prompts, max_batch_size=2, **options)
    next(running)
    set_mode(model, "dense")
    with pytest.raises(ValueError, match="mode is 'dense' and was 'evict'"):
        list(running)


def test_a_model_without_gates(build_model):
    model, prompts = build_model("qwen3"), make_prompts()
    options = {"max_new_tokens": 8, "do_sample": False}
    found = sorted(dms.generate_batch(model, prompts, max_batch_size=4, **options))
    assert [c.tokens for c in found] == [alone(model, ids, **options) for ids in prompts]


@pytest.mark.parametrize(
    "family",
    [
        "gemma4_text",
        "lfm2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_next", "gpt_oss", "gemma3n_text", "opt", "gpt2", "qwen3_moe", "gpt_neox", "cohere2", "exaone4")
        ),
    ],
)
def test_other_families(family, build_gated):
    model, prompts = build_gated(family), make_prompts((3, 30, 12, 7))
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    for mode in ("evict", "dense"):
        set_mode(model, mode)
        found = sorted(generate_batch(model, prompts, max_batch_size=3, **options))
        assert [c.tokens for c in found] == [alone(model, ids, **options) for ids in prompts]


@pytest.mark.parametrize("gates", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rotary_frequencies_that_depend_on_the_length(gates, build_model, build_gated):
    """phi3's switch beyond 64 tokens: all prompts on one side of it, whatever reads them in parts, or none."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    options = {"rope_parameters": rope, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    model = build_gated("phi3", **options) if gates else build_model("phi3", **options)
    if gates:
        set_mode(model, "evict")
    for lengths in ((9, 30, 3), (70, 90, 130)):
        prompts = make_prompts(lengths)
        found = sorted(generate_batch(model, prompts, max_new_tokens=8, do_sample=False, prefill_chunk_size=16))
        assert [c.tokens for c in found] == [alone(model, ids, max_new_tokens=8, do_sample=False) for ids in prompts]
    with pytest.raises(ValueError, match="prompt 1, with max_new_tokens 98 tokens, needs others than the first, with 17"):
        list(generate_batch(model, make_prompts((9, 90)), max_new_tokens=8, do_sample=False))
    assert gates or not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "max_new_tokens is None"),
        ({"max_new_tokens": 0}, "greater than 0, but is 0"),
        ({"max_new_tokens": 2, "max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_new_tokens": 2, "num_beams": 3}, "ask for beam_search"),
        ({"max_new_tokens": 2, "prompt_lookup_num_tokens": 3}, "ask for assisted_generation"),
        ({"max_new_tokens": 2, "cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"max_new_tokens": 2, "use_cache": False}, "use_cache is False"),
        ({"max_new_tokens": 2, "max_time": 1.0}, "max_time is 1.0"),
        ({"max_new_tokens": 2, "num_return_sequences": 3}, "num_return_sequences.*got 3"),
        ({"max_new_tokens": 2, "stop_strings": ["x"]}, "give the tokenizer"),
        ({"max_new_tokens": 2, "streamer": 3}, "was given streamer"),
        ({"max_new_tokens": 2, "evict_bias": 1.0}, "evict_bias has no effect in mode 'dense'"),
    ],
)
def test_options_that_it_does_not_serve_are_refused_at_once(options, said, model_of):
    with pytest.raises(ValueError, match=said):
        generate_batch(model_of("dense"), make_prompts(), **options)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("import os", "prompt 1 is a str; give token ids"),
        ([], "prompt 1 is a list of shape"),
        ([[3, 4]], r"shape \(1, 2\)"),
        ([0.5], "float"),
        (Prompt([3], seeds=[1]), "prompt 1 has seeds"),
        (Prompt([3], seeds=[]), "prompt 1 has an empty list of seeds"),
    ],
)
def test_prompts_that_are_none_are_refused_when_they_come(prompt, said, model_of):
    do_sample = isinstance(prompt, Prompt) and not prompt.seeds
    with pytest.raises(ValueError, match=said):
        list(generate_batch(model_of("dense"), [[3, 4], prompt], max_new_tokens=2, do_sample=do_sample))


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_text_decoders_inside_other_models(model_type):
    model, prompts = dms.retrofit(build_wrapper(model_type), dms.DMSConfig(window=4)), make_prompts((3, 30, 12))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for mode in ("evict", "dense"):
        set_mode(model, mode)
        found = sorted(generate_batch(model, prompts, max_batch_size=2, **options))
        assert [c.tokens for c in found] == [alone(model, ids, **options) for ids in prompts]


def test_models_that_it_does_not_serve_are_refused_by_name(build_model):
    for model, said in [
        (build_model("minimax"), "cannot serve MiniMaxForCausalLM: it works with a cache of its own kind"),
        (torch.nn.Linear(2, 2), "cannot serve Linear: it is no decoder of transformers"),
        (build_model("llama").model, "cannot serve LlamaModel: it is no decoder of transformers"),
    ]:
        with pytest.raises(ValueError, match=said):
            generate_batch(model, make_prompts(), max_new_tokens=2)


def test_a_bound_in_bytes_and_modes_of_training_are_refused(build_gated):
    model = build_gated()
    set_mode(model, "evict")
    model.dms.max_cache_bytes = 10**6
    with pytest.raises(ValueError, match="max_cache_bytes bounds one cache"):
        generate_batch(model, make_prompts(), max_new_tokens=2)
    set_mode(model, "train")
    with pytest.raises(ValueError, match="mode is 'train'"):
        generate_batch(model, make_prompts(), max_new_tokens=2)

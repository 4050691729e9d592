"""Assisted generation: what speculation does not accept leaves no trace, in the model's cache as in its assistant's."""

import pytest
import torch

from dms.cache import CompactedLayer, DMSCache, masked_cache
from dms.modes import set_mode

NEW = 30


@pytest.fixture
def crops(monkeypatch):
    """How many tokens each crop of a compacted layer took back."""
    taken, crop = [], CompactedLayer.crop
    monkeypatch.setattr(CompactedLayer, "crop", lambda layer, count: (taken.append(-count), crop(layer, count))[1])
    return taken


@pytest.fixture
def prompt():
    """One that repeats itself, for prompt lookup."""
    return torch.arange(2, 14).repeat(4)[None]


@pytest.fixture
def assistant(build_gated):
    """`assistant(mode)`: of the same text model, but for its gates and a little noise, so that it is right often and not always."""

    def build(mode: str, family: str = "llama"):
        model = build_gated(family, window=2, hidden_size=32, max_position_embeddings=4096)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        set_mode(model, mode)
        model.generation_config.num_assistant_tokens = 4
        model.generation_config.assistant_confidence_threshold = 0.0
        return model

    return build


def _greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize(
    "family",
    ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), "gemma4_text", "gpt_oss", pytest.param("lfm2", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_prompt_lookup(family, alignment, evicting, prompt, crops):
    model = evicting(family, alignment=alignment)
    expected = _greedy(model, prompt)
    crops.clear()
    assert torch.equal(_greedy(model, prompt, prompt_lookup_num_tokens=5), expected)
    assert sum(crops) > 0


@pytest.mark.parametrize("mode", ["dense", "evict"])
@pytest.mark.parametrize("assistant_mode", ["dense", "evict"])
def test_an_assistant(mode, assistant_mode, evicting, assistant, prompt, crops):
    model, helper = evicting(window=6), assistant(assistant_mode)
    set_mode(model, mode)
    expected = _greedy(model, prompt)
    read = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    crops.clear()
    try:
        found = _greedy(model, prompt, assistant_model=helper)
    finally:
        handle.remove()
        set_mode(model, "evict")
    assert torch.equal(found, expected)
    # Some guesses were right, so that fewer forwards were needed than tokens, and some were not.
    assert len(read) < 0.9 * NEW and sum(read) > prompt.shape[1] + NEW
    assert (sum(crops) > 0) == ("evict" in (mode, assistant_mode))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "lfm2"])
def test_an_assistant_with_mixed_layers(family, evicting, assistant, prompt):
    model = evicting(family)
    assert torch.equal(_greedy(model, prompt, assistant_model=assistant("evict", family)), _greedy(model, prompt))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2"])
def test_going_on_after_an_assisted_call(family, evicting, prompt):
    """Plainly, in the cache that it returned. (Assisted once more transformers would read the whole text again, into any cache.)"""
    model = evicting(family)
    given = DMSCache(model)
    first = _greedy(model, prompt, prompt_lookup_num_tokens=5, past_key_values=given, return_dict_in_generate=True)
    assert first.past_key_values is given and given.get_seq_length() == first.sequences.shape[1] - 1
    text = torch.cat([first.sequences, prompt[:, :9]], 1)
    expected = _greedy(model, text, past_key_values=masked_cache(model))
    assert torch.equal(_greedy(model, text, past_key_values=given), expected)
    assert not any(getattr(layer, "record_past", False) for layer in given.layers)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2"])
def test_a_cache_reset_after_an_assisted_call(family, evicting, prompt):
    model = evicting(family)
    given = DMSCache(model)
    expected = _greedy(model, prompt, past_key_values=given, prompt_lookup_num_tokens=5)
    given.reset()
    assert torch.equal(_greedy(model, prompt, past_key_values=given), expected)


@pytest.mark.parametrize("mode", ["dense", "evict"])
def test_assisted_by_its_own_first_layers(mode, build_gated, make_batch):
    model = build_gated(num_hidden_layers=4, max_position_embeddings=4096)
    set_mode(model, mode)
    ids = make_batch(1, 30)["input_ids"]
    expected = _greedy(model, ids)
    assert torch.equal(_greedy(model, ids, assistant_early_exit=2), expected)
    # The layers that it left out are there again.
    assert torch.equal(_greedy(model, ids), expected)

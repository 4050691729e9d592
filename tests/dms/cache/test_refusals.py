"""What a compacted cache refuses, in what words, and that it is as before afterwards."""

import peft
import pytest
import torch
from transformers import StaticCache

from dms.cache import CacheFull, CompactedLayer, DMSCache, held_bytes
from dms.modes import set_mode

ONE = torch.ones(1, 1, dtype=torch.long)


def _ones(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def _goes_on(one) -> None:
    """What was refused left no trace."""
    one.decode(6)
    one.same_counts()
    assert one.largest[0] < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_crop_too_far(family, evicting, lockstep):
    one = lockstep(evicting(family))
    one.read(_ones(1, 6))
    with pytest.raises(ValueError, match="crop of 1 tokens: 0 were appended since the last crop"):
        one.cache.crop(-1)
    for cache in (one.cache, one.oracle):
        cache.activate_past_recording()
    one.read(_ones(1, 4))
    with pytest.raises(ValueError, match=r"crop of 5 tokens: 4 were appended.*call activate_past_recording.*or fork"):
        one.cache.crop(-5)
    with pytest.raises(ValueError, match=r"crop\(4\).*below 0, as crop\(-4\)"):
        one.cache.crop(4)
    one.crop(3)
    one.same_counts()
    with pytest.raises(ValueError, match="crop of 1 tokens: 0 were appended"):
        one.cache.crop(-1)
    one.crop(0)
    one.read(_ones(1, 5))
    one.crop(0)
    one.same_counts()
    assert one.largest[0] < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_another_number_of_sequences(batch, evicting, lockstep):
    one = lockstep(evicting())
    one.read(_ones(2, 20))
    ids = torch.full((batch, 3), 5)
    with pytest.raises(ValueError, match=f"cache holds 2 sequences and the batch has {batch}.*batch_repeat_interleave"):
        one.model(input_ids=ids, past_key_values=one.cache)
    with pytest.raises(ValueError, match=f"cache holds 2 sequences and the prompts are {batch}"):
        one.model.generate(torch.full((batch, 23), 5), past_key_values=one.cache, max_new_tokens=1)
    _goes_on(one)


def test_keys_of_another_shape(evicting, lockstep):
    """Of a model with as many layers and other heads."""
    one = lockstep(evicting())
    one.read(_ones(2, 20))
    other = evicting(num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"2 sequences of 2 heads of 16, and keys came as.*each model's own cache"), torch.no_grad():
        other(input_ids=torch.full((2, 1), 5), past_key_values=one.cache)
    _goes_on(one)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("mode", ["dense", "train"])
def test_tokens_of_another_mode(family, mode, evicting, lockstep):
    """Layers without gates come first in some families, and must not run ahead."""
    one = lockstep(evicting(family))
    one.read(_ones(2, 20))
    set_mode(one.model, mode)
    with pytest.raises(ValueError, match="belongs to evict mode"):
        one.model(input_ids=torch.full((2, 3), 5), past_key_values=one.cache)
    set_mode(one.model, "evict")
    _goes_on(one)


def test_caches_that_cannot_evict(evicting):
    model = evicting()
    ids = torch.full((2, 3), 5)
    with pytest.raises(ValueError, match=r"StaticLayer.*DMSCache\(model\)"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="evict mode makes a cache of its own"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="not offloaded"):
        DMSCache(model).layers[0].offload()


@pytest.mark.parametrize("page_size", [0, 8, 48, 128])
def test_page_sizes(page_size, evicting):
    with pytest.raises(ValueError, match=f"page_size is {page_size}; a page holds 16, 32 or 64"):
        CompactedLayer(evicting().dms.config, page_size)
    with pytest.raises(ValueError, match="a page holds 16, 32 or 64"):
        DMSCache(evicting(), page_size=page_size)


@pytest.mark.parametrize("mode", ["dense", "train"])
def test_evict_bias_without_eviction(mode, evicting):
    model = evicting()
    set_mode(model, mode)
    with pytest.raises(ValueError, match=f"evict_bias has no effect in mode '{mode}'.*set_mode"):
        model.generate(torch.full((1, 3), 5), max_new_tokens=1, evict_bias=1.0)
    set_mode(model, "evict")


def test_several_documents_into_a_cache_that_holds_some(evicting, lockstep):
    """A row's last document goes on in an empty cache alone, and not on trial."""
    one = lockstep(evicting())
    packed = {"input_ids": torch.full((1, 8), 5), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}
    cache = DMSCache(one.model)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"several documents in a row.*empty cache alone, and not on trial"):
        one.model(**packed, past_key_values=cache)
    one.model(**packed, past_key_values=one.cache)
    assert one.cache.report(warn=False).seen == 4 * 2 * 2


def test_a_decode_step_without_room(evicting, lockstep):
    bound = 60_000
    one = lockstep(evicting(), page_size=16, max_cache_bytes=bound)
    one.read(_ones(1, 20))
    with pytest.raises(CacheFull, match=r"max_cache_bytes is 60,000.*end some sequences.*evict more.*or raise the bound"):
        one.decode(1000)
    one.same_counts()
    assert held_bytes(one.cache) <= bound
    # No sooner than a page or a step of the tables for each of 2 layers and 2 heads is too much.
    page = one.cache.layers[0].store.pool.page_bytes
    assert held_bytes(one.cache) + 4 * (page + 8 * 4) > bound
    one.cache.budget.max_bytes = 2 * bound
    _goes_on(one)


def test_a_prompt_without_room(evicting, lockstep):
    one = lockstep(evicting(), page_size=16, max_cache_bytes=60_000)
    with pytest.raises(CacheFull, match="max_cache_bytes is 60,000"):
        one.read(_ones(2, 900))
    assert held_bytes(one.cache) == 0 and one.cache.get_seq_length() == 0
    with pytest.raises(CacheFull, match="max_cache_bytes is 60,000"):
        one.model.generate(torch.full((2, 900), 5), past_key_values=one.cache, max_new_tokens=1)
    one.read(_ones(2, 60))
    _goes_on(one)


@pytest.mark.parametrize("change", ["fork", "repeat", "reorder"])
def test_rows_without_room(change, evicting, lockstep):
    one = lockstep(evicting(), page_size=16, max_cache_bytes=10**9)
    one.read(_ones(2, 60))
    one.cache.budget.max_bytes = held_bytes(one.cache) + 2000
    with pytest.raises(CacheFull, match="max_cache_bytes"):
        {
            "fork": one.cache.fork,
            "repeat": lambda: one.cache.batch_repeat_interleave(3),
            "reorder": lambda: one.cache.reorder_cache(torch.tensor([0, 0, 1, 1])),
        }[change]()
    one.cache.budget.max_bytes += 8000
    _goes_on(one)
    # As many rows as before fit, whichever they are: the last pages of those that go are free again.
    one.cache.budget.max_bytes = held_bytes(one.cache)
    one.select([1, 1])
    one.same_counts()


def test_rings_count_before_their_layers_have_tokens(evicting):
    """One token in a window of 500: nothing but rings."""
    model = evicting(window=500)
    ids = torch.full((1, 1), 5)
    cache = DMSCache(model)
    model(input_ids=ids, past_key_values=cache)
    needed = held_bytes(cache)
    for bound, fits in ((needed, True), (needed - 1, False), (needed // 2 - 1, False)):
        cache = DMSCache(model, max_cache_bytes=bound)
        if fits:
            model(input_ids=ids, past_key_values=cache)
        else:
            with pytest.raises(CacheFull):
                model(input_ids=ids, past_key_values=cache)
        assert held_bytes(cache) == (needed if fits else 0)


def test_a_bound_for_the_caches_that_generate_makes(evicting):
    model = evicting(window=3)
    model.dms.max_cache_bytes = 40_000
    try:
        with pytest.raises(CacheFull, match="max_cache_bytes is 40,000"):
            model.generate(torch.full((1, 3), 5), max_new_tokens=1000)
    finally:
        model.dms.max_cache_bytes = None


def test_prefix_tuning_is_refused_by_name(build_gated, make_batch):
    """Its keys and values come from no token; adapters of other kinds generate as before."""
    model = build_gated()
    ids = make_batch(1, 20)["input_ids"]
    set_mode(model, "evict")
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    prefixed = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ValueError, match=r"PREFIX_TUNING puts keys and values before a prompt.*LoRA"):
        prefixed.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    set_mode(model, "evict")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    assert torch.equal(adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


def test_an_empty_layer_has_no_store(evicting):
    with pytest.raises(RuntimeError, match="this cache layer is empty; what it stores begins with the first token"):
        _ = DMSCache(evicting()).layers[0].store

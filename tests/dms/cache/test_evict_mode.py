"""Caches of evict mode as `generate` and users handle them: cropped, reordered, continued, and refused where they do not fit."""

import itertools

import pytest
import torch
from passes import TOLERANCE, read, read_whole
from transformers.cache_utils import DynamicCache, StaticCache

from dms.cache import CompactedLayer, DMSCache, masked_cache
from dms.cache.stats import masked_ratios
from dms.modes import set_mode


@pytest.mark.parametrize("make_cache", [DMSCache, masked_cache])
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_cropped_tokens_leave_no_trace(alignment, make_cache, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment)
    batch, other = make_batch(2, 60, left=[0, 7]), make_batch(2, 60, left=[0, 7], seed=9)
    set_mode(model, "evict")
    whole = read_whole(model, batch)
    _, cache = read(model, batch, [40], make_cache(model))
    cache.activate_past_recording()
    read(model, other, [4, 1, 1], cache, 40)
    cache.crop(-6)
    logits, _ = read(model, batch, [1] * 20, cache, 40)
    assert (logits - whole[:, 40:]).abs().max() < TOLERANCE
    again = read(model, batch, [60], make_cache(model))[1]
    if make_cache is masked_cache:
        assert masked_ratios(cache) == masked_ratios(again)
    else:
        cache.crop(0)
        found, expected = cache.report(), again.report()
        assert (found.seen, found.alive, found.cr_decided) == (expected.seen, expected.alive, expected.cr_decided)


@pytest.mark.parametrize(
    ("method", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_decisions_follow_their_sequences(method, argument, rows, build_gated, make_batch):
    model = build_gated("llama", alignment="next")
    batch = make_batch(3, 50, left=[0, 7, 3])
    set_mode(model, "evict")
    whole = read_whole(model, batch)[rows]
    _, cache = read(model, batch, [40])
    getattr(cache, method)(argument)
    logits, _ = read(model, {name: tensor[rows] for name, tensor in batch.items()}, [1] * 10, cache, 40)
    assert (logits - whole[:, 40:]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        {"do_sample": True, "num_beams": 2, "top_k": 0},
    ],
    ids=["beams", "samples", "sampled beams"],
)
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_generate_with_and_without_a_cache(alignment, options, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment)
    batch = make_batch(2, 24, left=[0, 7])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def generate(mode, use_cache):
        torch.manual_seed(3)
        set_mode(model, mode)
        return model.generate(**inputs, max_new_tokens=12, use_cache=use_cache, **options)

    cached = generate("evict", True)
    assert len(cached) == 2 * options.get("num_return_sequences", 1)
    assert torch.equal(cached, generate("evict", False))
    assert not torch.equal(cached, generate("dense", True))


def test_prompt_lookup_decoding(build_gated):
    """Speculation crops what was not accepted."""
    model = build_gated("llama", alignment="next")
    ids = torch.arange(2, 12).repeat(4)[None]
    set_mode(model, "evict")
    cropped = []
    crop = CompactedLayer.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompactedLayer, "crop", lambda layer, n: (cropped.append(n), crop(layer, n))[1])
        speculated = model.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert any(cropped)
    assert torch.equal(speculated, model.generate(ids, max_new_tokens=24, do_sample=False))


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_masked_ratios_against_loops(alignment, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment, window=5, sinks=2)
    batch = make_batch(2, 40, left=[0, 7])
    set_mode(model, "evict")
    _, cache = read(model, batch, [30] + [1] * 10, masked_cache(model))
    compacted = read(model, batch, [30] + [1] * 10)[1].report()
    evicted = decided = seen = alive = 0
    for layer in cache.layers:
        for row, start in ((0, 0), (1, 7)):
            gates = layer.decided.decision[row, start:].tolist()
            n = len(gates)
            for k, head in itertools.product(range(n), range(2)):
                gate = k if alignment == "own" else k + 1
                evict = gate < n and gates[gate][head]
                decided += gate < n
                evicted += evict
                seen += 1
                alive += not evict or n - 1 - k <= 5 or k < 2
    ratios = masked_ratios(cache)
    assert (ratios["seen"], ratios["alive"]) == (seen, alive)
    assert ratios["cr"] == pytest.approx(seen / alive) and ratios["cr"] > 1.3
    assert ratios["cr_decided"] == pytest.approx(1 / (1 - evicted / decided)) and ratios["cr_decided"] > 1.3
    assert {name: getattr(compacted, name) for name in ratios} == pytest.approx(ratios)


def test_a_cache_filled_otherwise_is_refused(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    _, cache = read(model, batch, [10])
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="10 tokens that were read without eviction"):
        read(model, batch, [1], cache, 10)
    _, cache = read(model, batch, [10], masked_cache(model))
    set_mode(model, "dense")
    read(model, batch, [4], cache, 10)
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="14 tokens and decisions for 10"):
        read(model, batch, [1], cache, 14)
    _, cache = read(model, batch, [10])
    set_mode(model, "dense")
    with pytest.raises(ValueError, match="belongs to evict mode"):
        read(model, batch, [4], cache, 10)


def test_caches_that_do_not_grow_are_refused(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="StaticLayer"):
        read(model, batch, [10], StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(batch["input_ids"], max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_a_given_dynamic_cache_is_used(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 40)
    set_mode(model, "evict")
    cache = DynamicCache()
    logits, same = read(model, batch, [20] + [1] * 20, cache)
    assert same is cache and (logits - read_whole(model, batch)).abs().max() < TOLERANCE
    cache.reset()
    assert cache.get_seq_length() == 0

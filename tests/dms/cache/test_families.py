"""Families with layers that transformers caches its own way: `generate` and the whole life of a cache, against reading without one."""

import pytest
import torch

from dms.cache import DMSCache, masked_cache

# Without a cache generate says that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore:use_cache is False")

MIXED = ["gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "exaone4", "cohere2", "lfm2", "qwen3_next"]
WAYS = {
    "greedy": {},
    "samples": {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def _generate(model, inputs, **options):
    torch.manual_seed(3)
    return model.generate(**inputs, **({"max_new_tokens": 14, "do_sample": False} | options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", MIXED)
def test_the_same_tokens_as_without_a_cache(family, way, evicting, make_batch):
    model = evicting(family)
    batch = make_batch(2, 30, left=[0, 11])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = _generate(model, inputs, use_cache=False, **WAYS[way])
    assert torch.equal(_generate(model, inputs, **WAYS[way]), expected)
    given = DMSCache(model, page_size=16)
    assert torch.equal(_generate(model, inputs, past_key_values=given, **WAYS[way]), expected)
    assert given.report(warn=False).cr > 1.1
    assert torch.equal(_generate(model, inputs, past_key_values=masked_cache(model), **WAYS[way]), expected) or way != "greedy"


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("family", MIXED)
def test_prompts_in_chunks(family, chunk, evicting, make_batch):
    model = evicting(family)
    inputs = {"input_ids": make_batch(2, 30)["input_ids"]}
    expected = _generate(model, inputs)
    assert torch.equal(_generate(model, inputs, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("family", MIXED)
def test_the_life_of_a_cache(family, evicting, lockstep, page_accounts):
    one = lockstep(evicting(family), page_size=16)
    one.read(torch.ones(2, 40, dtype=torch.long))
    one.decode(5)
    fork = one.fork()
    rows = torch.tensor([1, 0, 0, 1])
    one.cache.reorder_cache(rows)
    # The reference's layers of linear attention know no other change of rows.
    one.oracle.reorder_cache(rows)
    one.mask = one.mask[rows]
    one.decode(5, seed=1)
    one.cache.batch_select_indices(torch.tensor([True, False, True, False]))
    one.oracle.reorder_cache(torch.tensor([0, 2]))
    one.mask = one.mask[[0, 2]]
    one.read(torch.ones(2, 20, dtype=torch.long), seed=2)
    fork.cache.batch_repeat_interleave(3)
    fork.oracle.reorder_cache(torch.arange(2).repeat_interleave(3))
    fork.mask = fork.mask.repeat_interleave(3, 0)
    fork.decode(10, seed=3)
    for each in (one, fork):
        each.same_counts()
        assert each.largest[0] < 1e-4
    page_accounts([one.cache, fork.cache])
    one.cache.reset()
    one.oracle.reset()
    one.mask = one.mask[:, :0]
    one.read(torch.ones(2, 20, dtype=torch.long), seed=4)
    one.decode(5)
    one.same_counts()
    assert one.largest[0] < 1e-4
    page_accounts([one.cache, fork.cache])

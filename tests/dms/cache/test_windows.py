"""Caches of several windows in what `generate` does: the same tokens as reading the whole text at each step, masked."""

import copy

import pytest
import torch

from dms.cache import CompactedLayer, DMSCache
from dms.cache.pending import EVICT, KEEP, fates, list_of
from dms.cache.store import Store

# Without a cache generate says that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore:use_cache is False")

WAYS = {
    "greedy": {},
    "samples": {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 9},
}


def _generate(model, inputs, **options):
    torch.manual_seed(3)
    return model.generate(**inputs, **({"max_new_tokens": 14, "do_sample": False} | options))


@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens(way, alignment, evicting, make_batch):
    # In float64: next to a threshold, or between two beams, float32's sums fall on either side, as the machine adds them.
    model, batch = copy.deepcopy(evicting(window=(2, 9, 25), alignment=alignment)).double(), make_batch(2, 60, left=[0, 13])
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {name: value for name, value in WAYS[way].items() if name != "prefill_chunk_size"}
    expected = _generate(model, prompts, use_cache=False, **options)
    out = _generate(model, prompts, return_dict_in_generate=True, **WAYS[way])
    assert torch.equal(out.sequences, expected)
    cache = out.past_key_values
    assert isinstance(cache, DMSCache) and type(cache.layers[0].store) is Store
    assert cache.report().warnings == [] and cache.report().cr > 1.5


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_assisted_generation_takes_tokens_back(alignment, evicting, monkeypatch):
    taken, crop = [], CompactedLayer.crop
    monkeypatch.setattr(CompactedLayer, "crop", lambda layer, count: (taken.append(-count), crop(layer, count))[1])
    model, prompt = evicting(window=(1, 8, 20), alignment=alignment), torch.arange(2, 14).repeat(4)[None]
    expected = model.generate(prompt, max_new_tokens=30, do_sample=False)
    taken.clear()
    assert torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=5), expected)
    assert sum(taken) > 0


@pytest.mark.parametrize("family", ["gemma4_text", "gpt_oss"])
def test_other_families(family, evicting, lockstep, page_accounts):
    """Layers that follow others, and sink logits."""
    one = lockstep(evicting(family, window=(2, 12, 40), sinks=1), page_size=16)
    one.read(torch.ones(2, 70, dtype=torch.long))
    one.decode(30)
    one.read(torch.ones(2, 40, dtype=torch.long), seed=5)
    one.decode(3, seed=9)
    one.same_counts()
    page_accounts([one.cache])
    assert one.largest[0] < 1e-4


def test_the_first_decision_to_evict_gives_a_token_its_state():
    decisions = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1]]).bool()[None, :, None]
    state = fates(decisions)[0, :, 0]
    assert state.tolist() == [KEEP, EVICT, 3, 4, 3, EVICT] and state.dtype == torch.uint8
    assert list_of(state[[0, 2, 3]]).tolist() == [0, 1, 2]
    one = decisions[..., 0]
    assert fates(one) is one

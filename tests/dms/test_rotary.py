"""Rotary frequencies that depend on the length: what is read in parts equals one pass, or is refused with the reason."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

import dms
from dms.cache import masked_cache
from dms.evaluation.engine.decode import read
from dms.hf_compat import cache_argument
from dms.modes import reading, set_mode

LIMIT = 64
_PAIRS = 8
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * _PAIRS,
    "long_factor": [1.0 + 3.0 * i for i in range(_PAIRS)],
    "original_max_position_embeddings": LIMIT,
}
CONFIGS = {
    "longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": LIMIT}),
    "longrope of another family": ("llama", {"rope_parameters": _LONGROPE}),
    # Grows beyond the context that the configuration names.
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": LIMIT},
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request, build_gated):
    family, options = CONFIGS[request.param]
    return build_gated(family, window=8, **copy.deepcopy(options))


@pytest.fixture
def ids(make_batch):
    return make_batch(2, 2 * LIMIT)["input_ids"]


@torch.no_grad()
def _in_parts(model, ids, cache, size):
    with reading(model, ids.shape[1]):
        return torch.cat([model(input_ids=part, use_cache=True, **cache_argument(model, cache)).logits for part in ids.split(size, 1)], 1)


@pytest.mark.parametrize("size", [1, 24])
@pytest.mark.parametrize("mode", ["dense", "evict"])
def test_parts_equal_one_pass(mode, size, model, ids):
    set_mode(model, mode)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        short = model(input_ids=ids[:, : LIMIT - 4], use_cache=False).logits
    # The frequencies matter: a text that stops before the change is rotated otherwise.
    assert not torch.allclose(short, expected[:, : LIMIT - 4], atol=1e-3)
    cache = DynamicCache(config=model.config) if mode == "dense" else dms.DMSCache(model)
    torch.testing.assert_close(_in_parts(model, ids, cache, size), expected, atol=2e-4, rtol=0)
    # And a longer text before has left nothing behind.
    cache = DynamicCache(config=model.config) if mode == "dense" else dms.DMSCache(model)
    torch.testing.assert_close(_in_parts(model, ids[:, : LIMIT - 4], cache, size), short, atol=2e-4, rtol=0)


def test_prefill_in_parts_equals_a_prefill_in_one(model, make_batch):
    """Padding does not count, and prompts that stop before the change decode across it as transformers does."""
    set_mode(model, "evict")
    for length in (LIMIT + 30, LIMIT - 20):
        batch = make_batch(2, length, left=[0, 7])
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = []
        for chunk in (None, 16):
            model.dms.prefill_chunk = chunk
            out = model.generate(**prompt, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
            found.append(torch.stack(out.logits))
        torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=0)


def test_unannounced_parts_are_refused(model, ids):
    set_mode(model, "evict")
    for cache in (dms.DMSCache(model), masked_cache(model)):
        with torch.no_grad():
            model(input_ids=ids[:, : LIMIT - 8], use_cache=True, **cache_argument(model, cache))
            with pytest.raises(
                ValueError,
                match=rf"depend on a text's length beyond {LIMIT} tokens: the cache holds keys for a text of {LIMIT - 8}.*one pass",
            ):
                model(input_ids=ids[:, LIMIT - 8 :], use_cache=True, **cache_argument(model, cache))
            # Nothing was lost, and what needs no other frequencies goes on.
            model(input_ids=ids[:, LIMIT - 8 : LIMIT - 2], use_cache=True, **cache_argument(model, cache))
        assert cache.get_seq_length() == LIMIT - 2


def test_a_saved_cache_knows_the_length_that_it_was_read_for(model, ids, tmp_path):
    set_mode(model, "evict")
    cache = dms.DMSCache(model)
    with torch.no_grad(), reading(model, ids.shape[1]):
        expected = model(input_ids=ids[:, :30], use_cache=True, **cache_argument(model, cache)).logits
        cache.save(tmp_path / "cache")
        again = dms.DMSCache.load(tmp_path / "cache", model)
        more = [model(input_ids=ids[:, 30:90], use_cache=True, **cache_argument(model, one)).logits for one in (cache, again, cache.fork())]
    assert expected.isfinite().all() and torch.equal(more[0], more[1])
    with torch.no_grad(), pytest.raises(ValueError, match="do not go together"):
        fresh = dms.DMSCache.load(tmp_path / "cache", model)
        model(input_ids=ids[:, 30:50], use_cache=True, **cache_argument(model, fresh))


def test_evaluation_reads_as_one_pass_does(model, ids):
    """Dense, whatever the size of the parts: the figures are those of the model that people run."""
    set_mode(model, "dense")
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, 99:-1].log_softmax(-1)
    expected = -whole.gather(-1, ids[:, 100:, None])[..., 0]
    for chunk in (None, 16):
        found = read(model, ids, 100, DynamicCache(config=model.config), chunk=chunk)
        torch.testing.assert_close(found.nll_BN, expected, atol=2e-4, rtol=0)


def test_rows_divided_among_processes_are_refused(model):
    from dms.training.packed_attention import check_sharing

    check_sharing(model, 2, LIMIT, model.dms.skipped)
    with pytest.raises(ValueError, match="depend on a text's length"):
        check_sharing(model, 2, 2 * LIMIT, model.dms.skipped)


def test_other_models_are_left_alone(build_gated):
    assert build_gated("llama").dms.rotary.changes == {}

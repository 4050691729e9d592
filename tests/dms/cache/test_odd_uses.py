"""What users do beside decoding: autocast, inference mode, gradients, copies and pickles, passes that fail, forks that go."""

import copy
import gc
import io
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicCache

import dms
from dms.cache import DMSCache
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.engine.run_end import evaluate_run
from dms.modes import set_mode


@pytest.fixture
def model(build_gated):
    model = build_gated("llama", window=6)
    set_mode(model, "evict")
    return model


@pytest.fixture
def ids(make_batch):
    return make_batch(2, 90)["input_ids"]


def _read(model, ids, cache, parts=(60, 1, 29)):
    logits = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(list(parts), 1)]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(dtype, model, ids):
    whole = _read(model, ids, DMSCache(model))
    cache = DMSCache(model)
    with torch.autocast("cpu", dtype):
        half = _read(model, ids, cache)
    assert next(iter(cache.compacted_layers().values())).store.pool.rows.dtype == dtype
    assert torch.nn.functional.cosine_similarity(half.float(), whole, dim=-1).mean() > 0.98


@torch.no_grad()
def test_a_cache_made_in_inference_mode_goes_on_outside(model, ids):
    whole = _read(model, ids, DMSCache(model))
    cache = DMSCache(model)
    with torch.inference_mode():
        first = model(input_ids=ids[:, :60], past_key_values=cache).logits
        fork = cache.fork()
    rest = _read(model, ids[:, 60:], cache, (1, 29))
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 1e-5
    assert torch.equal(_read(model, ids[:, 60:], fork, (1, 29)), rest)


def test_gradients_are_refused_and_not_wrong(model, ids):
    cached = model(input_ids=ids, labels=ids)
    assert isinstance(cached.past_key_values, DMSCache)
    with pytest.raises(RuntimeError, match="has no gradient; call the model with use_cache=False"):
        cached.loss.backward()
    whole = model(input_ids=ids, labels=ids, use_cache=False)
    assert torch.allclose(whole.loss, cached.loss, atol=1e-5)
    whole.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_copies_and_pickles_of_a_model(model, ids):
    whole = _read(model, ids, DMSCache(model))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert type(other) is type(model) and other.dms is not model.dms
        assert torch.equal(_read(other, ids, DMSCache(other)), whole)
        other.dms.layers[0].module.dms_gate.bias.fill_(100.0)
        assert not torch.equal(_read(other, ids, DMSCache(other)), whole)
    assert torch.equal(_read(model, ids, DMSCache(model)), whole)


@torch.no_grad()
def test_a_pass_that_failed_half_way(model, ids):
    def stop(*_):
        raise KeyboardInterrupt

    cache = DMSCache(model)
    model(input_ids=ids[:, :60], past_key_values=cache)
    before = cache.fork()
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids[:, 60:61], past_key_values=cache)
    handle.remove()
    with pytest.raises(ValueError, match="failed half-way: its layers hold 60, 61 tokens"):
        model(input_ids=ids[:, 61:], past_key_values=cache)
    whole = _read(model, ids, DMSCache(model))
    assert (_read(model, ids[:, 60:], before, (1, 29)) - whole[:, 60:]).abs().max() < 1e-5
    cache.reset()
    assert (_read(model, ids, cache) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_a_fork_in_a_reference_cycle_is_collected_at_a_safe_moment(model, ids):
    cache = DMSCache(model)
    model(input_ids=ids[:, :60], past_key_values=cache)
    pool = cache.layers[0].store.pool
    used = pool.num_used
    fork = cache.fork()
    model(input_ids=ids[:, 60:], past_key_values=fork)
    fork.itself = fork
    del fork
    references = pool.references.clone()
    gc.collect()
    # Nothing moves while somebody may be in the middle of the pool.
    assert torch.equal(pool.references, references) and pool.orphans
    assert pool.num_used == used and pool.num_holders == 1
    assert (_read(model, ids[:, 60:], cache, (30,)) - _read(model, ids, DMSCache(model))[:, 60:]).abs().max() < 1e-5


@torch.no_grad()
def test_a_decoder_called_with_positions(model, ids):
    named = model.model(input_ids=ids, use_cache=True)
    placed = model.model(ids, None, None, None, use_cache=True)
    assert isinstance(placed.past_key_values, DMSCache) and torch.equal(placed[0], named[0])


def test_cache_implementation_dynamic_is_ours(model, ids):
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="dynamic", return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected) and isinstance(out.past_key_values, DMSCache)


def test_assisted_generation_with_an_empty_dynamic_cache(model):
    ids = torch.arange(2, 12).repeat(4)[None]
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)
    speculated = model.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3, past_key_values=DynamicCache())
    assert torch.equal(speculated, expected)


def test_generating_without_a_cache_is_said(model, ids):
    with pytest.warns(UserWarning, match="use_cache is False .* each step reads the whole text again"):
        model.generate(ids, max_new_tokens=2, use_cache=False)


def test_a_model_with_a_cache_of_its_own_is_evaluated(build_gated):
    model = build_gated("minimax", window=6)
    document = EvaluationDocument(input_ids=torch.arange(2, 62).tolist(), role=[0] * 60, answers=[], num_bytes=60)
    evaluated = evaluate_run(model, [document])
    # A sliding window needs a cache of ours.
    assert list(evaluated.figures) == ["dense", "dms"]
    figures = evaluated.figures["dms"]
    assert figures.cr > 1.0 and figures.memory == "compacted" and figures.bytes > 0
    with pytest.raises(ValueError, match="cache of its own kind"):
        dms.DMSCache(model)

"""Caches with reserved room, whose decode steps are captured: replayed steps over a growing cache, and what ends a capture."""

import gc
import weakref

import pytest
import torch
from contents import reads_from_device
from replays import Recorders

from dms.cache import CacheFull, DMSCache, capture, masked_cache
from dms.modes import set_mode
from dms_kernels import dispatch

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")

WINDOWS = [pytest.param(5, marks=pytest.mark.slow), pytest.param((3, 8, 20), id="several")]


@pytest.fixture
def recorders(monkeypatch):
    """Kernels in the interpreter, and captures on the CPU."""
    monkeypatch.setenv("DMS_KERNELS", "triton")
    recorders = Recorders()
    monkeypatch.setitem(capture.recorders, "cpu", recorders)
    return recorders


@pytest.fixture(scope="module")
def evicting(build_gated):
    """As the other tests' models, without hooks on their gates, so that the append kernel runs them."""
    models = {}

    def get(**options):
        key = tuple(options.items())
        if key not in models:
            models[key] = build_gated("llama", hidden_size=32, max_position_embeddings=4096, **options)
            set_mode(models[key], "evict")
        return models[key]

    return get


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def _run(model, cache, ids, num_given: int, mask=None) -> torch.Tensor:
    """Logits after the prompt and after each further token."""
    found = []
    for start, end in [(0, num_given), *((i, i + 1) for i in range(num_given, ids.shape[1]))]:
        given = (
            {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]}
        )
        found.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **given).logits[:, -1])
    return torch.stack(found, 1)


@interpreted
@torch.no_grad()
@pytest.mark.parametrize("length", [17, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("alignment", ["own", pytest.param("next", marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_replayed_step_stays_right_while_the_cache_grows(evicting, recorders, window, alignment, length, monkeypatch):
    model, ids = evicting(window=window, alignment=alignment), _tokens(2, length)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = DMSCache(model, page_size=16, reserve_tokens=length)
    found = _run(model, cache, ids, 9, mask)
    monkeypatch.setenv("DMS_KERNELS", "reference")
    plain, oracle = DMSCache(model, page_size=16), masked_cache(model)
    for other in (plain, oracle):
        torch.testing.assert_close(found, _run(model, other, ids, 9, mask), atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == length and cache.report(warn=False).cr == plain.report(warn=False).cr > 1
    # One capture before there are pages, and one from then on; the step before each runs as it is.
    assert 1 <= recorders.num_recorded <= 3 and recorders.num_replayed >= length - 9 - 3 * recorders.num_recorded
    cache.layers[0].store.check()


@interpreted
@pytest.mark.slow
@torch.no_grad()
def test_longer_than_reserved_is_captured_anew(evicting, recorders, monkeypatch):
    model, ids = evicting(window=5), _tokens(2, 44)
    model.dms.evict_bias = -100.0
    try:
        cache = DMSCache(model, page_size=16, reserve_tokens=20)
        monkeypatch.setattr("dms.cache.page_pool.PagePool.growth", lambda pool: 1)
        pages = cache.layers[0].store.pool.num_pages if not cache.layers[0].is_empty else 0
        found = _run(model, cache, ids, 10)
        assert torch.equal(found, _run(model, DMSCache(model, page_size=16), ids, 10))
    finally:
        model.dms.evict_bias = 0.0
    assert cache.layers[0].store.pool.num_pages > pages and recorders.num_recorded > 2
    assert recorders.num_replayed > 15, "most steps are replayed all the same"


@interpreted
@torch.no_grad()
def test_nothing_old_is_kept(evicting, recorders):
    """Neither a pool's tensors that were replaced, nor the cache itself."""
    model, ids = evicting(window=5), _tokens(1, 16)
    cache = DMSCache(model, page_size=16, reserve_tokens=64)
    _run(model, cache, ids, 9)
    assert recorders.num_replayed and cache.captured is not None
    pool = cache.layers[0].store.pool
    rows, held = weakref.ref(pool.rows), weakref.ref(cache)
    # The capture goes with the next step: a graph holds what it was made with.
    cache.captured = None
    pool.resize(pool.num_pages + 3)
    assert rows() is None
    del cache, pool
    gc.collect()
    assert held() is None


@interpreted
@pytest.mark.slow
@torch.no_grad()
def test_forks_turns_beams_and_tokens_on_trial(evicting, recorders):
    model, ids = evicting(window=5), _tokens(2, 40)
    cache, plain = DMSCache(model, page_size=16, reserve_tokens=64), DMSCache(model, page_size=16)
    for one in (cache, plain):
        _run(model, one, ids[:, :24], 9)
    replayed = recorders.num_replayed
    fork, other = cache.fork(), plain.fork()
    assert fork.captured is None
    # In turns, so that each must keep to its own.
    for i in range(24, 36):
        for mine, theirs, token in ((cache, plain, ids[:, i : i + 1]), (fork, other, ids[:, i - 20 : i - 19])):
            expected = model(input_ids=token, past_key_values=theirs, use_cache=True).logits
            assert torch.equal(model(input_ids=token, past_key_values=mine, use_cache=True).logits, expected)
    assert recorders.num_replayed > replayed + 12
    # Another turn, read at once, then steps.
    for one in (fork, other):
        one.answer = _run(model, one, ids[:, 20:40], 7)
    assert torch.equal(fork.answer, other.answer)
    # Tokens on trial run as they are.
    replayed = recorders.num_replayed
    for one in (cache, plain):
        one.activate_past_recording()
        one.answer = model(input_ids=ids[:, 36:37], past_key_values=one, use_cache=True).logits
        one.crop(-1)
        one.stop_past_recording()
    assert torch.equal(cache.answer, plain.answer) and recorders.num_replayed == replayed
    told = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        outs = []
        for options in ({"reserve_tokens": 40}, {}):
            torch.manual_seed(0)
            outs.append(model.generate(ids[:, :20], past_key_values=DMSCache(model, page_size=16, **options), **(told | more)))
        assert torch.equal(*outs)
    before = recorders.num_replayed
    model.generate(ids[:, :20], past_key_values=DMSCache(model, page_size=16, reserve_tokens=40), **told)
    assert recorders.num_replayed >= before + 8, "generate replays its steps"


@torch.no_grad()
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_without_kernels_room_is_reserved_all_the_same(evicting, window, free):
    model, ids = evicting(window=window), _tokens(2, 60)
    with reads_from_device(free):
        cache = DMSCache(model, page_size=16, reserve_tokens=60)
        first = _run(model, cache, ids[:, :10], 9)
        store = cache.layers[0].store
        size, width = store.pool.num_pages, store.page_table.shape[2]
        found = torch.cat([first, _run(model, cache, ids[:, 10:], 1)], 1)
        torch.testing.assert_close(found, _run(model, masked_cache(model), ids, 9), atol=1e-4, rtol=1e-4)
    assert store.pool.num_pages == size > 0 and store.page_table.shape[2] == width


@torch.no_grad()
def test_how_much_is_reserved(evicting, monkeypatch):
    """By what the gates were trained for, where that is known; and given back to nobody."""
    model, ids = evicting(window=5), _tokens(3, 12)
    monkeypatch.setattr(model, "dms_origin", {"target_cr": 4.0}, raising=False)
    sizes = {}
    for tokens in (1005, 2005):
        cache = DMSCache(model, page_size=16, reserve_tokens=tokens)
        _run(model, cache, ids, 11)
        store = cache.layers[0].store
        # 3 rows of 2 heads, a quarter of 1000 tokens and a quarter more, and a page that is half empty.
        sizes[tokens] = store.pool.num_pages
        assert store.pool.num_pages == 3 * 2 * (-(-round((tokens - 6) * 1.25 / 4) // 16) + 1)
        assert store.page_table.shape[2] * 16 >= tokens - 6
        cache.batch_select_indices(torch.tensor([0]))
        assert store.pool.num_pages == sizes[tokens]
    monkeypatch.setattr(model, "dms_origin", {"target_cr": None})
    cache = DMSCache(model, page_size=16, reserve_tokens=1005)
    _run(model, cache, ids, 11)
    assert cache.layers[0].store.pool.num_pages > 3 * sizes[1005]
    bounded = DMSCache(model, page_size=16, reserve_tokens=1005, max_cache_bytes=100_000)
    with pytest.raises(CacheFull, match="max_cache_bytes is 100,000"):
        _run(model, bounded, ids, 11)


@interpreted
@torch.no_grad()
def test_a_step_that_cannot_be_captured(evicting, recorders, monkeypatch):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(capture.recorders, "cpu", refuse)
    model, ids = evicting(window=5), _tokens(1, 12)
    cache = DMSCache(model, page_size=16, reserve_tokens=64)
    with pytest.raises(
        RuntimeError, match=r"could not be captured \(operation not permitted .*\), .* begin anew with a cache without reserve_tokens"
    ):
        _run(model, cache, ids, 9)
    assert cache.captured is None


@interpreted
@torch.no_grad()
def test_after_a_step_that_failed_room_is_made_again(evicting, recorders):
    model, ids = evicting(window=5), _tokens(1, 12)
    cache = DMSCache(model, page_size=16, reserve_tokens=64)
    _run(model, cache, ids[:, :10], 9)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]), past_key_values=cache, use_cache=True)
    assert not any(layer.store.is_prepared for layer in cache.layers)
    model(input_ids=ids[:, 10:], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("tokens", [0, -3, 2.5, "many", True])
def test_numbers_that_are_none(evicting, tokens):
    with pytest.raises(ValueError, match="give the tokens that a sequence will have at most, prompt included, or None"):
        DMSCache(evicting(window=5), reserve_tokens=tokens)


def test_models_whose_steps_cannot_be_captured(build_gated):
    model = build_gated("gemma2", hidden_size=32)
    set_mode(model, "evict")
    with pytest.raises(
        ValueError, match=r"reserve_tokens was given, and layers .* of Gemma2ForCausalLM have no gates: .*; leave reserve_tokens out"
    ):
        DMSCache(model, reserve_tokens=100)

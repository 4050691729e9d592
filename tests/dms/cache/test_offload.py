"""Idle caches elsewhere: what comes back is what left, bit by bit; shared pages leave once; a budget that spills."""

import gc

import pytest
import torch

import dms
from dms.cache import CacheFull, held_bytes, offloading
from dms.modes import state_of

PLACES = ["cpu", "disk"]


@pytest.fixture(scope="module", params=[4, (2, 6, 20)], ids=["one window", "three windows"])
def model(request, build_gated):
    model = build_gated("gemma2" if request.param == 4 else "llama", window=request.param)
    dms.set_mode(model, "evict")
    return model


def place_of(name, tmp_path):
    return tmp_path / "idle" if name == "disk" else name


def ids_of(seed, length=50, rows=1):
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("place", PLACES)
def test_what_comes_back_is_what_left(model, tmp_path, place, kv_dtype):
    caches = [dms.DMSCache(model, kv_dtype=kv_dtype, page_size=16) for _ in range(2)]
    for cache in caches:
        forward(model, cache, ids_of(1, 60, rows=2))
    stays, goes = caches
    before, report = held_bytes(goes), goes.report(warn=False)
    left = goes.offload_to(place_of(place, tmp_path))
    assert goes.is_offloaded and left == before - held_bytes(goes) > before / 2
    away = goes.report(warn=False)
    assert (away.alive, away.seen, away.pages_used) == (report.alive, report.seen, report.pages_used)
    assert (away.bytes_host > 0, away.bytes_disk > 0) == (place == "cpu", place == "disk")
    assert ("on disk" if place == "disk" else "in host memory") in str(away)
    files = list((tmp_path / "idle").glob("*")) if place == "disk" else []
    assert bool(files) == (place == "disk")
    assert goes.offload_to("cpu") == 0
    # The next use brings it back: forwards of one token and of several, other rows.
    for new in (ids_of(2, 1, rows=2), ids_of(3, 9, rows=2), ids_of(4, 1, rows=2)):
        assert torch.equal(forward(model, goes, new), forward(model, stays, new))
        assert not goes.is_offloaded and held_bytes(goes) == held_bytes(stays)
        goes.offload_to(place_of(place, tmp_path))
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(forward(model, goes, ids_of(5, 2, rows=2)), forward(model, stays, ids_of(5, 2, rows=2)))
    assert not list((tmp_path / "idle").glob("*"))


@pytest.mark.parametrize("place", PLACES)
def test_pages_that_forks_share_leave_once(model, tmp_path, place):
    whole = dms.DMSCache(model, page_size=16)
    forward(model, whole, ids_of(1, 200))
    forks = [whole.fork(), whole.fork()]
    expected = forward(model, whole.fork(), ids_of(2, 3))
    pool = max((layer.store.pool for layer in whole.compacted_layers().values()), key=lambda pool: pool.num_used)
    pages = pool.rows.nbytes
    gc.collect()
    for cache in (whole, *forks):
        assert pool.offloaded is None
        cache.offload_to(place_of(place, tmp_path))
    assert pool.offloaded is not None and pool.offloaded.num_bytes == pages and held_bytes(whole, *forks) < pages
    # One that is dropped meanwhile lets its pages go; the others come back, and leave again.
    del cache, forks[1]
    gc.collect()
    assert torch.equal(forward(model, forks[0], ids_of(2, 3)), expected)
    assert pool.offloaded is None and whole.is_offloaded
    forks[0].offload_to(place_of(place, tmp_path))
    assert pool.offloaded is not None
    assert torch.equal(forward(model, whole, ids_of(2, 3)), expected)
    assert not whole.report(warn=False).warnings


@pytest.mark.parametrize("offload_layers", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_pages_leave_when_the_last_that_used_them_is_gone(model, tmp_path, place, offload_layers):
    whole = dms.DMSCache(model, page_size=16, offload_layers=offload_layers)
    forward(model, whole, ids_of(1, 200))
    fork, expected = whole.fork(), forward(model, whole.fork(), ids_of(2, 3))
    whole.offload_to(place_of(place, tmp_path))
    pools = [layer.store.pool for layer in whole.compacted_layers().values()]
    assert all(pool.offloaded is None for pool in pools)
    before = held_bytes(whole)
    del fork
    gc.collect()
    left = whole.offload_to(place_of(place, tmp_path))
    # Of layers whose pages rest in host memory, what is here went with the fork.
    assert left >= 0 if offload_layers else left > 0
    assert held_bytes(whole) < before / 2
    assert whole.report(warn=False).bytes_disk > 0 if place == "disk" else whole.report(warn=False).bytes_host > 0
    assert whole.offload_to(place_of(place, tmp_path)) == 0
    assert torch.equal(forward(model, whole, ids_of(2, 3)), expected)
    assert not whole.report(warn=False).warnings and not list((tmp_path / "idle").glob("*"))


def test_a_bound_finds_pages_whose_last_user_is_gone(model):
    budget = dms.CacheBudget(10**9, spill="cpu")
    whole = dms.DMSCache(model, page_size=16, budget=budget)
    forward(model, whole, ids_of(1, 200))
    fork = whole.fork()
    whole.offload_to("cpu")
    del fork
    gc.collect()
    here = held_bytes(whole)
    budget.max_bytes = here + 1000
    other = dms.DMSCache(model, page_size=16, budget=budget)
    forward(model, other, ids_of(3, 30))
    assert held_bytes(whole) < here / 2 and held_bytes(whole, other) <= budget.max_bytes


def test_every_way_to_use_it_brings_it_back(model, tmp_path):
    def there():
        cache = dms.DMSCache(model)
        forward(model, cache, ids_of(1))
        return cache

    def drop_nothing(cache):
        layer, held = next(iter(cache.compacted_layers().items()))
        cache.drop(layer, torch.zeros(*held.store.num_kept.shape, int(held.store.num_kept.max()), dtype=torch.bool))

    uses = {
        "fork": lambda cache: cache.fork(),
        "save": lambda cache: cache.save(tmp_path / "cache"),
        "more rows": lambda cache: cache.batch_repeat_interleave(2),
        "drop": drop_nothing,
        "stop recording": lambda cache: cache.stop_past_recording(),
        "reset": lambda cache: cache.reset(),
        "reload": lambda cache: cache.reload(),
        "joins": lambda cache: there().batch_append(cache),
    }
    for name, use in uses.items():
        cache = there()
        assert cache.offload_to("cpu") > 0, name
        use(cache)
        assert not cache.is_offloaded, name
    copy = dms.DMSCache.load(tmp_path / "cache", model)
    assert torch.equal(forward(model, copy, ids_of(2, 3)), forward(model, there(), ids_of(2, 3)))


@pytest.mark.parametrize("spill", PLACES)
def test_ten_conversations_in_turn_under_a_bound_for_three(model, tmp_path, spill):
    one = dms.DMSCache(model)
    forward(model, one, ids_of(0, 60))
    size = held_bytes(one)
    del one
    budget = dms.CacheBudget(int(3.5 * size), spill=place_of(spill, tmp_path))
    held = [dms.DMSCache(model, budget=budget) for _ in range(10)]
    # Bounded as well: those give pages back later, which changes the order of sums.
    free = [dms.DMSCache(model, max_cache_bytes=10**9) for _ in range(10)]
    for turn in range(3):
        for number, (bounded, other) in enumerate(zip(held, free, strict=True)):
            new = ids_of(100 * turn + number, 5 if turn else 40)
            assert torch.equal(forward(model, bounded, new), forward(model, other, new))
            assert held_bytes(*held) <= budget.max_bytes
    # The longest idle go first.
    assert [cache.is_offloaded for cache in held] == sorted((cache.is_offloaded for cache in held), reverse=True) and held[0].is_offloaded
    refusing = dms.CacheBudget(int(3.5 * size))
    with pytest.raises(CacheFull):
        kept = [dms.DMSCache(model, budget=refusing) for _ in range(10)]
        for number, cache in enumerate(kept):
            forward(model, cache, ids_of(number, 60))


def test_what_does_not_fit_alone_is_refused_and_stays_away(model):
    budget = dms.CacheBudget(10**9, spill="cpu")
    cache = dms.DMSCache(model, budget=budget)
    forward(model, cache, ids_of(1))
    expected = forward(model, cache.fork(), ids_of(2, 1))
    cache.offload_to("cpu")
    budget.max_bytes = held_bytes(cache) + 100
    with pytest.raises(CacheFull):
        forward(model, cache, ids_of(2, 1))
    assert cache.is_offloaded
    budget.max_bytes = 10**9
    assert torch.equal(forward(model, cache, ids_of(2, 1)), expected)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_disk_that_is_full_leaves_it_where_it_was(model, tmp_path, monkeypatch, fails_at):
    cache, other = dms.DMSCache(model), dms.DMSCache(model)
    for one in (cache, other):
        forward(model, one, ids_of(1, 90))
    before, calls, save = held_bytes(cache), [], offloading.save_tensors

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == fails_at:
            raise OSError("No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(offloading, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        cache.offload_to(tmp_path)
    # Less where a sliding layer showed the end of a whole prompt.
    assert not cache.is_offloaded and before / 3 < held_bytes(cache) <= before and not list(tmp_path.glob("*"))
    assert cache.offload_to(tmp_path) > 0
    assert torch.equal(forward(model, cache, ids_of(2, 3)), forward(model, other, ids_of(2, 3)))


def test_refusals(model, tmp_path):
    cache = dms.DMSCache(model)
    assert cache.offload_to("cpu") == 0
    forward(model, cache, ids_of(1))
    with pytest.raises(ValueError, match="place is 3; give 'cpu', which is host memory, or a folder"):
        cache.offload_to(3)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cache.offload_to(tmp_path / "file")
    assert not cache.is_offloaded
    with pytest.raises(ValueError, match="spill is 'cpu' without max_bytes"):
        dms.CacheBudget(None, spill="cpu")
    with pytest.raises(ValueError, match="max_cache_bytes is 5 and a budget was given"):
        dms.DMSCache(model, max_cache_bytes=5, budget=dms.CacheBudget(10))
    assert state_of(model).mode == "evict"

"""Pages that rest in host memory: the cache is the plain one bit by bit, two layers' pages are on the device at most, and what was written goes back."""

import copy
import gc

import pytest
import torch
from contents import reads_from_device
from transformers.cache_utils import DynamicCache

import dms
from dms.cache import CacheFull, DMSCache, held_bytes, serialization
from dms.cache.host_pages import HostPagePool, PageBuffers
from dms_kernels import dispatch

KINDS = [None, "int8", "fp8", "int4"]
WINDOWS = [pytest.param(4, id="one window"), pytest.param((2, 6, 20), id="three windows")]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """A buffer that was given up holds NaN, or what is far from any number."""
    give_up = HostPagePool.give_up

    def poison(pool):
        buffer = pool.buffer
        give_up(pool)
        if buffer is not None:
            buffer.memory.fill_(0xFF)

    monkeypatch.setattr(HostPagePool, "give_up", poison)


@pytest.fixture(scope="module")
def build(build_gated):
    """Models of five layers, made once for each set of options, in evict mode."""
    models = {}

    def get(window=4, family="llama", **options):
        options = {"window": window, "num_hidden_layers": 5} | options
        key = f"{family} {options}"
        if key not in models:
            models[key] = build_gated(family, **options)
            dms.set_mode(models[key], "evict")
        return models[key]

    return get


def ids_of(seed, length=50, rows=2):
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits


def pools_of(cache):
    return [layer.store.pool for layer in cache.compacted_layers().values()]


def buffers_of(cache):
    (buffers,) = {pool.buffers for pool in pools_of(cache)}
    return buffers


def same_entries(cache, other):
    """Both hold the same, wherever it lies."""
    for one, two in zip(cache.compacted_layers().values(), other.compacted_layers().values(), strict=True):
        for name, tensor in two.store.tensors().items():
            assert name == "page_table" or torch.equal(getattr(one.store, name), tensor), name
        pages = [store.pool.pages[store.page_numbers().long()].float() for store in (one.store, two.store)]
        assert torch.equal(*pages) and len(pages[0]) and pages[0].isfinite().all()


def in_turn(model, caches, *, seed=10, num_tokens=12, rows=2):
    for i in range(num_tokens):
        found = [forward(model, cache, ids_of(seed + i, 1, rows)) for cache in caches]
        assert torch.equal(*found)


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_bit_by_bit_the_plain_cache(build, window, kv_dtype):
    model = build(window, head_dim=32)
    caches = [DMSCache(model, page_size=16, kv_dtype=kv_dtype, offload_layers=offloads) for offloads in (True, False)]
    # A prompt in chunks, steps, a longer part, and steps.
    for seed, length in ((1, 60), (2, 40), (3, 1), (4, 1), (5, 9)):
        assert torch.equal(*(forward(model, cache, ids_of(seed, length)) for cache in caches))
    in_turn(model, caches, num_tokens=20)
    same_entries(*caches)
    assert all(isinstance(pool, HostPagePool) for pool in pools_of(caches[0])) and not hasattr(pools_of(caches[1])[0], "host")


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("window", WINDOWS)
def test_two_layers_are_on_the_device_and_what_was_written_goes_back(build, window, kv_dtype):
    model = build(window, head_dim=32)
    cache = DMSCache(model, page_size=16, kv_dtype=kv_dtype, offload_layers=True)
    forward(model, cache, ids_of(1, 200))
    stores = [layer.store for layer in cache.compacted_layers().values()]
    pools, buffers = pools_of(cache), buffers_of(cache)
    num_checked = 0
    for i in range(24):
        sizes, sent, returned = [pool.num_pages for pool in pools], buffers.bytes_to_device, buffers.bytes_to_host
        states = [store.ring_state[:, :, store.longest % store.ring_size].clone() for store in stores]
        forward(model, cache, ids_of(2 + i, 1))
        # Rings, tables and counts; and two buffers, in place of five layers' pages.
        beside = sum(t.nbytes for layer in cache.compacted_layers().values() for t in layer.own_tensors())
        beside += sum(x.nbytes for pool in pools for x in pool.tensors() if x.dtype != torch.uint8)
        report = cache.report(warn=False)
        assert report.bytes == held_bytes(cache) == beside + 2 * buffers.capacity
        assert buffers.capacity <= 4 / 3 * max(pool.host_bytes for pool in pools)
        assert report.bytes_host == sum(pool.host_bytes for pool in pools) and report.bytes_disk == 0
        assert sum(pool.buffer is not None for pool in pools) <= 2
        if i < 2 or sizes != [pool.num_pages for pool in pools]:
            # The order of layers is not known yet, or a pool has grown, or given pages back, and was brought anew.
            continue
        num_checked += 1
        assert buffers.bytes_to_device - sent == sum(pool.host_bytes for pool in pools)
        # Of a key and a value that left the ring and stay: the rows, their scales, and their two numbers.
        row = 32 * 4 if kv_dtype is None else 16 + stores[0].pool.row_scales[0].nbytes
        num_kept = sum(int((state != 1).sum()) for state in states)
        assert buffers.bytes_to_host - returned == num_kept * 2 * (row + 8)
    assert num_checked >= 8
    assert "in host memory" in str(cache.report(warn=False))


def test_pages_are_brought_ahead_in_the_order_of_the_layers(build, monkeypatch):
    model, cache = build(), DMSCache(build(), page_size=16, offload_layers=True)
    forward(model, cache, ids_of(1, 150))
    forward(model, cache, ids_of(2, 1))
    pools, fetched, sizes = pools_of(cache), [], []
    fetch = PageBuffers.fetch

    def note(buffers, pool):
        fetched[-1].append((pools.index(pool), sum(layer.pending is not None for layer in cache.compacted_layers().values())))
        fetch(buffers, pool)

    monkeypatch.setattr(PageBuffers, "fetch", note)
    for i in range(12):
        fetched.append([])
        forward(model, cache, ids_of(3 + i, 1))
        sizes.append([pool.num_pages for pool in pools])
        assert [pool.buffer is not None for pool in pools] == [True, True, False, False, False]
    # When a layer ends the one after the next is asked for, and never when a layer needs it; but for pools that have grown.
    steady = [found for found, size, before in zip(fetched[1:], sizes[1:], sizes, strict=False) if size == before]
    assert len(steady) >= 3 and all(found == [(2, 0), (3, 0), (4, 0), (0, 0), (1, 0)] for found in steady)


@pytest.mark.parametrize("window", WINDOWS)
def test_forks_rows_and_drops(build, window):
    model = build(window)
    caches = [DMSCache(model, page_size=16, offload_layers=offloads) for offloads in (True, False)]
    for cache in caches:
        forward(model, cache, ids_of(1, 70))
    forks = [cache.fork() for cache in caches]
    assert buffers_of(forks[0]) is buffers_of(caches[0])
    for i in range(3):
        in_turn(model, caches, seed=10 * i, num_tokens=3)
        in_turn(model, forks, seed=10 * i + 5, num_tokens=3)
    same_entries(*forks)
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        cache.batch_append(forks[caches.index(cache)], torch.tensor([0]))
    in_turn(model, caches, rows=4)
    for cache in caches:
        store = cache.layers[3].store
        cache.drop(3, torch.rand(*store.num_kept.shape, int(store.num_kept.max()), generator=torch.Generator().manual_seed(0)) < 0.4)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.activate_past_recording()
    assert torch.equal(*(forward(model, cache, ids_of(40, 5)) for cache in caches))
    for cache in caches:
        cache.crop(-3)
        cache.stop_past_recording()
    in_turn(model, caches)
    same_entries(*caches)
    del forks
    gc.collect()
    assert not caches[0].report(warn=False).warnings


def test_a_sequence_joins_from_pages_elsewhere(build):
    model = build()
    caches = [DMSCache(model, page_size=16, offload_layers=offloads) for offloads in (True, False)]
    others = [DMSCache(model, page_size=16, offload_layers=offloads) for offloads in (True, False, True, False)]
    for cache in [*caches, *others]:
        forward(model, cache, ids_of(1, 60))
    for cache, *joining in zip(caches, others[:2], others[3:1:-1], strict=True):
        for one in joining:
            cache.batch_append(one)
    in_turn(model, caches, rows=6)
    same_entries(*caches)


def test_files_load_either_way(build, tmp_path):
    model = build()
    caches = [DMSCache(model, page_size=16, kv_dtype="int8", offload_layers=offloads) for offloads in (True, False)]
    for cache in caches:
        forward(model, cache, ids_of(1, 80))
    for number, cache in enumerate(caches):
        cache.save(tmp_path / str(number))
    saved = [serialization.read(tmp_path / str(number)).tensors for number in range(2)]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    back = [DMSCache.load(tmp_path / str(1 - number), model, offload_layers=number == 0) for number in range(2)]
    same_entries(*back)
    in_turn(model, [caches[1], back[0]])


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_idle_caches_leave_the_device(build, tmp_path, place):
    model = build((2, 6, 20))
    goes, stays = (DMSCache(model, page_size=16, kv_dtype="int8", offload_layers=offloads) for offloads in (True, False))
    for cache in (goes, stays):
        forward(model, cache, ids_of(1, 90))
    fork, buffers, pages = goes.fork(), buffers_of(goes), sum(pool.host_bytes for pool in pools_of(goes))
    where = "cpu" if place == "cpu" else tmp_path
    goes.offload_to(where)
    assert buffers.tensors()
    in_turn(model, [fork, stays.fork()], num_tokens=3)
    fork.offload_to(where)
    # With the last of them the buffers go, and the pages where they are in nobody's way.
    away = goes.report(warn=False)
    assert not buffers.tensors() and (away.bytes_disk > pages) == (place == "disk") and (away.bytes_host >= pages) == (place == "cpu")
    in_turn(model, [goes, stays])
    assert fork.is_offloaded and not goes.is_offloaded
    goes.offload_to(where)
    # Its rows have a shape meanwhile, as those of other pools.
    assert all(pool.rows.shape[0] == pool.num_pages * 32 + 1 for pool in pools_of(goes))
    in_turn(model, [goes, stays])
    same_entries(goes, stays)


def test_a_bound_counts_what_the_device_holds(build):
    model = build()
    held = []
    for offloads in (False, True):
        cache = DMSCache(model, page_size=16, offload_layers=offloads)
        forward(model, cache, ids_of(1, 600))
        held.append(held_bytes(cache))
    assert held[1] < 0.6 * held[0]
    bound = (held[0] + held[1]) // 2
    with pytest.raises(CacheFull):
        forward(model, DMSCache(model, page_size=16, max_cache_bytes=bound), ids_of(1, 600))
    caches = [
        DMSCache(model, page_size=16, max_cache_bytes=bound, offload_layers=True),
        DMSCache(model, page_size=16, max_cache_bytes=10**9),
    ]
    for cache in caches:
        forward(model, cache, ids_of(1, 600))
    with pytest.raises(CacheFull):
        forward(model, caches[0], ids_of(2, 1500))
    # As it was before.
    in_turn(model, caches)
    same_entries(*caches)
    assert held_bytes(caches[0]) <= bound
    caches[0].reset()
    assert held_bytes(caches[0]) == 0 and not any(buffers.tensors() for buffers in caches[0]._buffers.values())
    assert torch.equal(forward(model, caches[0], ids_of(1)), forward(model, DMSCache(model), ids_of(1)))


def test_the_setting_reaches_every_cache_that_evict_mode_makes(build, monkeypatch):
    model, ids = build(), ids_of(1, 60)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "num_beams": 2}
    expected = model.generate(ids, **options)
    monkeypatch.setattr(model.dms, "offload_layers", True)
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and all(
        isinstance(pool, HostPagePool) for pool in pools_of(found.past_key_values)
    )
    assert not any(isinstance(pool, HostPagePool) for pool in pools_of(expected.past_key_values))
    # transformers' own cache, and a copy of it, which has pages of its own.
    cache = DynamicCache(config=model.config)
    forward(model, cache, ids)
    other = copy.deepcopy(cache)
    pools = [[layer.store.pool for layer in one.layers] for one in (cache, other)]
    assert all(isinstance(pool, HostPagePool) for pool in pools[1]) and not {id(p) for p in pools[0]} & {id(p) for p in pools[1]}
    assert pools[0][0].buffers is not pools[1][0].buffers and len({id(pool.buffers) for pool in pools[1]}) == 1
    in_turn(model, [cache, other], num_tokens=4)
    in_turn(model, [cache, other], num_tokens=4, seed=50)


@pytest.mark.parametrize("family", ["gemma4_text", "gemma2"])
def test_layers_that_follow_and_layers_without_gates(build, family):
    """gemma4's last layers read another one's pages at the end of a pass; gemma2's sliding layers keep transformers' own cache."""
    types = {"gemma2": ["sliding_attention", "full_attention"] * 2, "gemma4_text": ["full_attention"] * 4}
    model = build(family=family, num_hidden_layers=4, layer_types=types[family])
    caches = [DMSCache(model, page_size=16, offload_layers=offloads) for offloads in (True, False)]
    for cache in caches:
        forward(model, cache, ids_of(1, 60))
    assert bool(model.dms.following) == (family == "gemma4_text")
    in_turn(model, caches)
    assert torch.equal(*(forward(model, cache, ids_of(5, 7)) for cache in caches))
    in_turn(model, caches)
    same_entries(*caches)
    dense = [layer for layer in caches[0].layers if not hasattr(layer, "store")]
    assert len(dense) == len(caches[0].layers) - len(pools_of(caches[0]))


def test_a_device_that_is_not_asked(build):
    model = build((2, 6, 20))
    with reads_from_device(free=False):
        caches = [DMSCache(model, page_size=16, offload_layers=offloads) for offloads in (True, False)]
        for cache in caches:
            forward(model, cache, ids_of(1, 60))
        in_turn(model, caches)
    same_entries(*caches)


@pytest.mark.skipif(not dispatch.is_interpreted(), reason="on a GPU see test_on_gpu.py")
@pytest.mark.parametrize("window", [WINDOWS[0], pytest.param((2, 6, 20), id="three windows", marks=pytest.mark.slow)])
def test_what_kernels_write_goes_back(build, window, monkeypatch):
    # An odd number, so that a layer's pages are in one buffer and then in the other.
    model = build(window, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1)
    monkeypatch.setenv("DMS_KERNELS", "triton")
    caches = [DMSCache(model, page_size=16, offload_layers=offloads) for offloads in (True, False)]
    for cache in caches:
        forward(model, cache, ids_of(1, 12, 1))
    launches: list[set[int]] = []
    for i in range(4):
        in_turn(model, caches, seed=10 + i, num_tokens=1, rows=1)
        launches.append({id(views["cached_launches"]) for views in pools_of(caches[0])[1]._views.values()})
    # One for each buffer, so that kernels are launched as before.
    assert launches[-1] == launches[-2] and len(launches[-1]) == 2
    assert torch.equal(*(forward(model, cache, ids_of(5, 3, 1)) for cache in caches))
    same_entries(*caches)


def test_refusals(build, monkeypatch):
    model = build()
    with pytest.raises(ValueError, match="reserve_tokens and offload_layers were both given"):
        DMSCache(model, reserve_tokens=100, offload_layers=True)
    monkeypatch.setattr(model.dms, "offload_layers", True)
    with pytest.raises(ValueError, match="leave out reserve_tokens, or give offload_layers=False"):
        DMSCache(model, reserve_tokens=100)
    DMSCache(model, reserve_tokens=100, offload_layers=False)
    with pytest.raises(ValueError, match=r"set model\.dms\.offload_layers = True"):
        DMSCache(model).layers[0].prefetch()
    cache = DMSCache(model)
    forward(model, cache, ids_of(1))
    with pytest.raises(AttributeError, match="HostPagePool has no attribute 'row'"):
        _ = pools_of(cache)[0].row

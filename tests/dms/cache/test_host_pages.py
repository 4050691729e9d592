"""Pages that rest in host memory: the cache is the plain one bit by bit, two layers' pages are on the device at most, and what was written goes back."""

import copy
import gc

import pytest
import torch
from contents import reads_from_device
from transformers.cache_utils import DynamicCache

import dms
from dms.cache import CacheFull, DMSCache, held_bytes
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

    def get(window=4, family="llama", num_hidden_layers=5, **options):
        key = (family, window, num_hidden_layers, *sorted(options.items()))
        if key not in models:
            models[key] = build_gated(family, window=window, num_hidden_layers=num_hidden_layers, **options)
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
            assert torch.equal(getattr(one.store, name), tensor), name
        pages = [store.pool.pages[store.page_numbers().long()].float() for store in (one.store, two.store)]
        assert torch.equal(*pages) and pages[0].isfinite().all()


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
    in_turn(model, caches, num_tokens=40)
    same_entries(*caches)
    assert all(isinstance(pool, HostPagePool) for pool in pools_of(caches[0])) and not hasattr(pools_of(caches[1])[0], "host")

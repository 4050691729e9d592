"""Pages of int8: as if what leaves the window were rounded, in a fourth of the bytes, wherever a cache goes."""

import pytest
import torch
from contents import entries_in_pages, reads_from_device

from dms.cache import CacheFull, DMSCache
from dms.cache.page_pool import PagePool


@pytest.fixture
def rounding(monkeypatch):
    """Pools that are not quantised round what is written to them as int8 would."""
    write = PagePool.write

    def rounded(pool, row, values):
        if pool.row_scales is None:
            scale = values.abs().amax(1, keepdim=True) / 127
            values = (values / scale.clamp(min=1e-38)).round() * scale
        write(pool, row, values)

    monkeypatch.setattr(PagePool, "write", rounded)


def _read(model, cache, ids, chunks):
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(chunks, 1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("slow_device", [False, True])
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(40, marks=pytest.mark.slow), (2, 9, 50)])
def test_it_computes_with_rounded_entries(window, alignment, slow_device, evicting, make_batch, rounding, page_accounts):
    model = evicting(window=window, alignment=alignment, sinks=1)
    ids = make_batch(3, 150)["input_ids"]
    caches = [DMSCache(model, page_size=16, kv_dtype=kv_dtype) for kv_dtype in ("int8", None)]
    chunks = [70, 9, *[1] * 60, 11]
    with reads_from_device(free=not slow_device):
        found, expected = (_read(model, cache, ids, chunks) for cache in caches)
    assert (found - expected).abs().max() < 1e-4
    page_accounts([caches[0]])
    for layer, plain in zip(caches[0].layers, caches[1].layers, strict=True):
        assert layer.store.pool.rows.dtype == torch.int8 and torch.equal(layer.store.num_kept, plain.store.num_kept)
        heads = [(b, h) for b in range(3) for h in range(layer.store.num_kept.shape[1])]
        for k, rounded in ((entries_in_pages(layer.store, *head), entries_in_pages(plain.store, *head)) for head in heads):
            torch.testing.assert_close(k, rounded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rounding_costs_little_and_saves_three_quarters(evicting, make_batch):
    model = evicting(window=4)
    ids = make_batch(2, 900)["input_ids"]
    full, quantised = DMSCache(model), DMSCache(model, kv_dtype="int8")
    expected, found = (_read(model, cache, ids, 450) for cache in (full, quantised))
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    report, smaller = full.report(), quantised.report()
    assert smaller.bytes_dense == report.bytes_dense
    # A decision near its threshold may fall otherwise.
    assert smaller.alive == pytest.approx(report.alive, rel=0.01)
    head_dim = model.config.head_dim
    assert smaller.bytes_alive < (head_dim + 4) / (4 * head_dim) * report.bytes_alive * 1.05
    assert smaller.bytes_alive < smaller.bytes < 0.6 * report.bytes


@torch.no_grad()
def test_it_is_shared_saved_and_bounded(evicting, make_batch, tmp_path, page_accounts):
    model = evicting(window=4)
    model.dms.kv_dtype = "int8"
    ids = make_batch(2, 120)["input_ids"]
    cache = DMSCache(model, page_size=16)
    _read(model, cache, ids[:, :100], 100)
    cache.save(tmp_path / "cache.safetensors")
    again, fork = DMSCache.load(tmp_path / "cache.safetensors", model), cache.fork()
    fork.batch_select_indices([1, 0, 1])
    page_accounts([cache, fork])
    expected = _read(model, cache, ids[:, 100:], 5)
    assert (_read(model, again, ids[:, 100:], 5) - expected).abs().max() < 1e-4
    assert (_read(model, fork, ids[[1, 0, 1], 100:], 5) - expected[[1, 0, 1]]).abs().max() < 1e-4
    page_accounts([cache, fork])
    bounded = DMSCache(model, page_size=16, max_cache_bytes=cache.report().bytes // 2)
    with pytest.raises(CacheFull):
        _read(model, bounded, ids, 120)


def test_another_dtype_is_refused(evicting):
    with pytest.raises(ValueError, match="pages hold the model's own dtype"):
        DMSCache(evicting(window=4), kv_dtype="int4")

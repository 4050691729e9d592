"""Pages of fewer bits: as if what leaves the window were rounded, in fewer bytes, wherever a cache goes."""

import pytest
import torch
from contents import entries_in_pages, reads_from_device

from dms.cache import CacheFull, DMSCache
from dms.cache.page_pool import PagePool
from dms_kernels.quantization import KV_DTYPES, fake_quantize, group_size


@pytest.fixture
def rounding(monkeypatch):
    """Call it with a kv_dtype: pools that are not quantised round what is written to them as those would."""
    encode = PagePool.encode

    def as_pages_of(kv_dtype):
        def rounded(pool, kv):
            if pool.row_scales is None:
                kv = torch.cat(
                    [fake_quantize(x, KV_DTYPES[kv_dtype], is_key) for x, is_key in zip(kv.chunk(2), (True, False), strict=True)]
                )
            return encode(pool, kv)

        monkeypatch.setattr(PagePool, "encode", rounded)

    return as_pages_of


def _read(model, cache, ids, chunks):
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(chunks, 1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("slow_device", [False, True])
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize(
    ("kv_dtype", "window"),
    [("int8", 5), ("int8", (2, 9, 50)), ("int4", 5), ("fp8", (2, 9, 50))]
    + [pytest.param(kind, w, marks=pytest.mark.slow) for kind in KV_DTYPES for w in (0, 40)],
)
def test_it_computes_with_rounded_entries(kv_dtype, window, alignment, slow_device, evicting, make_batch, rounding, page_accounts):
    model = evicting(window=window, alignment=alignment, sinks=1)
    rounding(kv_dtype)
    ids = make_batch(3, 150)["input_ids"]
    caches = [DMSCache(model, page_size=16, kv_dtype=given) for given in (kv_dtype, None)]
    chunks = [70, 9, *[1] * 60, 11]
    with reads_from_device(free=not slow_device):
        found, expected = (_read(model, cache, ids, chunks) for cache in caches)
    assert (found - expected).abs().max() < 1e-4
    page_accounts([caches[0]])
    for layer, plain in zip(caches[0].layers, caches[1].layers, strict=True):
        assert layer.store.pool.rows.dtype == KV_DTYPES[kv_dtype] and torch.equal(layer.store.num_kept, plain.store.num_kept)
        heads = [(b, h) for b in range(3) for h in range(layer.store.num_kept.shape[1])]
        for k, rounded in ((entries_in_pages(layer.store, *head), entries_in_pages(plain.store, *head)) for head in heads):
            torch.testing.assert_close(k, rounded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.05), ("fp8", 0.15), ("int4", 0.5)])
def test_what_rounding_costs_and_saves(kv_dtype, most, evicting, make_batch):
    model = evicting(window=4)
    ids = make_batch(2, 900)["input_ids"]
    full, quantised = DMSCache(model), DMSCache(model, kv_dtype=kv_dtype)
    expected, found = (_read(model, cache, ids, 450) for cache in (full, quantised))
    assert 0 < (found - expected).abs().max() < most * expected.abs().max()
    report, smaller = full.report(), quantised.report()
    assert smaller.bytes_dense == report.bytes_dense
    # A decision near its threshold may fall otherwise.
    assert smaller.alive == pytest.approx(report.alive, rel=0.01 if kv_dtype == "int8" else 0.05)
    head_dim = model.config.head_dim
    stored = head_dim / 2 + 6 * head_dim / group_size(head_dim) if kv_dtype == "int4" else head_dim + 4
    assert smaller.bytes_alive < stored / (4 * head_dim) * report.bytes_alive * 1.1
    assert smaller.bytes_alive < smaller.bytes < 0.6 * report.bytes
    # Of 2 sequences, 2 layers and 2 heads: keys and values of the 5 newest tokens in float32, and a state of each.
    assert smaller.bytes_ring == report.bytes_ring == 2 * 2 * 2 * 5 * (2 * head_dim * 4 + 1) < smaller.bytes


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_it_is_shared_saved_and_bounded(kv_dtype, evicting, make_batch, tmp_path, page_accounts):
    model = evicting(window=4)
    model.dms.kv_dtype = kv_dtype
    ids = make_batch(2, 120)["input_ids"]
    cache = DMSCache(model, page_size=16)
    _read(model, cache, ids[:, :100], 100)
    cache.save(tmp_path / "cache.safetensors")
    again, fork = DMSCache.load(tmp_path / "cache.safetensors", model), cache.fork()
    for layer, loaded in zip(cache.layers, again.layers, strict=True):
        # Not rounded a second time.
        heads = [(b, h) for b in range(2) for h in range(layer.store.num_kept.shape[1])]
        for head in heads:
            for one, two in zip(entries_in_pages(layer.store, *head), entries_in_pages(loaded.store, *head), strict=True):
                assert torch.equal(one, two)
    fork.batch_select_indices([1, 0, 1])
    page_accounts([cache, fork])
    expected = _read(model, cache, ids[:, 100:], 5)
    assert (_read(model, again, ids[:, 100:], 5) - expected).abs().max() < 1e-4
    assert (_read(model, fork, ids[[1, 0, 1], 100:], 5) - expected[[1, 0, 1]]).abs().max() < 1e-4
    page_accounts([cache, fork])
    bounded = DMSCache(model, page_size=16, max_cache_bytes=cache.report().bytes // 2)
    with pytest.raises(CacheFull):
        _read(model, bounded, ids, 120)


@torch.no_grad()
def test_dropped_entries_leave_the_others_as_they_are(evicting, make_batch):
    model = evicting(window=4)
    cache = DMSCache(model, page_size=16, kv_dtype="int4")
    _read(model, cache, make_batch(1, 100)["input_ids"], 100)
    layer = cache.layers[0]
    before = entries_in_pages(layer.store, 0, 0)
    for _ in range(3):
        dropped = torch.zeros(1, layer.store.num_kept.shape[1], int(layer.store.num_kept.max()), dtype=torch.bool)
        dropped[0, 0, 0] = True
        layer.drop(dropped)
    after = entries_in_pages(layer.store, 0, 0)
    assert len(before[0]) > 20 and all(torch.equal(x, y[3:]) for x, y in zip(after, before, strict=True))


def test_another_dtype_is_refused(evicting):
    with pytest.raises(
        ValueError, match=r"kv_dtype is 'int2' \(did you mean 'int\d'\?\); pages hold the model's own dtype \(None\), or int8, fp8, int4"
    ):
        DMSCache(evicting(window=4), kv_dtype="int2")

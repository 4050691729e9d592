"""What `cache.report()` gives: bytes of all tensors, counts of decisions and entries, and warnings when something is wrong."""

import gc
import json
import warnings

import pytest
import torch

from dms import DMSConfig
from dms.cache import CompactedLayer, DMSCache
from dms.masks import Tokens


def _storages() -> dict[int, int]:
    """Bytes of every tensor's memory in this process, by address."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        # Looking at everything touches what is deprecated.
        warnings.simplefilter("ignore")
        for tensor in gc.get_objects():
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _plans(cache) -> int:
    """Orders of reading, which are made from the tables whenever those change and are not counted."""
    found = {}

    def add(value):
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)

    add([layer.store.read_order for layer in cache.compacted_layers().values()])
    return sum(found.values())


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), pytest.param("lfm2", marks=pytest.mark.slow)]
)
def test_bytes_are_those_of_all_tensors(family, evicting, make_batch):
    """Of everything that was not there before the cache was."""
    model, batch = evicting(family), make_batch(2, 200, left=[0, 30])
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def read(cache, part):
        with torch.no_grad():
            model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, use_cache=True)
        model.dms.forward = None

    read(DMSCache(model, page_size=16), slice(0, 3))
    before = _storages()
    cache = DMSCache(model, page_size=16)
    for part in (slice(0, 150), slice(150, 151), slice(151, 190)):
        read(cache, part)
        new = sum(size for address, size in _storages().items() if address not in before)
        assert cache.report(warn=False).bytes == new - _plans(cache) > 10_000
    fork = cache.fork()
    read(fork, slice(190, 200))
    new = sum(size for address, size in _storages().items() if address not in before)
    # Forks share pages, so that each tells more than its part.
    assert new - _plans(cache) - _plans(fork) < cache.report(warn=False).bytes + fork.report(warn=False).bytes
    del fork
    gc.collect()
    cache.reset()
    assert cache.report(warn=False).bytes < 10_000


def test_counts_of_layers_and_heads(evicting, lockstep):
    one = lockstep(evicting("gemma3_text", window=6), page_size=16)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :20] = 0
    one.read(mask)
    report = one.cache.report(warn=False)
    ruled = one.oracle.layers[1].evicted()
    real = mask.bool()
    old = (real.sum(1, keepdim=True) - 1 - (real.cumsum(1) - 1) > 6) & real
    gone = (ruled & old[..., None]).sum((0, 1))
    assert report.seen == 2 * 160 and report.alive == 2 * 160 - int(gone.sum())
    assert report.layer_indices == [1] and report.cr_LH == [pytest.approx((160 / (160 - gone)).tolist())]
    # The sliding layer has seen 90 columns and holds 7 of each row.
    assert report.cr_model == pytest.approx((2 * 160 + 2 * 180) / (report.alive + 2 * 2 * 7))
    size = 2 * 16 * 4
    assert report.bytes_alive == size * (report.alive + 2 * 2 * 7) and report.bytes_dense == size * (2 * 160 + 2 * 180)
    assert (report.logical_tokens, report.num_sequences, report.page_size, report.memory) == (90, 2, 16, "compacted")
    assert json.loads(json.dumps(report.to_dict()))["seen"] == report.seen
    assert f"{report.alive:,} of {report.seen:,} KV entries" in str(report)


def test_an_empty_cache(evicting):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = DMSCache(evicting()).report()
    assert (report.seen, report.alive, report.bytes, report.warnings) == (0, 0, 0, [])


def test_a_long_text_of_which_nothing_was_evicted(evicting):
    model = evicting(window=9)
    model.dms.evict_bias = -100.0
    cache = DMSCache(model, page_size=16)
    with torch.no_grad():
        model(input_ids=torch.full((2, 40), 5), past_key_values=cache)
        assert cache.report().warnings == []
        model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
    with pytest.warns(UserWarning, match="nothing was evicted over 41 tokens a sequence.*evict_bias") as caught:
        report = cache.report()
    assert [str(one.message) for one in caught] == report.warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.report(warn=False).warnings == report.warnings
    model.dms.evict_bias = 100.0
    with torch.no_grad():
        model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
    model.dms.evict_bias = 0.0
    assert cache.report().warnings == []


def test_pages_of_a_fork_that_is_gone(evicting, lockstep):
    one = lockstep(evicting(), page_size=16)
    one.read(torch.ones(2, 100, dtype=torch.long))
    used = one.cache.report(warn=False).pages_used
    fork = one.fork()
    fork.decode(30)
    assert one.cache.report().pages_used > used and one.cache.report().warnings == []
    del fork
    assert one.cache.report().pages_used == used and one.cache.report().warnings == []


def test_a_leaked_page(evicting, lockstep):
    one = lockstep(evicting(), page_size=16)
    one.read(torch.ones(1, 100, dtype=torch.long))
    pool = one.cache.layers[0].store.pool
    pool.share(one.cache.layers[0].store.page_table[0, 0, :1])
    one.cache.batch_select_indices(torch.tensor([0]))
    assert one.cache.report().warnings == []
    one.cache.layers[0].store.num_kept[0, 0] = 0
    with pytest.warns(UserWarning, match="pages are in use and the tables list .*pages have leaked"):
        one.cache.report()


def _fill(
    layer: CompactedLayer, num_tokens: int, chunk: int, share_evicted: float, batch: int = 1, heads: int = 4, D: int = 16, first: int = 0
) -> None:
    generator, windows = torch.Generator().manual_seed(first), layer.dms.windows
    for start in range(first, first + num_tokens, chunk):
        length = min(chunk, first + num_tokens - start)
        k, v = torch.randn(2, batch, heads, length, D, generator=generator).unbind(0)
        evict = torch.rand(batch, length, heads, *([len(windows)] * (len(windows) > 1)), generator=generator) < share_evicted
        position = torch.arange(start, start + length, dtype=torch.int32).expand(batch, length)
        layer.extend(k, v, evict, Tokens(torch.ones_like(position), position))


@pytest.mark.parametrize("chunk", [16384, 1000, 61])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_bytes_follow_what_is_alive(page_size, chunk, evicting):
    """16K tokens of which one in 8 is kept, beside a window of 256: half a page is lost for each head, and what the pool grows ahead."""
    cache = DMSCache(evicting(), page_size=page_size)
    cache.layers = [CompactedLayer(DMSConfig(window=256), page_size)]
    _fill(cache.layers[0], 16384, chunk, 7 / 8)
    report = cache.report()
    assert report.seen == 4 * 16384 and 6.5 < report.cr < 7.5 and 7.5 < report.cr_decided < 8.5
    assert report.bytes <= 1.15 * report.bytes_alive and report.warnings == []
    kept = int(cache.layers[0].store.num_kept.sum())
    assert 0 <= report.pages_used * page_size - kept <= 4 * (page_size - 1)
    assert report.pages_held <= 1.04 * report.pages_used + 1


@pytest.mark.parametrize("chunk", [16384, 1000, 61])
@pytest.mark.parametrize("page_size", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_bytes_follow_what_is_alive_in_several_windows(page_size, chunk, evicting, page_accounts):
    """Lists lose half a page at either end. After a long text, and after a thousand steps of decoding that keep less and then more."""
    cache = DMSCache(evicting(), page_size=page_size)
    layer = CompactedLayer(DMSConfig(window=[64, 512, 4096]), page_size)
    cache.layers = [layer]
    _fill(layer, 16384, chunk, 0.5)
    for first, share in ((16384, None), (16384, 0.8), (16984, 0.3)):
        if share is not None:
            _fill(layer, 600 if share == 0.8 else 400, 1, share, first=first)
        report, store = cache.report(), layer.store
        assert report.bytes <= 1.15 * report.bytes_alive and report.warnings == []
        in_pages = int(store.num_kept.sum())
        assert 0 <= report.pages_used * page_size - in_pages <= store.num_kept.numel() * (page_size - 1)
        gone = in_pages - (report.alive - 4 * 65)
        assert 0 <= gone <= 4 * 2 * (page_size - 1)
        page_accounts([cache])
    assert report.cr > 4


def test_bytes_beyond_their_bound(evicting):
    """Nine pages a head and a pool twice as large as what is used."""
    cache = DMSCache(evicting(), page_size=64)
    cache.layers = [CompactedLayer(DMSConfig(window=7), 64)]
    _fill(cache.layers[0], 64 * 9 + 8, 100, 0.0)
    cache.layers[0].store.evicted += 1
    assert cache.report().warnings == []
    pool = cache.layers[0].store.pool
    pool.resize(2 * pool.num_pages)
    with pytest.warns(UserWarning, match=r"more than 1\.15 times; smaller pages"):
        cache.report()

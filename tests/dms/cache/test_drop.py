"""`DMSCache.drop`: entries of one's own choice go, the others stay in order, and what forks share stays theirs."""

import os

import pytest
import torch
from contents import entries_in_pages

from dms.cache import CacheFull, DMSCache, held_bytes
from dms.cache.fused_store import FusedStore
from dms.cache.store import Store
from dms.modes import set_mode


def _drop_reference(kept: list, mask: list) -> list:
    return [entry for entry, dropped in zip(kept, mask, strict=False) if not dropped]


@pytest.mark.parametrize(("kv_dtype", "window"), [(None, 3), ("int8", 3), (None, (3, 90, 400))])
@torch.no_grad()
def test_drop_leaves_the_others_in_order(kv_dtype, window, build_gated, make_batch, page_accounts):
    """Random masks, on a cache and on forks that share its pages: each keeps just what it should."""
    model = build_gated("llama", window=window)
    set_mode(model, "evict")
    cache = DMSCache(model, page_size=16, kv_dtype=kv_dtype)
    model(make_batch(2, 150)["input_ids"], past_key_values=cache)
    generator = torch.Generator().manual_seed(3)
    caches = [cache, cache.fork()]
    for turn in range(12):
        chosen = caches[turn % 2]
        for index, layer in chosen.compacted_layers().items():
            others = [_entries(one.compacted_layers()[index]) for one in caches if one is not chosen]
            before, counts = _entries(layer), layer.store.num_kept
            mask = torch.rand(*counts.shape, int(counts.max()), generator=generator) < (0.0, 0.02, 0.3)[turn % 3]
            chosen.drop(index, mask)
            expected = [_drop_reference(kept, row) for kept, row in zip(before, mask.flatten(0, 1).tolist(), strict=True)]
            found = _entries(layer)
            if window != 3:
                # A front page of which nothing is left that the newest token sees is given back with what is gone in it.
                expected = [kept[len(kept) - len(left) :] for kept, left in zip(expected, found, strict=True)]
            assert [len(kept) for kept in found] == [len(kept) for kept in expected]
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=0.02 if kv_dtype else 0, rtol=0.01 if kv_dtype else 0)
            assert others == [_entries(one.compacted_layers()[index]) for one in caches if one is not chosen]
        for one in caches:
            model(make_batch(2, 1 + 9 * (turn % 2), seed=turn)["input_ids"], past_key_values=one)
            assert not [w for w in one.report(warn=False).warnings if "leak" in w]
        page_accounts(caches)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="without the interpreter kernels need a GPU")
@pytest.mark.slow
@pytest.mark.parametrize(("window", "max_cache_bytes"), [(3, None), ((3, 9, 30), None), ((3, 9, 30), 10**9)])
@torch.no_grad()
def test_drop_where_kernels_run(window, max_cache_bytes, build_gated, make_batch, monkeypatch):
    """The kernels' store reads and goes on after a drop as the plain one does."""
    model = build_gated("llama", window=window)
    set_mode(model, "evict")
    ids, logits = make_batch(2, 44)["input_ids"], {}
    for kernels, kind in (("reference", Store), ("triton", FusedStore)):
        monkeypatch.setenv("DMS_KERNELS", kernels)
        cache, generator = DMSCache(model, page_size=16, max_cache_bytes=max_cache_bytes), torch.Generator().manual_seed(5)
        outputs = [model(ids[:, :40], past_key_values=cache).logits]
        for place in range(40, 44):
            for index, layer in cache.compacted_layers().items():
                assert type(layer.store) is kind
                counts = layer.store.num_kept
                cache.drop(index, torch.rand(*counts.shape, int(counts.max()), generator=generator) < 0.3)
            outputs.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
        logits[kernels] = torch.cat(outputs, 1)
    torch.testing.assert_close(logits["triton"], logits["reference"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_bound_is_kept_and_a_refusal_changes_nothing(build_gated, make_batch):
    """Pages that a fork shares have to be written anew: where there is no room for that, all stays as it was."""
    model = build_gated("llama", window=3)
    set_mode(model, "evict")
    cache = DMSCache(model, page_size=16, max_cache_bytes=10**9)
    model(make_batch(1, 400)["input_ids"], past_key_values=cache)
    fork = cache.fork()
    refused = 0
    for slack in range(0, 200_000, 5_000):
        cache.budget.max_bytes = held_bytes(cache, fork) + slack
        before = [_entries(layer) for layer in cache.compacted_layers().values()]
        layer = cache.compacted_layers()[0]
        mask = torch.zeros(*layer.store.num_kept.shape, int(layer.store.num_kept.max()), dtype=torch.bool)
        mask[..., :2] = True
        try:
            cache.drop(0, mask)
        except CacheFull:
            refused += 1
            assert [_entries(layer) for layer in cache.compacted_layers().values()] == before
            assert not [w for w in cache.report(warn=False).warnings if "leak" in w]
        else:
            break
    assert refused > 0 and len(_entries(layer)[0]) == len(before[0][0]) - 2


def _entries(layer) -> list[list[list[float]]]:
    """Keys and values in the pages of each row and head, in order."""
    batch, num_heads = layer.store.num_kept.shape
    return [torch.cat(entries_in_pages(layer.store, b, h), 1).tolist() for b in range(batch) for h in range(num_heads)]


def test_what_drop_refuses(build_gated, make_batch):
    model = build_gated("gemma2")
    set_mode(model, "evict")
    cache = DMSCache(model)
    model(make_batch(1, 30)["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 .* those that do are \[1\]"):
        cache.drop(0, torch.zeros(1, 2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"drop was given torch.float32 \(1, 2, 3\), and this layer takes torch.bool \(1, 2, \d+\)"):
        cache.drop(1, torch.zeros(1, 2, 3))

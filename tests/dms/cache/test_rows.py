"""Sequences that join a cache: as if each had its own, whatever their lengths; and no page lost or shared that must not be."""

import os

import pytest
import torch
from contents import reads_from_device

from dms.cache import CacheFull, DMSCache
from dms.cache.fused_store import FusedStore
from dms.cache.rows import keep_rows
from dms.hf_compat import cache_argument
from dms.modes import set_mode

# Of logits up to 5 in size.
TOLERANCE = 1e-4


class Batch:
    """A cache of sequences of different lengths; beside it each sequence's text, which is read alone to compare."""

    def __init__(self, model, lengths, seed=0, **options):
        self.model, self.cache, self.texts = model, DMSCache(model, **options), []
        for number, length in enumerate(lengths):
            one = DMSCache(model, **options) if number else self.cache
            self.texts.append(torch.randint(2, 97, (length,), generator=torch.Generator().manual_seed(100 * seed + number)).tolist())
            self._forward(one, [self.texts[-1]], [0])
            if number:
                self.cache.batch_append(one)

    @torch.no_grad()
    def _forward(self, cache, new, past):
        ids, past = torch.tensor(new), torch.tensor(past)[:, None]
        columns = cache.get_seq_length() + ids.shape[1]
        mask = (torch.arange(columns) >= columns - ids.shape[1] - past).long()
        where = {"attention_mask": mask, "position_ids": past + torch.arange(ids.shape[1])}
        return self.model(input_ids=ids, use_cache=True, **where, **cache_argument(self.model, cache)).logits

    @torch.no_grad()
    def decode(self, num_tokens, seed=0):
        """Random tokens, whose logits are those of each text alone without a cache."""
        generator, found = torch.Generator().manual_seed(seed), []
        for _ in range(num_tokens):
            past = [len(text) for text in self.texts]
            for text in self.texts:
                text.append(int(torch.randint(2, 97, (), generator=generator)))
            found.append(self._forward(self.cache, [text[-1:] for text in self.texts], past)[:, -1])
        for row, text in enumerate(self.texts):
            expected = self.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -num_tokens:]
            torch.testing.assert_close(torch.stack([logits[row] for logits in found]), expected, atol=TOLERANCE, rtol=0)

    def keep(self, rows):
        self.texts = [list(self.texts[row]) for row in rows]
        keep_rows(self.cache, torch.tensor(rows), max(map(len, self.texts)))


@pytest.mark.parametrize(
    ("family", "options", "free"),
    [
        ("llama", {"window": 70, "alignment": "next"}, True),
        ("llama", {"window": (2, 9, 30), "sinks": 1}, False),
        ("gemma3_text", {}, True),
        ("qwen3_next", {}, True),
        pytest.param("llama", {}, False, marks=pytest.mark.slow),
        pytest.param("llama", {"window": (2, 9, 30), "sinks": 1}, True, marks=pytest.mark.slow),
    ],
)
def test_sequences_join_and_leave(family, options, free, build_gated, page_accounts):
    model = build_gated(family, hidden_size=32, **options)
    set_mode(model, "evict")
    with reads_from_device(free):
        batch = Batch(model, (90, 1, 40), page_size=16)
        batch.decode(3)
        fork = batch.cache.fork()
        other = Batch(model, (25, 130), seed=1, page_size=16)
        before = other.cache.report(warn=False)
        batch.cache.batch_append(other.cache, torch.tensor([1, 0, 1]))
        batch.texts += [list(other.texts[row]) for row in (1, 0, 1)]
        page_accounts([batch.cache, other.cache, fork])
        batch.decode(20, seed=1)
        # What joined is still there, for itself.
        assert other.cache.report(warn=False).alive == before.alive
        other.decode(2, seed=2)
        page_accounts([batch.cache, other.cache, fork])
        batch.keep([4, 1])
        assert batch.cache.get_seq_length() == max(map(len, batch.texts))
        batch.cache.batch_append(other.cache, torch.tensor([0]))
        batch.texts.append(list(other.texts[0]))
        del other, fork
        page_accounts([batch.cache])
        batch.decode(18, seed=3)
        page_accounts([batch.cache])


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU see test_on_gpu.py")
@pytest.mark.parametrize("window", [4, (2, 9, 30)])
def test_sequences_join_where_kernels_store_and_attend(window, build_gated, page_accounts, monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    model = build_gated(hidden_size=32, window=window)
    set_mode(model, "evict")
    batch, other = Batch(model, (50, 3), page_size=16), Batch(model, (40,), seed=1, page_size=16)
    batch.cache.batch_append(other.cache, torch.tensor([0, 0]))
    assert all(isinstance(layer.store, FusedStore) for layer in batch.cache.layers)
    batch.texts += [list(other.texts[0]) for _ in range(2)]
    batch.decode(3)
    batch.keep([3, 1])
    batch.cache.batch_append(other.cache)
    batch.texts.append(list(other.texts[0]))
    batch.decode(2, seed=1)
    page_accounts([batch.cache, other.cache])
    for layer in batch.cache.layers:
        layer.store.check()


def test_int8_and_saved_caches_join(build_gated, tmp_path, page_accounts):
    """The second comes from a file, and its pages are copied once, whoever shares them."""
    model = build_gated(hidden_size=32)
    set_mode(model, "evict")
    one, two = (Batch(model, (length,), seed=length, page_size=16, kv_dtype="int8") for length in (120, 90))
    two.cache.save(tmp_path / "two")
    saved = DMSCache.load(tmp_path / "two", model)
    expected = [batch.cache.report(warn=False) for batch in (one, two)]
    one.cache.batch_append(saved, torch.tensor([0, 0]))
    found = one.cache.report(warn=False)
    assert found.num_sequences == 3 and found.alive == expected[0].alive + 2 * expected[1].alive
    page_accounts([one.cache, saved])
    full = sum(int((layer.store.num_kept // 16).sum()) for layer in two.cache.layers)
    last = sum(int((layer.store.num_kept % 16 > 0).sum()) for layer in two.cache.layers)
    # Full pages are one sequence's, of a last page each has its own.
    assert full > 0 and found.pages_used == expected[0].pages_used + full + 3 * last


def test_a_bound_refuses_and_leaves_both_as_they_were(build_gated, page_accounts):
    model = build_gated(hidden_size=32)
    set_mode(model, "evict")
    large, small = Batch(model, (400,), seed=1, page_size=16), Batch(model, (30,), page_size=16)
    bounded = Batch(model, (30,), page_size=16, max_cache_bytes=2 * small.cache.report(warn=False).bytes)
    with pytest.raises(CacheFull):
        bounded.cache.batch_append(large.cache)
    assert bounded.cache.batch_size == 1
    large.decode(2)
    bounded.decode(2)
    page_accounts([large.cache, small.cache, bounded.cache])


def test_what_cannot_join_is_refused(build_gated):
    model = build_gated(hidden_size=32)
    set_mode(model, "evict")
    one = Batch(model, (30,), page_size=16)
    other = build_gated(hidden_size=32, window=9)
    set_mode(other, "evict")
    for given, said in [
        (one.cache, "takes another DMSCache, and was given this one"),
        (DMSCache(model), "one that does"),
        (Batch(model, (30,), page_size=32).cache, "make both caches with the same options"),
        (Batch(model, (30,), page_size=16, kv_dtype="int8").cache, "make both caches with the same options"),
        (Batch(other, (30,), page_size=16).cache, "same windows, sinks and alignment"),
    ]:
        with pytest.raises(ValueError, match=said):
            one.cache.batch_append(given)
        one.decode(1)

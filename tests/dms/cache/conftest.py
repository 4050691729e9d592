"""What the tests of the compacted cache share: small models, a cache in lockstep with the masked reference, and page accounting."""

from collections import Counter
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from rounded import RoundedReference

from dms.cache import CompactedLayer, DMSCache, masked_cache
from dms.cache.stats import masked_ratios
from dms.modes import set_mode

VOCABULARY = 97
# Of logits up to 5 in size.
TOLERANCE = 1e-4


def stores_of(cache) -> list:
    return [layer.store for layer in cache.layers if isinstance(layer, CompactedLayer) and not layer.is_empty]


def check_pages(caches) -> None:
    """Every pool's books against the tables of all caches that live, which are all that use it."""
    holders: dict[int, list] = {}
    for store in (store for cache in caches for store in stores_of(cache)):
        holders.setdefault(id(store.pool), []).append(store)
    for stores in holders.values():
        pool, P = stores[0].pool, stores[0].pool.page_size
        # Pages of caches that are gone come back when they are next asked for.
        pool.collect()
        for store in stores:
            if pool.budget is not None:
                # What is gone is given back before the next forward.
                store.release_gone()
        holders_of: Counter[int] = Counter()
        for store in stores:
            table, num_kept = store.page_table.tolist(), store.num_kept.tolist()
            for pages, kept in ((table[b][h], num_kept[b][h]) for b in range(len(table)) for h in range(len(table[b]))):
                holders_of.update(pages[: -(-kept // P)])
        for store in stores:
            check_lists(store)
            for pages, kept in zip(store.page_table.flatten(0, 1).tolist(), store.num_kept.flatten().tolist(), strict=True):
                assert kept % P == 0 or holders_of[pages[kept // P]] == 1, "a last page that is not full is shared"
        assert pool.references[:-1].tolist() == [holders_of[page] for page in range(pool.num_pages)]
        assert pool.num_used == len(holders_of)
        free = pool.free[: int(pool.num_free)].tolist()
        assert len(free) == len(set(free)) and set(free) == set(range(pool.num_pages)) - set(holders_of)
        assert pool.headroom <= len(free) and pool.num_holders == len(stores)
        assert pool.rows.shape[0] == pool.num_pages * 2 * P + 1


def check_lists(store) -> None:
    """Of several windows: what is in a list is older than the ring and in order of age, and its front page is not gone altogether."""
    windows, P, positions = store.pool.windows, store.pool.page_size, store.pool.positions
    if not windows:
        assert positions is None and store.page_table.shape[1] == store.num_heads
        return
    assert positions.shape == (store.pool.num_pages, P) and store.page_table.shape[1] == store.num_heads * len(windows)
    for b, newest in enumerate((store.seq_len - 1).tolist()):
        for number, (pages, kept) in enumerate(zip(store.page_table[b].tolist(), store.num_kept[b].tolist(), strict=True)):
            listed = positions[pages[: -(-kept // P)]].flatten()[:kept].tolist()
            assert listed == sorted(set(listed)) and (not listed or (listed[0] >= 0 and listed[-1] < newest - windows[0]))
            passes = number % len(windows)
            if passes and listed:
                front = listed[:P][-1]
                assert newest - front <= windows[passes], "a page whose entries are all gone is held"


class Tape:
    """Gate logits of a forward, played back to the next: a logit next to its threshold may fall on either side of it when sums are
    rounded differently, and what follows would differ for no fault of the cache."""

    def __init__(self, model):
        self.recorded, self.played, self.real = None, None, None
        for layer in model.dms.layers:
            layer.module.dms_gate.register_forward_hook(self._hook)

    @contextmanager
    def recording(self, real_BN: torch.Tensor):
        self.recorded, self.played, self.real = [], None, real_BN.bool()
        try:
            yield self
        finally:
            self.recorded = self.played = None

    def play(self) -> None:
        self.played = iter(self.recorded)

    def _hook(self, gate, args, logits_BNH):
        if self.recorded is None:
            return None
        if self.played is None:
            self.recorded.append(logits_BNH)
            return None
        recorded = next(self.played)
        torch.testing.assert_close(logits_BNH[self.real], recorded[self.real], atol=TOLERANCE, rtol=0)
        return recorded


class Lockstep:
    """One conversation of a model in evict mode, in a DMSCache and in the masked reference.

    mask [B, S]: every column so far. largest: the largest difference of logits seen by it and the conversations forked from it.
    """

    def __init__(self, model, **options):
        self.model, self.options = model, options
        self.cache, self.oracle = DMSCache(model, **options), masked_cache(model)
        self.mask = torch.zeros(1, 0, dtype=torch.long)
        self.on_trial = 0
        self.largest = [0.0]

    @property
    def batch(self) -> int:
        return self.mask.shape[0]

    def fork(self) -> "Lockstep":
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new.cache = self.cache.fork()
        # deepcopy of tensors is slow; the reference never writes into what it holds, and rows are selected into new tensors.
        new.oracle = masked_cache(self.model)
        rows = torch.arange(self.batch)
        for layer, own in zip(new.oracle.layers, self.oracle.layers, strict=True):
            vars(layer).update({name: dict(value) if isinstance(value, dict) else value for name, value in vars(own).items()})
            if hasattr(own, "conv_states"):
                layer.reorder_cache(rows)
        return new

    def read(self, mask_BN: torch.Tensor, seed: int = 0) -> float:
        """Both read the same random tokens; returns the largest difference of logits, and notes it. Where no layer is
        transformers' own, half of the tokens are read in inference mode, whose tensors nothing may write to later."""
        inference = seed % 2 == 1 and not self.model.dms.skipped
        past = self.mask if self.mask.shape[1] else self.mask.new_zeros(mask_BN.shape[0], 0)
        mask = torch.cat([past, mask_BN], 1)
        ids = torch.randint(2, VOCABULARY, mask_BN.shape, generator=torch.Generator().manual_seed(seed)) * mask_BN
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -mask_BN.shape[1] :]
        with torch.inference_mode() if inference else torch.no_grad(), self.model.tape.recording(mask_BN) as tape:
            before = self.cache.captured
            with self._cache_reads(mask_BN):
                logits = [self._forward(ids, mask, position, self.cache)]
            if self.cache.captured is not None:
                # Hooks run when a step is captured; the tensors that they saw are written again by each replay.
                if self.cache.captured is not before:
                    self.cache.captured.gate_logits = list(tape.recorded)
                elif not tape.recorded:
                    tape.recorded = self.cache.captured.gate_logits
            tape.play()
            with self._reference_reads():
                logits.append(self._forward(ids, mask, position, self.oracle))
        self.mask = mask
        difference = (logits[0] - logits[1])[mask_BN.bool()]
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        assert largest == largest, "logits that are no numbers"
        self.largest[0] = max(self.largest[0], largest)
        return largest

    def _cache_reads(self, mask_BN: torch.Tensor) -> AbstractContextManager:
        return nullcontext()

    def _reference_reads(self) -> AbstractContextManager:
        return nullcontext()

    def _forward(self, ids, mask, position, cache):
        return self.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits

    def decode(self, num_tokens: int, seed: int = 0) -> None:
        """One token after another in all rows."""
        for i in range(num_tokens):
            self.read(torch.ones(self.batch, 1, dtype=torch.long), seed + i)

    def crop(self, num_tokens: int) -> None:
        """Take back the newest tokens."""
        for cache in (self.cache, self.oracle):
            cache.crop(-num_tokens)
        self.mask = self.mask[:, : self.mask.shape[1] - num_tokens]

    def select(self, rows: list[int]) -> None:
        """Reorder the rows, which may also be fewer or more than before."""
        for cache in (self.cache, self.oracle):
            cache.reorder_cache(torch.tensor(rows))
        self.mask = self.mask[rows]

    def same_counts(self) -> None:
        """Both know as many tokens, and hold as many entries, which on trial may wait to be counted."""
        found, expected = self.cache.report(warn=False), masked_ratios(self.oracle)
        assert self.cache.get_seq_length() == self.oracle.get_seq_length() == self.mask.shape[1] == found.logical_tokens
        assert found.seen == expected["seen"]
        if not any(getattr(layer, "trial", None) for layer in self.cache.layers):
            assert found.alive == expected["alive"] and found.cr == pytest.approx(expected["cr"])
            assert found.cr_decided == pytest.approx(expected["cr_decided"])


class BesidePlain(Lockstep):
    """A cache whose pages rest in host memory, and in the reference's place one whose are on the device."""

    def __init__(self, model, **options):
        super().__init__(model, offload_layers=True, **options)
        self.oracle = DMSCache(model, **options)

    def fork(self) -> "BesidePlain":
        new = object.__new__(type(self))
        vars(new).update(vars(self), cache=self.cache.fork(), oracle=self.oracle.fork())
        return new

    def same_counts(self) -> None:
        found, expected = (cache.report(warn=False) for cache in (self.cache, self.oracle))
        names = ("logical_tokens", "seen", "alive", "pages_used", "cr_decided", "cr_LH", "bytes_alive")
        assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
        for store, plain in zip(stores_of(self.cache), stores_of(self.oracle), strict=True):
            assert torch.equal(store.num_kept, plain.num_kept)
            if store.most_kept and store.pool.offloaded is None:
                assert torch.equal(*(one.pool.pages[one.page_numbers().long()] for one in (store, plain)))


class BesideRounded(Lockstep):
    """A cache of quantised pages, and the masked reference that reads what is in them rounded."""

    def __init__(self, model, *, kv_dtype: str, **options):
        super().__init__(model, kv_dtype=kv_dtype, **options)
        self.rounding = RoundedReference(kv_dtype)

    def _cache_reads(self, mask_BN: torch.Tensor) -> AbstractContextManager:
        return self.rounding.noting(self.cache, mask_BN)

    def _reference_reads(self) -> AbstractContextManager:
        return self.rounding.playing()


@pytest.fixture(scope="session")
def lockstep():
    return Lockstep


@pytest.fixture(scope="session")
def beside_plain():
    return BesidePlain


@pytest.fixture(scope="session")
def beside_rounded():
    return BesideRounded


@pytest.fixture(scope="session")
def page_accounts():
    return check_pages


@pytest.fixture(scope="session")
def evicting(build_gated):
    """`evicting(family, window=4, ...)`: a gated model in evict mode, made once for each set of options. Leave it as it is."""
    models: dict[tuple, torch.nn.Module] = {}

    def get(family: str = "llama", **options):
        key = (family, *sorted(options.items()))
        if key not in models:
            models[key] = build_gated(family, hidden_size=32, max_position_embeddings=4096, **options)
            models[key].tape = Tape(models[key])
        set_mode(models[key], "evict")
        return models[key]

    return get

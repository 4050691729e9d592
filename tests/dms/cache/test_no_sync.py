"""The route of devices that are slow to answer: decoding reads nothing back, and gives what the CPU's route gives."""

from itertools import pairwise

import pytest
import torch
from contents import entries_in_pages, reads_from_device
from torch.utils._python_dispatch import TorchDispatchMode

from dms.cache import DMSCache, masked_cache
from dms.cache.page_pool import HostCopy, PagePool

aten = torch.ops.aten
STEPS = 250
# Their results have a shape or a value that the host must wait for.
WAITING = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.nonzero_static,
    aten.argwhere,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten._unique,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.repeat_interleave,
    aten._to_cpu,
}


class Waits(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func.overloadpacket in WAITING or by_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        # What is copied to the host as a whole calls no operator where it lies there already.
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "cpu", "numpy"):
            method = getattr(torch.Tensor, name)
            self.patch.setattr(
                torch.Tensor, name, lambda x, *args, name=name, method=method, **kw: (self.seen.append(name), method(x, *args, **kw))[1]
            )
        self.patch.setattr(HostCopy, "numbers", lambda arriving, read=HostCopy.numbers: self._unseen(read, arriving))
        return super().__enter__()

    def _unseen(self, read, arriving):
        """What was asked some steps before is on the host by now."""
        before = len(self.seen)
        numbers = read(arriving)
        del self.seen[before:]
        return numbers

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)


@pytest.fixture
def slow_device():
    """The CPU, taken for a device that answers late."""
    with reads_from_device(free=False):
        yield


def _step(model, cache, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(40, marks=pytest.mark.slow), (5, 6, 30)])
def test_decoding_waits_for_nothing(window, alignment, padded, evicting, slow_device):
    """Before the ring is full, and after; the step that first stores a page makes room for many."""
    model = evicting(window=window, alignment=alignment)
    cache, oracle = DMSCache(model, page_size=16), masked_cache(model)
    ids = torch.randint(2, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :12] = 0
    parts = [slice(0, 30), *(slice(i, i + 1) for i in range(30, 90))]
    found, expected, makes_room = [], [], {0, 41} if window == 40 else {0}
    for part in parts:
        seen = mask[:, : part.stop] if padded else None
        with Waits() as waits:
            found.append(_step(model, cache, ids[:, part], seen))
        assert bool(waits.seen) == (part.start in makes_room), waits.seen
        expected.append(_step(model, oracle, ids[:, part], seen))
    difference = (torch.cat(found, 1) - torch.cat(expected, 1)).abs()
    assert difference[mask.bool()].max() < 1e-4
    assert cache.report(warn=False).cr > 1.2


@pytest.mark.slow
@torch.no_grad()
def test_room_is_made_now_and_then(evicting, slow_device):
    """Of many steps that keep every token, one in 16 may ask how many pages are free, and few make more room."""
    model = evicting(window=5)
    cache, steps = DMSCache(model, page_size=16), []
    resized, resize = [], PagePool.resize
    model.dms.evict_bias = -100.0
    try:
        for _ in range(STEPS):
            with Waits() as waits, pytest.MonkeyPatch.context() as patch:
                patch.setattr(PagePool, "resize", lambda pool, size: (resized.append(size), resize(pool, size)))
                _step(model, cache, torch.full((8, 1), 5))
            steps.append(len(waits.seen))
    finally:
        model.dms.evict_bias = 0.0
    pool = cache.layers[0].store.pool
    assert pool.num_used == 8 * 2 * -(-(STEPS - 6) // 16) and len(resized) <= 2 * 3
    asked = [i for i, count in enumerate(steps) if count]
    assert all(later - earlier >= 10 for earlier, later in pairwise(asked)) and sum(steps) <= 2 * 3 * len(asked)
    assert len(asked) <= STEPS / 16 + 8


@torch.no_grad()
@pytest.mark.parametrize("growth", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(37, marks=pytest.mark.slow)])
def test_forks_do_not_take_what_others_reserved(growth, evicting, lockstep, page_accounts, slow_device, monkeypatch):
    """They share a pool whose free pages nobody counts at each step."""
    monkeypatch.setattr(PagePool, "growth", lambda pool: growth)
    model = evicting(window=1)
    first = lockstep(model, page_size=16)
    model.dms.evict_bias = -100.0
    try:
        # At the end of a page, with none to copy, after a step that reserved some.
        first.read(torch.ones(3, 33, dtype=torch.long))
        first.decode(1)
        forks = [first, first.fork(), first.fork()]
        for i in range(70):
            for j, one in enumerate(forks):
                # They cross page boundaries at different steps.
                if i >= 3 * j:
                    one.decode(1, seed=10 * i + j)
            if i % 5 == 0:
                page_accounts([one.cache for one in forks])
    finally:
        model.dms.evict_bias = 0.0
    for one in forks:
        one.same_counts()
    assert first.largest[0] < 1e-4
    page_accounts([one.cache for one in forks])


@torch.no_grad()
def test_heads_that_differ(evicting):
    """Some heads keep everything and others nothing: pages are taken by none, some or all of the heads of a step."""
    model = evicting(window=0)
    tables = {}
    for name, free in (("device", False), ("cpu", True)):
        with reads_from_device(free):
            cache = DMSCache(model, page_size=16)
            for i in range(100):
                _step(model, cache, torch.full((3, 1), 2 + i % 50))
            heads = [(layer.store, b, h) for layer in cache.layers for b in range(3) for h in range(2)]
            tables[name] = [tensor for head in heads for tensor in entries_in_pages(*head)]
    for device, cpu in zip(tables["device"], tables["cpu"], strict=True):
        torch.testing.assert_close(device, cpu, atol=1e-5, rtol=0)
    assert len({len(tensor) for tensor in tables["cpu"]}) > 2

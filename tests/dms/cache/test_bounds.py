"""max_cache_bytes: never exceeded, and a refusal leaves everything as it was."""

import os
import weakref

import pytest
import torch
from contents import entries_in_pages, reads_from_device
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dms.cache import CacheFull, CompactedLayer, held_bytes

FAMILIES = ["llama", "gemma3_text", "gemma4_text", "gpt_oss", "lfm2", "qwen3_next"]
# Recurrent states cannot be cropped.
CROPPABLE = {"llama", "gemma3_text", "gemma4_text", "gpt_oss", "lfm2"}
ENTRIES = ("ring_kv", "ring_state", "num_kept", "seq_len", "evicted", "decided")


def _contents(cache) -> list:
    """All that a cache holds, as tensors and numbers; kept entries wherever their pages lie."""
    found = []
    for layer in cache.layers:
        if not isinstance(layer, CompactedLayer):
            found += [value.clone() if isinstance(value, torch.Tensor) else value for value in _flat(vars(layer))]
            continue
        if not layer.is_empty:
            # Of several windows: what a forward may give back before it begins.
            layer.store.release_gone()
        found += [layer.columns, layer.record_past, layer.is_initialized, layer.is_empty]
        found += [] if layer.trial is None else [tensor.clone() for tensor in layer.trial.tensors().values()]
        if not layer.is_empty:
            found += [getattr(layer.store, name).clone() for name in ENTRIES]
            batch, heads = layer.store.num_kept.shape
            found += [tensor.clone() for b in range(batch) for h in range(heads) for tensor in entries_in_pages(layer.store, b, h)]
    return found


def _flat(value):
    if isinstance(value, dict):
        return [item for one in value.values() for item in _flat(one)]
    return [value]


def _same(found: list, expected: list) -> bool:
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else type(a) is type(b) and a == b

    return len(found) == len(expected) and all(map(equal, found, expected))


_steps = st.one_of(
    st.tuples(st.just("read"), st.one_of(st.just(1), st.integers(2, 20), st.integers(21, 150)), st.integers(0, 99)),
    st.tuples(st.just("decode"), st.integers(1, 50), st.integers(0, 99)),
    st.tuples(st.just("trial"), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99)),
    st.tuples(st.just("repeat"), st.integers(2, 3)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    st.tuples(st.just("fork")),
    st.tuples(st.just("drop")),
)


class Bounded:
    """Takes steps; one that finds no room must change nothing, and is skipped by the reference too."""

    def __init__(self, first, batch: int, bound: int, page_accounts):
        self.all, self.batch, self.bound, self.page_accounts = [first], batch, bound, page_accounts

    @property
    def now(self):
        return self.all[-1]

    def attempt(self, function) -> bool:
        before = [_contents(one.cache) for one in self.all]
        caches = [one.cache for one in self.all]
        try:
            function()
            refused = False
        except CacheFull:
            refused = True
        if refused:
            assert all(_same(_contents(cache), contents) for cache, contents in zip(caches, before, strict=True))
        assert held_bytes(*(one.cache for one in self.all)) <= self.bound
        self.page_accounts([one.cache for one in self.all])
        return not refused

    def take(self, step) -> None:
        name, *arguments = step
        if name == "read" or self.now.mask.shape[1]:
            getattr(self, name)(*arguments)
        for one in self.all:
            one.same_counts()

    def read(self, length: int, seed: int) -> None:
        batch = self.now.batch if self.now.mask.shape[1] else self.batch
        self.attempt(lambda: self.now.read(torch.ones(batch, length, dtype=torch.long), seed))

    def decode(self, length: int, seed: int) -> None:
        for i in range(length):
            self.read(1, seed + i)

    def trial(self, length: int, share: float, seed: int) -> None:
        now = self.now
        if now.model.config.model_type not in CROPPABLE:
            return
        for cache in (now.cache, now.oracle):
            cache.activate_past_recording()
        if self.attempt(lambda: now.read(torch.ones(now.batch, length, dtype=torch.long), seed)):
            # Where even this finds no room, taking back all of it does.
            count = round(share * length)
            if not self.attempt(lambda: now.cache.crop(-count)):
                count = length
                assert self.attempt(lambda: now.cache.crop(-count))
            now.oracle.crop(-count)
            now.mask = now.mask[:, : now.mask.shape[1] - count]
        now.cache.stop_past_recording()
        for layer in now.oracle.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def repeat(self, times: int) -> None:
        rows = torch.arange(self.now.batch).repeat_interleave(times)
        if len(rows) <= 6 and self.attempt(lambda: self.now.cache.batch_repeat_interleave(times)):
            self._rows(rows)

    def select(self, rows: list[int]) -> None:
        rows = torch.tensor([row % self.now.batch for row in rows])
        if self.attempt(lambda: self.now.cache.batch_select_indices(rows)):
            self._rows(rows)

    def _rows(self, rows: torch.Tensor) -> None:
        # The reference's layers of linear attention know no other change of rows.
        self.now.oracle.reorder_cache(rows)
        self.now.mask = self.now.mask[rows]

    def fork(self) -> None:
        if len(self.all) < 3:
            self.attempt(lambda: self.all.append(self.now.fork()))

    def drop(self) -> None:
        if len(self.all) > 1:
            self.all.pop(0)


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=int(os.environ.get("DMS_CASES", "12")),
    deadline=None,
    derandomize="DMS_CASES" not in os.environ,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    alignment=st.sampled_from(["own", "next"]),
    window=st.sampled_from([0, 3, 70, (0, 30), (3, 8, 90)]),
    batch=st.integers(1, 3),
    bound=st.integers(6_000, 150_000),
    slow_device=st.booleans(),
    steps=st.lists(_steps, min_size=5, max_size=15),
)
def test_a_bound_is_kept_and_a_refusal_changes_nothing(
    evicting, lockstep, page_accounts, family, alignment, window, batch, bound, slow_device, steps
):
    first = lockstep(evicting(family, alignment=alignment, window=window), page_size=16, max_cache_bytes=bound)
    bounded = Bounded(first, batch, bound, page_accounts)
    del first
    with reads_from_device(free=not slow_device):
        for step in steps:
            bounded.take(step)
    assert bounded.now.largest[0] < 1e-4


def test_a_step_has_room_whatever_list_its_own_gate_chooses(evicting, lockstep, page_accounts):
    """Under `next` without a window the token that leaves goes where the new token's gate decides: each list may need a page."""
    model = evicting(alignment="next", window=(0, 30))
    for bound in range(8_000, 40_000, 1_600):
        bounded = Bounded(lockstep(model, page_size=16, max_cache_bytes=bound), 2, bound, page_accounts)
        for step in (("read", 1, bound), ("decode", 40, bound)):
            bounded.take(step)


def _least_slack(cache, attempt, most: int, step: int) -> int:
    """Attempts with more and more room until one succeeds; each of the others must change nothing, and hold no more than before."""
    before = _contents(cache)
    held = held_bytes(cache)
    for slack in range(0, most, step):
        cache.budget.max_bytes = held + slack
        try:
            attempt()
            return slack
        except CacheFull:
            assert _same(_contents(cache), before) and held_bytes(cache) <= held
    raise AssertionError(f"no room in {most} bytes")


@pytest.mark.parametrize(("window", "least"), [(70, 100_000), ((3, 60, 100), 40_000)])
def test_a_prompt_wherever_room_ends(window, least, evicting, lockstep, page_accounts):
    """In the first layer, in the last, in the rings: what was taken until then is given back."""
    one = lockstep(evicting(window=window), page_size=16, max_cache_bytes=10**9)
    one.read(torch.ones(2, 30, dtype=torch.long))
    assert _least_slack(one.cache, lambda: one.read(torch.ones(2, 300, dtype=torch.long), 1), 500_000, 4000) > least
    one.cache.budget.max_bytes = 10**9
    one.decode(5)
    one.same_counts()
    page_accounts([one.cache])
    assert one.largest[0] < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("change", ["fork", "repeat", "reorder"])
def test_rows_wherever_room_ends(change, family, evicting, lockstep, page_accounts):
    one = lockstep(evicting(family, window=3), page_size=32, max_cache_bytes=10**9)
    one.read(torch.ones(2, 75, dtype=torch.long))
    forks = []
    attempt = {
        "fork": lambda: forks.append(one.cache.fork()),
        "repeat": lambda: one.cache.batch_repeat_interleave(3),
        "reorder": lambda: one.cache.reorder_cache(torch.tensor([0, 0, 0, 1, 1, 1])),
    }[change]
    assert _least_slack(one.cache, attempt, 200_000, 500) > 10_000
    page_accounts([one.cache, *forks])
    if change != "fork":
        rows = torch.tensor([0, 0, 0, 1, 1, 1])
        one.oracle.reorder_cache(rows)
        one.mask = one.mask[rows]
    one.cache.budget.max_bytes = 10**9
    one.decode(5)
    one.same_counts()
    assert one.largest[0] < 1e-4


def test_keeping_what_was_on_trial_wherever_room_ends(evicting, lockstep):
    """A token that was on trial may need a page; without room for it all layers still have it on trial."""
    one = lockstep(evicting(window=2), page_size=16, max_cache_bytes=10**9)
    one.read(torch.ones(2, 30, dtype=torch.long))
    for cache in (one.cache, one.oracle):
        cache.activate_past_recording()
    needed = []
    for i in range(40):
        one.cache.budget.max_bytes = 10**9
        one.read(torch.ones(2, 1, dtype=torch.long), i)
        needed.append(_least_slack(one.cache, lambda: one.cache.crop(0), 30_000, 500))
        one.same_counts()
    assert 0 in needed and max(needed) > 3000
    assert one.largest[0] < 1e-4


def test_a_fork_keeps_nothing_of_the_first_alive(evicting, lockstep):
    one = lockstep(evicting(), page_size=16, max_cache_bytes=10**9)
    one.read(torch.ones(1, 60, dtype=torch.long))
    one.read(torch.ones(1, 40, dtype=torch.long))
    fork, store = one.cache.fork(), weakref.ref(one.cache.layers[0].store)
    one.cache.reset()
    assert store() is None
    assert fork.report().warnings == [] and fork.budget is one.cache.budget

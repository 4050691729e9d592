"""Random schedules of all calls that a cache takes, with the masked reference in lockstep."""

import functools
import os

import pytest
import torch
from contents import reads_from_device
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from replays import Recorders

from dms.cache import DMSCache, capture
from dms.cache.page_pool import PagePool
from dms_kernels.quantization import KV_DTYPES

TOLERANCE = 1e-4
MAX_ROWS, MAX_COLUMNS, MAX_FORKS = 6, 400, 3

_seeds = st.integers(0, 999)
_lengths = st.one_of(st.integers(1, 4), st.integers(5, 40), st.integers(41, 150))
_rows = st.lists(st.integers(0, 9), min_size=1, max_size=MAX_ROWS)
# A step's arguments are made to fit where it is taken: rows modulo the batch, and so on.
_steps = st.one_of(
    st.tuples(st.just("read"), _lengths, st.sampled_from(["full", "left", "holes", "some rows"]), _seeds),
    st.tuples(st.just("decode"), st.integers(1, 20), st.sampled_from(["full", "some rows"]), _seeds),
    st.tuples(
        st.just("trial"),
        st.lists(st.integers(1, 9), min_size=1, max_size=3),
        st.one_of(st.none(), st.just("fork"), _rows),
        st.floats(0, 1),
        _seeds,
    ),
    st.tuples(st.just("stop_trial")),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("select"), _rows, st.booleans()),
    st.tuples(st.just("reorder"), st.permutations(range(MAX_ROWS))),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("switch"), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.integers(0, 9)),
    st.tuples(st.just("save"), st.sampled_from([16, 32, 64])),
    st.tuples(st.just("away"), st.booleans(), st.booleans()),
    st.tuples(st.just("reset"), st.integers(1, 4)),
)
_window = st.sampled_from([0, 1, 2, 5, 16, 33, 64])
# Of any sizes up to those of the longest texts.
_several = st.lists(st.one_of(_window, st.integers(0, MAX_COLUMNS)), min_size=2, max_size=4, unique=True).map(lambda x: tuple(sorted(x)))


def _configs(window):
    return st.fixed_dictionaries(
        {
            "granularity": st.sampled_from(["head", "layer"]),
            "window": window,
            "sinks": st.integers(0, 3),
            "num_key_value_heads": st.sampled_from([1, 2, 4]),
        }
    )


class Schedule:
    """Takes steps on one of several conversations that were forked from each other."""

    def __init__(self, first, batch: int, path, page_accounts):
        self.all, self.now, self.batch = [first], first, batch
        self.path, self.page_accounts = path, page_accounts

    def take(self, step) -> None:
        name, *arguments = step
        getattr(self, name)(*arguments)
        self.page_accounts([one.cache for one in self.all])
        for one in self.all:
            one.same_counts()
        assert self.now.largest[0] < TOLERANCE

    def _rows(self) -> int:
        """Of the next tokens: as many as the cache has, even where all of its tokens were taken back."""
        batch = self.now.cache.batch_size
        return batch if batch > 0 else self.batch

    def read(self, length: int, kind: str, seed: int) -> None:
        batch = self._rows()
        length = min(length, MAX_COLUMNS - self.now.mask.shape[1])
        if length < 1:
            return
        generator = torch.Generator().manual_seed(seed)
        if kind == "left":
            mask = torch.arange(length) >= torch.randint(0, length, (batch, 1), generator=generator)
        elif kind == "holes":
            mask = torch.rand(batch, length, generator=generator) < 0.7
        else:
            mask = torch.rand(batch, 1, generator=generator).expand(-1, length) < (0.6 if kind == "some rows" else 1.0)
        self.now.read(mask.long(), seed)
        # As generation loops do, say while past is recorded that nothing is taken back.
        if any(getattr(layer, "record_past", False) for layer in self.now.cache.layers):
            self.now.crop(0)

    def decode(self, length: int, kind: str, seed: int) -> None:
        for i in range(length if self.now.mask.shape[1] else 0):
            self.read(1, kind, seed + i)

    def trial(self, lengths: list[int], change: str | list[int] | None, share: float, seed: int) -> None:
        """Tokens of which some or all are taken back, after the rows have changed or a fork has gone off with them."""
        batch = self._rows()
        if self.now.mask.shape[1] > MAX_COLUMNS:
            return
        for cache in (self.now.cache, self.now.oracle):
            cache.activate_past_recording()
        for i, length in enumerate(lengths):
            real = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed + i)) < 0.8
            self.now.read(real.long(), seed + i)
            self.page_accounts([one.cache for one in self.all])
            self.now.same_counts()
        if change == "fork" and len(self.all) < MAX_FORKS:
            self.all.append(self.now.fork())
            self.all[-1].crop(round((1 - share) * sum(lengths)))
        elif isinstance(change, list):
            self.now.select([row % batch for row in change])
        self.now.crop(round(share * sum(lengths)))

    def stop_trial(self) -> None:
        self.now.cache.stop_past_recording()
        if isinstance(self.now.oracle, DMSCache):
            self.now.oracle.stop_past_recording()

    def repeat(self, times: int) -> None:
        if self.now.mask.shape[1] and self.now.batch * times <= MAX_ROWS:
            for cache in (self.now.cache, self.now.oracle):
                cache.batch_repeat_interleave(times)
            self.now.mask = self.now.mask.repeat_interleave(times, 0)

    def select(self, rows: list[int], as_mask: bool) -> None:
        if self.now.mask.shape[1] == 0:
            return
        rows = torch.tensor([row % self.now.batch for row in rows])
        if as_mask:
            rows = torch.zeros(self.now.batch, dtype=torch.bool).index_fill_(0, rows, True)
        for cache in (self.now.cache, self.now.oracle):
            cache.batch_select_indices(rows)
        self.now.mask = self.now.mask[rows]

    def reorder(self, order: list[int]) -> None:
        if self.now.mask.shape[1]:
            self.now.select([row % self.now.batch for row in order][: self.now.batch])

    def fork(self, go_on_there: bool) -> None:
        if len(self.all) < MAX_FORKS:
            self.all.append(self.now.fork())
            self.now = self.all[-1] if go_on_there else self.now

    def switch(self, which: int) -> None:
        self.now = self.all[which % len(self.all)]

    def drop(self, which: int) -> None:
        if len(self.all) > 1:
            gone = self.all.pop(which % len(self.all))
            self.now = self.all[0] if gone is self.now else self.now

    def save(self, page_size: int) -> None:
        if self.now.mask.shape[1]:
            options = {**self.now.options, "page_size": page_size, "reserve_tokens": None}
            self.now.cache.save(self.path)
            self.now.cache = DMSCache.load(self.path, self.now.model, **options)
            if isinstance(self.now.oracle, DMSCache):
                self.now.oracle.save(self.path)
                self.now.oracle = DMSCache.load(self.path, self.now.model, **{**options, "offload_layers": False})

    def away(self, everything: bool, on_disk: bool) -> None:
        """Idle caches leave the device; what comes next brings them back."""
        for one in self.all if everything else [self.now]:
            one.cache.offload_to(self.path.parent / "idle" if on_disk else "cpu")

    def reset(self, batch: int) -> None:
        self.now.cache.reset()
        self.now.oracle.reset()
        self.now.mask, self.batch = self.now.mask[:, :0], batch


class Runner:
    """Runs schedules and remembers the largest differences."""

    def __init__(self, evicting, lockstep, beside_plain, beside_rounded, page_accounts, path):
        self.evicting, self.lockstep, self.page_accounts, self.path = evicting, lockstep, page_accounts, path
        self.beside_plain, self.beside_rounded = beside_plain, beside_rounded
        self.num_rounded = 0
        self.largest: list[float] = []
        self.recorders = Recorders()

    def __call__(
        self, config, route, page_size, batch, first_length, steps, reserve=None, offload_layers=False, kv_dtype: str | None = None
    ) -> None:
        """route: "cpu", "slow device" (one that it takes long to read from), or "kernels", in Triton's interpreter, where steps of a cache with reserved
        tokens are captured. reserve: for so many tokens, which may be fewer than come. offload_layers: the reference is the plain cache then. kv_dtype: of pages, which the reference
        rounds as."""
        slow_device = route != "cpu"
        model = self.evicting(**({"family": "llama"} | config))
        kind = self.beside_plain if offload_layers else self.lockstep
        if kv_dtype is not None:
            kind = functools.partial(self.beside_rounded, kv_dtype=kv_dtype)
        schedule = Schedule(kind(model, page_size=page_size, reserve_tokens=reserve), batch, self.path, self.page_accounts)
        with reads_from_device(free=not slow_device), pytest.MonkeyPatch.context() as patch:
            if route == "kernels":
                patch.setenv("DMS_KERNELS", "triton")
                patch.setitem(capture.recorders, "cpu", self.recorders)
                self.recorders.watched = lambda: model.tape.recorded or []
            if slow_device:
                # Their pools grow by so much that in these texts none would ever run out of pages.
                patch.setattr(PagePool, "growth", lambda pool: 3)
            for step in [("read", first_length, "left", 0), *steps]:
                schedule.take(step)
                assert not offload_layers or schedule.now.largest[0] == 0
        if kv_dtype is not None:
            self.num_rounded += schedule.now.rounding.num_rounded
        self.largest.append(schedule.now.largest[0])


@pytest.fixture(scope="module")
def run_schedule(evicting, lockstep, beside_plain, beside_rounded, page_accounts, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    run = Runner(evicting, lockstep, beside_plain, beside_rounded, page_accounts, path)
    yield run
    print(
        f"\n{len(run.largest)} schedules, largest difference of logits {max(run.largest, default=0):.1e}; {run.recorders.num_recorded} captures, "
        f"{run.recorders.num_replayed} replays; {run.num_rounded:,} entries read rounded"
    )


_arguments = dict(
    config=_configs(_window),
    page_size=st.sampled_from([16, 32, 64]),
    batch=st.integers(1, 4),
    first_length=_lengths,
    steps=st.lists(_steps, min_size=6, max_size=20),
    reserve=st.sampled_from([None, 1, 40, 200]),
)
_settings = dict(
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# Of kernels in the interpreter, which take milliseconds a tile.
def _few_configs(window):
    return st.fixed_dictionaries(
        {
            "granularity": st.sampled_from(["head", "layer"]),
            "window": window,
            "sinks": st.integers(0, 2),
            "num_key_value_heads": st.sampled_from([1, 2]),
        }
    )


_few_arguments = _arguments | dict(
    config=_few_configs(st.sampled_from([0, 1, 5, 16])),
    batch=st.integers(1, 2),
    first_length=st.integers(1, 60),
    steps=st.lists(_steps, min_size=4, max_size=8),
)
_few_arguments_of_several = _few_arguments | {"config": _few_configs(st.sampled_from([(0, 5), (1, 16, 40), (0, 2, 7, 30)]))}
needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU see test_on_gpu.py")


@pytest.mark.parametrize(
    ("alignment", "route"),
    [
        ("own", "slow device"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("own", "cpu"), ("next", "cpu"), ("next", "slow device"))),
    ],
)
@settings(max_examples=14, derandomize=True, **_settings)
@given(**_arguments)
def test_schedules_equal_the_masked_reference(run_schedule, alignment, route, config, **arguments):
    run_schedule(config | {"alignment": alignment}, route, **arguments)


@pytest.mark.parametrize(
    ("alignment", "route"),
    [
        ("own", "cpu"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("next", "cpu"), ("own", "slow device"), ("next", "slow device"))),
    ],
)
@settings(max_examples=9, derandomize=True, **_settings)
@given(**(_arguments | {"config": _configs(_several)}))
def test_schedules_of_several_windows_equal_the_masked_reference(run_schedule, alignment, route, config, **arguments):
    run_schedule(config | {"alignment": alignment}, route, **arguments)


@needs_interpreter
@pytest.mark.parametrize("alignment", ["own", "next"])
@settings(max_examples=2, derandomize=True, **_settings)
@given(**_few_arguments)
def test_schedules_on_kernels(run_schedule, alignment, config, **arguments):
    run_schedule(config | {"alignment": alignment}, "kernels", **arguments)


@needs_interpreter
@pytest.mark.parametrize("alignment", ["own", pytest.param("next", marks=pytest.mark.slow)])
@settings(max_examples=1, derandomize=True, **_settings)
@given(**_few_arguments_of_several)
def test_schedules_of_several_windows_on_kernels(run_schedule, alignment, config, **arguments):
    run_schedule(config | {"alignment": alignment}, "kernels", **arguments)


@pytest.mark.parametrize("route", ["cpu", pytest.param("kernels", marks=[needs_interpreter, pytest.mark.slow])])
@settings(max_examples=3, derandomize=True, **_settings)
@given(**_few_arguments, alignment=st.sampled_from(["own", "next"]))
def test_schedules_where_layers_follow_others(run_schedule, alignment, route, config, **arguments):
    # Its other layers are transformers' own.
    run_schedule(config | {"family": "gemma4_text", "alignment": alignment}, route, **(arguments | {"reserve": None}))


_with_more_layers = st.one_of(
    _configs(window).map(lambda x: x | {"num_hidden_layers": 4}) for window in (st.sampled_from([0, 2, 5, 16]), _several)
)
_arguments_beside_plain = _arguments | {"config": _with_more_layers, "reserve": st.none(), "offload_layers": st.just(True)}


@pytest.mark.parametrize("route", ["cpu", "slow device", pytest.param("kernels", marks=[needs_interpreter, pytest.mark.slow])])
@settings(max_examples=3, derandomize=True, **_settings)
@given(**_arguments_beside_plain | {"steps": st.lists(_steps, min_size=4, max_size=8), "first_length": st.integers(1, 60)})
def test_schedules_with_pages_on_the_host_equal_the_plain_cache(run_schedule, route, **arguments):
    run_schedule(route=route, **arguments)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("DMS_CASES", "2000")) // 10, **_settings)
@given(**_arguments_beside_plain, route=st.sampled_from(["cpu", "slow device"]))
def test_many_schedules_with_pages_on_the_host(run_schedule, route, **arguments):
    run_schedule(route=route, **arguments)


_with_kinds = _arguments | {"config": st.one_of(_configs(_window), _configs(_several)), "kv_dtype": st.sampled_from(list(KV_DTYPES))}


@pytest.mark.parametrize("alignment", ["own", "next"])
@settings(max_examples=4, derandomize=True, **_settings)
@given(**_with_kinds, route=st.sampled_from(["cpu", "slow device"]))
def test_schedules_of_quantised_pages_equal_the_rounded_reference(run_schedule, alignment, config, **arguments):
    run_schedule(config | {"alignment": alignment}, **arguments)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("DMS_CASES", "2000")), **_settings)
@given(**_with_kinds, alignment=st.sampled_from(["own", "next"]), route=st.sampled_from(["cpu", "slow device"]))
def test_many_schedules_of_quantised_pages(run_schedule, alignment, config, **arguments):
    run_schedule(config | {"alignment": alignment}, **arguments)


@pytest.mark.slow
@needs_interpreter
@settings(max_examples=int(os.environ.get("DMS_CASES", "2000")) // 40, **_settings)
@given(**_few_arguments_of_several, alignment=st.sampled_from(["own", "next"]))
def test_many_schedules_of_several_windows_on_kernels(run_schedule, alignment, config, **arguments):
    run_schedule(config | {"alignment": alignment}, "kernels", **arguments)


@pytest.mark.slow
@needs_interpreter
@settings(max_examples=int(os.environ.get("DMS_CASES", "2000")) // 40, **_settings)
@given(**_few_arguments, alignment=st.sampled_from(["own", "next"]))
def test_many_schedules_on_kernels(run_schedule, alignment, config, **arguments):
    run_schedule(config | {"alignment": alignment}, "kernels", **arguments)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("DMS_CASES", "2000")), **_settings)
@given(**_arguments, alignment=st.sampled_from(["own", "next"]), route=st.sampled_from(["cpu", "slow device"]))
def test_many_schedules_equal_the_masked_reference(run_schedule, alignment, route, config, **arguments):
    run_schedule(config | {"alignment": alignment}, route, **arguments)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("DMS_CASES", "2000")), **_settings)
@given(
    **(_arguments | {"config": _configs(_several)}),
    alignment=st.sampled_from(["own", "next"]),
    route=st.sampled_from(["cpu", "slow device"]),
)
def test_many_schedules_of_several_windows(run_schedule, alignment, route, config, **arguments):
    run_schedule(config | {"alignment": alignment}, route, **arguments)

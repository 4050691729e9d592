"""The scheduler's arithmetic against ranks that count their pages, and those against the real cache."""

import itertools
import os
from random import Random

import pytest
import torch
from house import python
from voucher_simulator import Rank, Request, Server, make_fates, make_server

from dms.cache.page_pool import PagePool
from dms.cache.pending import EVICT, PendingTokens, list_of
from dms.cache.store import Store
from dms.config import DMSConfig
from dms.masks import Tokens
from dms_vllm.vouchers import Geometry, Ledger, Report


def one_line(windows: tuple[int, ...], page_size: int) -> Geometry:
    return Geometry(lines=1, windows=windows, page_size=page_size)


def test_needs_neither_vllm_nor_torch():
    python("import dms_vllm.vouchers, sys; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)")


# The worst case.


@pytest.mark.parametrize(("windows", "page_size"), [((0,), 1), ((1,), 3), ((0, 1), 2), ((1, 50), 3), ((0, 2, 4), 2), ((1, 50, 60), 2)])
def test_growth_is_the_worst_case(windows, page_size):
    """Of all decisions, from all fills of a line's last pages; and where these are full and nothing is gone yet, it is reached."""
    geometry, K = one_line(windows, page_size), len(windows)
    most = {1: 9, 2: 6, 3: 5}[K]
    for fills in itertools.product(range(1, page_size + 1), repeat=K):
        worst = [0] * (most + 1)
        filling = [c + 1 if c else 0 for c, fill in enumerate(fills) for _ in range(fill)]
        start = len(filling) + geometry.ring
        for fates in itertools.product(range(K + 1), repeat=most):
            rank = Rank(geometry, 1000)
            rank.begin("a", 0, [bytes([*filling, *fates, *[1] * geometry.ring])])
            rank.push(rank.sequences["a"], 0, 0, start)
            held = rank.used
            for n in range(most):
                rank.push(rank.sequences["a"], 0, start + n, 1)
                worst[n + 1] = max(worst[n + 1], rank.used - held)
        grown = [geometry.growth(start, start + n) for n in range(most + 1)]
        assert all(x <= y for x, y in zip(worst, grown, strict=True)), fills
        if set(fills) == {page_size} and (K == 1 or windows[1] > start + most):
            assert worst == grown


@pytest.mark.parametrize("windows", [(0,), (2,), (0, 1), (1, 4), (0, 1, 2), (1, 3, 8)])
@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_growth_from_nothing_is_reached(windows, page_size):
    geometry, K = one_line(windows, page_size), len(windows)
    for most in range(7 if K < 3 else 6):
        worst = 0
        for fates in itertools.product(range(K + 1), repeat=most):
            rank = Rank(geometry, 1000)
            rank.begin("a", 0, [bytes([*fates, *[1] * geometry.ring])])
            for n in range(most + geometry.ring):
                rank.push(rank.sequences["a"], 0, n, 1)
            worst = max(worst, rank.used)
        assert worst == geometry.growth(0, most + geometry.ring), most


def test_bound_takes_the_best_horizon():
    geometry = Geometry(lines=10, windows=(7,), page_size=4, pages_per_voucher=3)
    assert geometry.horizons == (0, 1, 2, 8)
    report = Report(100, (50, 52, 54, 58))
    assert [geometry.bound(report, 100 + n) for n in (0, 1, 2, 3, 8, 9, 13)] == [50, 52, 54, 58, 58, 68, 78]
    # All of the ring may be evicted, or hold little of what there is.
    assert geometry.bound(Report(100, (50, 50, 50, 50)), 112) == 50 + 10
    assert geometry.bound(Report(100, (50,)), 112) == 50 + 10 * 3
    assert geometry.vouchers(0) == 1 and geometry.vouchers(10) == 4
    assert one_line((0,), 4).horizons == (0, 1) and one_line((1,), 4).horizons == (0, 1, 2)


def test_reports_of_ranks_merge():
    assert Report(5, (3, 4, 9)).merge(Report(4, (2, 6, 8))) == Report(4, (3, 6, 9))
    assert Report(5, (3, 4, 9)).merge(Report(5, (4,))) == Report(5, (4,))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [({"lines": 0}, "1 of each at least"), ({"windows": ()}, "one or more"), ({"windows": (4, 4)}, "longer than the one before")],
)
def test_geometry_refuses(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        Geometry(**({"lines": 1, "windows": (4,), "page_size": 16} | changed))


def test_pool_that_is_too_small_is_refused():
    geometry = Geometry(lines=8, windows=(15,), page_size=16, pages_per_voucher=4)
    needed = geometry.of_longest(1000)
    assert needed == 8 * -(-984 // 16) // 4
    geometry.check_pool(needed, 1000)
    with pytest.raises(
        ValueError, match=r"has 62 vouchers of 4 pages.* need 124.* to 2.00 times .* or max_model_len to (\d+) at most"
    ) as raised:
        geometry.check_pool(62, 1000)
    fits = int(str(raised.value).split(" to ")[-1].split()[0])
    geometry.check_pool(62, fits)
    with pytest.raises(ValueError, match="vouchers"):
        geometry.check_pool(62, fits + 1)
    with pytest.raises(ValueError, match="for any max_model_len"):
        geometry.check_pool(0, 10)


# The ledger.


def test_ledger_gives_back_what_reports_free():
    ledger = Ledger(Geometry(lines=4, windows=(7,), page_size=4, pages_per_voucher=2))
    assert ledger.needed("a", 48) == ledger.schedule("a", 48) == 4 * 10 // 2 and ledger.held("a") == 20
    # Scheduled again before anything is reported.
    assert ledger.schedule("a", 49) == 2 and ledger.needed("a", 49) == 0
    assert ledger.report("a", Report(48, (8, 8, 9, 12))) == 22 - 4
    assert ledger.held("a") == ledger.num_held == 4
    # It was told of so few tokens before, and of nobody of that name.
    assert ledger.report("a", Report(40, (1,))) == ledger.report("b", Report(40, (1,))) == 0
    assert ledger.schedule("a", 50) == 1
    assert ledger.free("a") == 5 and ledger.free("a") == 0 and not ledger.holders


def test_admission_learns_what_prompts_take():
    geometry = Geometry(lines=4, windows=(7,), page_size=4)
    ledger = Ledger(geometry)
    assert ledger.admission("next", 1000) == geometry.of_longest(1000)
    for number in range(20):
        ledger.schedule(number, 64)
        ledger.report(number, Report(64, (geometry.growth(0, 64) // 4,)))
        ledger.free(number)
    assert ledger.kept == pytest.approx(0.25, abs=0.02)
    assert ledger.admission("next", 1000) == pytest.approx(0.25 * geometry.of_longest(1000), rel=0.05)
    # Its first chunk comes as if nothing was evicted, and so does the last.
    assert ledger.admission("next", 1000, 1000) == geometry.of_longest(1000)
    assert ledger.admission("next", 1000, 200) > ledger.admission("next", 1000)
    # What other prompts are expected to take yet is not there for it.
    alone = ledger.admission("next", 1000)
    ledger.schedule("other", 100, prompt_tokens=1000)
    assert ledger.admission("next", 1000) == 2 * alone - ledger.held("other")
    ledger.schedule("other", 1000)
    assert ledger.admission("next", 1000) == alone


def test_prefix_is_charged_once():
    ledger = Ledger(Geometry(lines=4, windows=(7,), page_size=4))
    ledger.schedule("a", 40)
    held = ledger.held("a")
    assert ledger.fork("a", "prefix") == ledger.fork_vouchers == 4
    assert (ledger.held("prefix"), ledger.held("a")) == (held, 4)
    # What is on its way counts pages that are the prefix's by now.
    assert ledger.report("a", Report(40, (held,))) == 0 and ledger.held("a") == 4
    assert ledger.report("prefix", Report(40, (12, 12, 12, 12))) == held - 12
    assert ledger.begin("b", "prefix") == 40
    assert ledger.schedule("b", 44) == 4 + 4
    with pytest.raises(ValueError, match="shares its pages with 2 others"):
        ledger.free("prefix")
    with pytest.raises(ValueError, match="cannot begin"):
        ledger.begin("b", "prefix")
    with pytest.raises(ValueError, match="cannot be made"):
        ledger.fork("b", "prefix")
    ledger.schedule("a", 41)
    assert ledger.report("a", Report(41, (4, 5))) == 4
    # One of the first prefix's, too.
    ledger.fork("a", "longer")
    assert ledger.holders["longer"].prefix == "prefix" and ledger.holders["prefix"].users == 2
    for name in ("a", "longer", "b", "prefix"):
        ledger.free(name)
    assert not ledger.holders


# Schedules.


class Totals:
    """What many schedules came to."""

    def __init__(self) -> None:
        self.schedules = self.requests = self.finished = self.preemptions = self.hits = self.aborted = 0
        self.pages = self.vouchers = 0.0

    def run(self, seed: int, **classes) -> None:
        server, requests, abort_share = make_server(seed, **classes)
        try:
            aborted = server.serve(requests, abort_share)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        assert server.finished + aborted == len(requests)
        self.schedules += 1
        self.requests += len(requests)
        self.finished, self.aborted = self.finished + server.finished, self.aborted + aborted
        self.preemptions, self.hits = self.preemptions + server.preemptions, self.hits + server.hits
        self.pages = max(self.pages, *(rank.peak / rank.num_pages for rank in server.ranks), 0.0)
        self.vouchers = max(self.vouchers, server.most_vouchers / server.num_vouchers)

    def print(self) -> None:
        print(
            f"\n{self.schedules} schedules of {self.requests} requests: {self.finished} finished, {self.aborted} aborted; {self.preemptions} preemptions, "
            f"{self.hits} began from a prefix; at most {self.pages:.1%} of a pool's pages and {self.vouchers:.1%} of its vouchers"
        )


def run_schedules(first: int, count: int) -> Totals:
    totals = Totals()
    for seed in range(first, first + count):
        totals.run(seed)
    totals.print()
    return totals


def test_schedules_stay_within_the_pool():
    totals = run_schedules(0, 200)
    # They come to the edges that they are to be held to.
    assert totals.preemptions > 100 and totals.hits > 50 and totals.aborted > 50
    assert totals.pages == totals.vouchers == 1.0


@pytest.mark.slow
def test_many_schedules_stay_within_the_pool():
    run_schedules(1000, int(os.environ.get("DMS_CASES", "5000")))


class WithoutFirstPages(Geometry):
    """Forgets that each list may begin a page."""

    def growth(self, start, end):
        leaving = max(0, max(0, end - self.ring) - max(0, start - self.ring))
        return self.lines * (leaving // self.page_size)


class OneList(Geometry):
    """Takes the lists of a line for one."""

    def growth(self, start, end):
        leaving = max(0, max(0, end - self.ring) - max(0, start - self.ring))
        return self.lines * -(-leaving // self.page_size)


class WithoutTheRing(Geometry):
    """Counts no token of a chunk that leaves the ring."""

    def bound(self, report, num_tokens):
        return min(super().bound(report, num_tokens), report.pages[-1]) if report.tokens else super().bound(report, num_tokens)


class WithoutFlight(Ledger):
    """Gives back what tokens need that are on their way."""

    def report(self, name, report):
        if name in self.holders:
            self.holders[name].scheduled = report.tokens
        return super().report(name, report)


class WithoutCopies(Ledger):
    """Forgets the open pages that a fork copies."""

    def fork(self, name, prefix):
        taken = super().fork(name, prefix)
        self.holders[name].start = self.holders[name].latest = Report(self.holders[name].scheduled, (0,))
        return taken


@pytest.mark.parametrize(
    "wrong",
    [
        {"geometry_class": WithoutFirstPages},
        {"geometry_class": OneList},
        {"geometry_class": WithoutTheRing},
        {"ledger_class": WithoutFlight},
        {"ledger_class": WithoutCopies},
    ],
    ids=lambda wrong: next(iter(wrong.values())).__name__,
)
def test_a_looser_bound_is_found(wrong):
    with pytest.raises(AssertionError, match="pages"):
        for seed in range(100):
            Totals().run(seed, **wrong)


# The ranks' counting against the real cache.


def decisions(fates: list[bytes], windows: int, random: Random) -> torch.Tensor:
    """[1, N, H] bool, with several windows [1, N, H, K], of which what follows the first one that evicts says nothing."""
    first = torch.tensor([list(line) for line in fates]).T[None]
    if windows == 1:
        return first == 1
    j = torch.arange(1, windows + 1)
    noise = torch.rand(*first.shape, windows, generator=torch.Generator().manual_seed(random.randrange(1000))) < 0.5
    return (first[..., None] == j) | ((first[..., None] > 0) & (j > first[..., None]) & noise)


def new_tokens(decision: torch.Tensor, start: int, end: int, head_dim: int = 2) -> PendingTokens:
    kv = torch.zeros(1, decision.shape[2], end - start, head_dim)
    tokens = Tokens(torch.ones(1, end - start, dtype=torch.int32), torch.arange(start, end, dtype=torch.int32)[None])
    return PendingTokens(decision[:, start:end], tokens, kv, kv)


def report_of(store: Store, geometry: Geometry, own: int) -> Report:
    """What a worker says of a store of one sequence that owns so many pages."""
    tokens, ring, P = int(store.seq_len[0]), geometry.ring, geometry.page_size
    position = torch.arange(max(0, tokens - ring), tokens)
    state = store.ring_state[0][:, (position % ring)]
    in_list = (list_of(state)[..., None] == torch.arange(store.lists_per_head)) & (state != EVICT)[..., None]
    pages = []
    for horizon in geometry.horizons:
        comes = in_list[:, : max(0, len(position) + horizon - ring)].sum(1).flatten()
        before = store.num_kept[0]
        pages.append(own + int((-(-(before + comes) // P) - -(-before // P)).sum()))
    return Report(tokens, tuple(pages))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("windows", [(5,), (0,), (0, 9), (3, 20, 40), (2, 4, 11, 30)])
def test_ranks_count_as_the_cache_does(windows, seed, monkeypatch):
    random = Random(seed)
    geometry = Geometry(lines=2, windows=windows, page_size=random.choice([4, 16]))
    config = DMSConfig(window=windows if len(windows) > 1 else windows[0])
    pool = PagePool(geometry.page_size, 2, torch.float32, torch.device("cpu"), windows=windows if len(windows) > 1 else ())
    store, rank = Store(config, pool, 1, 2), Rank(geometry, 10_000)
    used_at = []
    take = PagePool.take
    monkeypatch.setattr(PagePool, "take", lambda pool, wanted: (take(pool, wanted), used_at.append(pool.num_pages - int(pool.num_free)))[0])
    length = random.choice([60, 200])
    fates = make_fates(random, length, 2, len(windows))
    decision = decisions(fates, len(windows), random)
    rank.begin("a", 0, fates)
    tokens, forks = 0, []
    while tokens < length:
        num_new, before = min(length - tokens, random.choice([1, 1, 1, 2, 9, 70])), pool.num_used
        bound = geometry.bound(report_of(store, geometry, before), tokens + num_new)
        assert rank.report(rank.sequences["a"]) == report_of(store, geometry, rank.sequences["a"].own)
        used_at.clear()
        store.push(new_tokens(decision, tokens, tokens + num_new))
        for line in range(2):
            rank.push(rank.sequences["a"], line, tokens, num_new)
        tokens += num_new
        rank.sequences["a"].tokens = tokens
        assert pool.num_used == rank.used
        assert max(used_at, default=0) <= max(before, pool.num_used)
        assert forks or pool.num_used <= bound
        if random.random() < 0.1:
            used_at.clear()
            forks.append(store.copy())
            rank.fork("a", f"prefix {len(forks)}")
            assert pool.num_used == rank.used and max(used_at, default=0) <= rank.used
    assert rank.sequences["a"].own <= int((-(-store.num_kept // geometry.page_size)).sum())


# How much more is vouched for than is held.


@pytest.mark.slow
@pytest.mark.parametrize("windows", [(128,), (32, 128, 512)])
def test_decoding_holds_little_more_than_it_needs(windows):
    """Requests of 256 lines at CR 8, 1,000 to 1,500 tokens long: pages held over pages vouched for, by rings and lists that hold an eighth in all."""
    K, random = len(windows), Random(0)
    geometry = Geometry(lines=256, windows=windows, page_size=16, pages_per_voucher=8)
    share = [0.125, 0.875] if K == 1 else [0.06, 0.7, 0.16, 0.08]
    prompts = [random.randint(1000, 1500) for _ in range(3)]
    longest = max(prompts) + 40
    for delay in (0, 1):
        ratios: dict[str, list[float]] = {"reading": [], "decoding": []}
        server = Server(
            Ledger(geometry), 4 * geometry.of_longest(longest), 1, random, budget=512, chunk=512, max_requests=8, delay=delay, early=True,
            fork_share=0.0, report_share=1.0,
        )  # fmt: skip
        for number, prompt in enumerate(prompts):
            weights = [[x * random.uniform(0.5, 1.5) for x in share] for _ in range(256)]
            fates = [bytes(random.choices(range(K + 1), of_line, k=prompt + 40)) for of_line in weights]
            server.waiting.append(Request(str(number), prompt, prompt + 40, prompt + 40, 0, 0, [fates], known=prompt))
        while server.waiting or server.running:
            step = server.schedule()
            held = server.num_vouchers - server.free
            server.run(step)
            if step.tokens:
                kind = "decoding" if all(num_new == 1 for *_, num_new in step.tokens.values()) else "reading"
                ratios[kind].append(server.ranks[0].used / (held * geometry.pages_per_voucher))
            server.flying.append(step)
            while len(server.flying) > (delay if server.running else 0):
                server.update(server.flying.popleft())
        mean = {kind: sum(x) / len(x) for kind, x in ratios.items()}
        print(
            f"\nwindows {windows}, reports {delay} steps late: pages held over pages vouched for, reading {mean['reading']:.3f}, decoding {mean['decoding']:.3f}"
        )
        assert mean["decoding"] > 0.9

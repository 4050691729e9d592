"""The scheduler's arithmetic: a bound on the pages that each request can need, and who holds vouchers for them. Plain Python.

All layers and KV heads of a rank take pages from one pool. Workers own the page tables, and the scheduler knows counts alone: a voucher (a
block of vLLM's) stands for some pages on every rank, and a holder has vouchers for a bound on the pages that it can need on any rank with
all tokens that it was scheduled. What workers report lowers the bound, and what is too much goes back. Vouchers of all holders are no more
than there are, so that no pool runs out of pages.

Words: a line is a KV head of a layer; with K windows it has K lists of pages (`dms.cache.head_pages`), with one window one. The ring is
the w_1 + 1 newest tokens of a request, which take no pages. A list of n entries, those included that are gone and not given back, has
ceil(n / P) pages, and entries are only added at its end.

Why the bound holds at every moment, not between steps alone:

- It counts nothing that a window takes away after the report. n then never falls in the sum, the bound of each line grows with its
  tokens, and it covers any mixture of layers that have stored a step's tokens and layers that have not, and any division of a chunk.
- `Store.push` gives back pages before it takes any, and takes none ahead of the entry that begins it: within a push a list never has more
  pages than before or after. A last page that is not full is given back when all of it is gone, and the next entry begins a page again;
  ceil(n / P), with what is gone in n, is no less.
- Open pages are copied when a cache is forked, not when one of the two writes next, and forks have vouchers for the copies.

Reservations without pages (`PagePool.reserve`, a page a list ahead, on other devices than a CPU) are not counted: a pool of fixed size must
not refuse them.
"""

from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from math import ceil

# A prompt's expected share is learned from requests of so many rings or more, by this part at a time.
_LONG = 2
_RATE = 0.2


@dataclass(frozen=True)
class Report:
    """What a rank knows of one holder's pages."""

    tokens: int
    """Stored, those in the ring included."""
    pages: tuple[int, ...]
    """For each of `Geometry.horizons`, the holder's own pages (those not shared with the prefix that it began from) when so many more tokens
    have come, as far as the ring decides: the sum over all lists of ceil(n / P), where n counts the list's entries now, and those that leave
    the ring for it by then. The first is what is held now. May end early: what is not reported is bounded."""

    def merge(self, other: "Report") -> "Report":
        """A report that holds for two ranks: the fewer tokens and the more pages."""
        return Report(min(self.tokens, other.tokens), tuple(map(max, zip(self.pages, other.pages, strict=False))))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What decides how many pages tokens take."""

    lines: int
    """KV heads of all layers with gates, of the rank that has most."""
    windows: tuple[int, ...]
    """Tokens, rising."""
    page_size: int
    """Entries of a page."""
    pages_per_voucher: int = 1
    ring_pages: int = 0
    """As many pages as a holder's rings take memory, which lie beside the pages: they count as if they were some."""

    def __post_init__(self) -> None:
        if min(self.lines, self.page_size, self.pages_per_voucher) < 1:
            raise ValueError(f"{self}: there are lines, entries of a page and pages of a voucher, 1 of each at least")
        if not self.windows or self.windows[0] < 0 or list(self.windows) != sorted(set(self.windows)):
            raise ValueError(f"windows are {self.windows}; give one or more, from 0, each longer than the one before it")

    @property
    def ring(self) -> int:
        """Tokens."""
        return self.windows[0] + 1

    @property
    def horizons(self) -> tuple[int, ...]:
        """Tokens to come of which workers report: none; those of one and of two steps of decoding; as many as the ring has."""
        return tuple(sorted({0, 1, min(2, self.ring), self.ring}))

    @property
    def open_pages(self) -> int:
        """Pages that are not full, at most: what a fork copies."""
        return self.lines * len(self.windows)

    def growth(self, start: int, end: int) -> int:
        """Pages that a request of end tokens can have more than it had with start, at most, whatever it had then.

        The worst case of a line of which m tokens leave the ring is that all are kept and all of its K lists' pages are full, or have
        no entry: a token begins a page in each list, as long as there are lists, and from then on P tokens begin one, in whichever list
        (each has P - 1 places left; P tokens for one page is the most that any page takes, so that none is cheaper elsewhere). What
        leaves the ring last is in all windows but the first, so that nothing needs to be gone by then.
        """
        leaving = max(0, max(0, end - self.ring) - max(0, start - self.ring))
        lists = len(self.windows)
        return self.lines * (min(leaving, lists) + max(0, leaving - lists) // self.page_size)

    def bound(self, report: Report, num_tokens: int) -> int:
        """Pages that a holder can need until it has num_tokens, by one report: from each of its horizons, the worst case of what follows.

        A chunk longer than the ring so counts the ring's tokens as they were decided, and of its own tokens all that leave the ring.
        """
        return min(
            pages + self.growth(report.tokens + horizon, num_tokens) for horizon, pages in zip(self.horizons, report.pages, strict=False)
        )

    def vouchers(self, pages: int) -> int:
        """Vouchers for so many pages and the rings: one at least, by which a request is named."""
        return max(1, -(-(pages + self.ring_pages) // self.pages_per_voucher))

    def of_longest(self, max_model_len: int) -> int:
        """Vouchers that one request of max_model_len tokens needs, where nothing is evicted."""
        return self.vouchers(self.growth(0, max_model_len))

    def check_pool(self, num_vouchers: int, max_model_len: int) -> None:
        """Raises ValueError where a request of max_model_len tokens could never be sure of its pages, however many wait for it."""
        needed = self.of_longest(max_model_len)
        if needed > num_vouchers:
            fits = bisect_right(range(max_model_len), num_vouchers, key=self.of_longest) - 1
            instead = f"or max_model_len to {fits} at most" if fits > 0 else "for any max_model_len it has too few"
            raise ValueError(
                f"the pool has {num_vouchers} vouchers of {self.pages_per_voucher} pages, and one request of max_model_len {max_model_len} may need "
                f"{needed}, where its gates evict nothing; set kv_cache_memory_bytes (or gpu_memory_utilization) to "
                f"{needed / max(1, num_vouchers):.2f} times as much for the cache, {instead}"
            )


@dataclass
class _Holder:
    """A request that runs, or a cached prefix."""

    start: Report
    """From which it began: its own pages then."""
    latest: Report
    held: int = 0
    scheduled: int = 0
    """Tokens."""
    prompt: int = 0
    """Tokens that it is expected to need soon; none of a prefix."""
    prefix: Hashable | None = None
    """With which it shares pages, which that one holds vouchers for."""
    users: int = 0
    """Holders whose prefix this is."""
    next_sample: int = 0
    """Tokens from which on its share kept is learned from once more."""


@dataclass
class Ledger:
    """Who holds how many vouchers, and should. Holders have any names; the pool of vouchers, and which is whose, is the caller's.

    Tokens may be scheduled again before what was scheduled before is reported, any number of times. Workers must end, begin and fork requests
    in the order in which that was done here, before the step that was scheduled after it. A name may be used again once no report on its
    earlier life can come.
    """

    geometry: Geometry
    kept: float = 1.0
    """Expected share of what a prompt would take if nothing was evicted; learned from requests as they go."""
    holders: dict[Hashable, _Holder] = field(default_factory=dict)

    def held(self, name: Hashable) -> int:
        """Vouchers."""
        return self.holders[name].held if name in self.holders else 0

    @property
    def num_held(self) -> int:
        """Vouchers of all holders."""
        return sum(one.held for one in self.holders.values())

    def needed(self, name: Hashable, num_tokens: int) -> int:
        """Vouchers that a request lacks to be scheduled up to num_tokens."""
        one = self.holders.get(name) or self._new()
        return max(0, self.geometry.vouchers(self._bound(one, num_tokens)) - one.held)

    def admission(self, name: Hashable, prompt_tokens: int, chunk_tokens: int = 0) -> int:
        """Vouchers that must be free for a waiting request to begin: what its prompt is expected to take, beside what the prompts that are
        being read are expected to take yet, and no less than what its first chunk of chunk_tokens may take.

        What comes otherwise is caught when a later chunk finds too few vouchers. Never more than `of_longest` where nobody else holds any.
        """
        expected = self._expected(self.holders.get(name) or self._new(), prompt_tokens, chunk_tokens)
        first = self.needed(name, self._start_of(name) + chunk_tokens)
        others = (one for other, one in self.holders.items() if other != name and one.scheduled < one.prompt)
        return max(first, expected + sum(max(0, self._expected(one, one.prompt, 0) - one.held) for one in others))

    def schedule(self, name: Hashable, num_tokens: int, prompt_tokens: int = 0) -> int:
        """A request gets tokens up to num_tokens: vouchers to take for it, which must be free (`needed` asks before).

        prompt_tokens: how long its prompt is, for `admission` of others; 0: as it was.
        """
        missing = self.needed(name, num_tokens)
        one = self.holders.setdefault(name, self._new())
        one.held += missing
        one.scheduled = max(one.scheduled, num_tokens)
        one.prompt = prompt_tokens or one.prompt
        return missing

    def report(self, name: Hashable, report: Report) -> int:
        """What the ranks have told, merged: vouchers to give back. Reports on holders that have ended, or on what was before a fork, say nothing."""
        one = self.holders.get(name)
        if one is None or report.tokens <= one.start.tokens or report.tokens < one.latest.tokens:
            return 0
        one.latest = report
        self._learn(one)
        surplus = max(0, one.held - self.geometry.vouchers(self._bound(one, one.scheduled)))
        one.held -= surplus
        return surplus

    def free(self, name: Hashable) -> int:
        """A request has ended or is preempted, or a prefix is no longer cached: vouchers to give back.

        Raises:
            ValueError: a prefix that others began from.
        """
        if name not in self.holders:
            return 0
        if self.holders[name].users:
            raise ValueError(f"prefix {name!r} shares its pages with {self.holders[name].users} others; free those first")
        one = self.holders.pop(name)
        if one.prefix is not None:
            self.holders[one.prefix].users -= 1
        return one.held

    # Prefixes. Of two that share pages the prefix holds vouchers for them, as long as anybody shares them, and the other for the rest: the
    # open pages, which are copied, and what comes.

    @property
    def fork_vouchers(self) -> int:
        """What `fork` takes."""
        return self.geometry.vouchers(self.geometry.open_pages)

    def finishes(self, prefix_vouchers: int, start: int, max_model_len: int, num_vouchers: int) -> bool:
        """Whether a request that shares start tokens, whose prefix and that one's own hold so many vouchers, can have all tokens that it may
        grow to when nobody else holds any. Else it would wait for ever for vouchers that its own prefix has."""
        rest = self.geometry.open_pages + self.geometry.growth(start, max_model_len)
        return prefix_vouchers + self.geometry.vouchers(rest) <= num_vouchers

    def of_prefixes(self, name: Hashable | None) -> int:
        """Vouchers of a prefix and of those that it began from; None: of none."""
        one = None if name is None else self.holders[name]
        return 0 if one is None else one.held + self.of_prefixes(one.prefix)

    def fork(self, name: Hashable, prefix: Hashable) -> int:
        """Cache what a request has of all tokens scheduled until now as a prefix: vouchers to take, `fork_vouchers`, which must be free.

        The prefix gets what the request held, and the request what is taken: move vouchers until each has `held` of them.

        Raises:
            ValueError: there is such a prefix, or the request has no tokens.
        """
        one = self.holders.get(name)
        if prefix in self.holders or one is None or one.scheduled == 0:
            raise ValueError(f"prefix {prefix!r} cannot be made of {name!r}; fork a request that has tokens, to a new name")
        self.holders[prefix] = replace(one, prompt=0, users=1)
        # What is reported of the request from before is of the prefix's pages too.
        start = Report(one.scheduled, (self.geometry.open_pages,))
        self.holders[name] = replace(one, start=start, latest=start, held=self.fork_vouchers, prefix=prefix)
        return self.fork_vouchers

    def keep(self, name: Hashable, prefix: Hashable) -> None:
        """A request has ended, and is a prefix from here on, with the vouchers that it holds.

        Raises:
            ValueError: there is such a prefix, or no such request.
        """
        if prefix in self.holders or name not in self.holders:
            raise ValueError(f"{name!r} cannot become the prefix {prefix!r}; a request that has tokens becomes a new one")
        self.holders[prefix] = replace(self.holders.pop(name), prompt=0)

    def begin(self, name: Hashable, prefix: Hashable) -> int:
        """A request begins with a prefix's tokens, of which it says the number; `free` undoes it where it is not scheduled after all.

        Until then it holds nothing, and workers must not have begun it.

        Raises:
            ValueError: the request has begun, or there is no such prefix.
        """
        if name in self.holders or prefix not in self.holders:
            raise ValueError(f"{name!r} cannot begin from {prefix!r}; a request that holds nothing begins from a prefix that is cached")
        source = self.holders[prefix]
        source.users += 1
        start = Report(source.scheduled, (self.geometry.open_pages,))
        self.holders[name] = _Holder(start, start, scheduled=source.scheduled, prefix=prefix)
        return source.scheduled

    def _new(self) -> _Holder:
        nothing = Report(0, (0,))
        return _Holder(nothing, nothing, next_sample=_LONG * self.geometry.ring)

    def _start_of(self, name: Hashable) -> int:
        return self.holders[name].start.tokens if name in self.holders else 0

    def _bound(self, one: _Holder, num_tokens: int) -> int:
        # Reports do not say how full open pages are, so that their bound may be above that of the beginning.
        num_tokens = max(num_tokens, one.scheduled)
        return min(self.geometry.bound(one.start, num_tokens), self.geometry.bound(one.latest, num_tokens))

    def _expected(self, one: _Holder, prompt: int, chunk: int) -> int:
        """Vouchers for a prompt whose last chunk tokens are in flight."""
        start, decided = one.start.tokens, max(one.start.tokens, prompt - chunk)
        pages = ceil(self.kept * self.geometry.growth(start, decided)) + self.geometry.growth(decided, prompt)
        return self.geometry.vouchers(min(one.start.pages[0] + pages, self._bound(one, prompt)))

    def _learn(self, one: _Holder) -> None:
        """At each doubling of a long request, that of a prefix apart, whose own pages are not all that it has."""
        tokens, pages = one.latest.tokens, one.latest.pages[0]
        if one.start.tokens == 0 and one.next_sample and tokens >= one.next_sample:
            one.next_sample = 2 * tokens
            self.kept += _RATE * (min(1.0, pages / self.geometry.growth(0, tokens)) - self.kept)

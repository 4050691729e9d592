"""A server in plain Python: a scheduler that asks a ledger, and ranks that count their pages one by one."""

from collections import deque
from dataclasses import dataclass, field
from random import Random

from dms_vllm.vouchers import Geometry, Ledger, Report


@dataclass
class Sequence:
    """What a rank has of a request, or of a cached prefix."""

    name: str
    life: int
    tables: list[list[int]]
    """Pages of each list, oldest first; list c of line i is number i * K + c."""
    entries: list[list[int]]
    """Positions of the entries in them, those that are gone included."""
    fates: list[bytes]
    """Of each line's tokens: 0 stays for good, j leaves after the j-th window."""
    tokens: int = 0
    forks: int = 0
    own: int = 0
    """Pages that it has vouchers for."""


class Rank:
    """Page tables as `dms.cache.store` has them, over a pool of num_pages pages. limit: pages that a sequence may own."""

    def __init__(self, geometry: Geometry, num_pages: int, limit=lambda sequence: None):
        self.geometry, self.num_pages, self.limit = geometry, num_pages, limit
        self.sequences: dict[str, Sequence] = {}
        self.references: dict[int, int] = {}
        self.owners: dict[int, Sequence] = {}
        self.num_taken = self.peak = 0

    @property
    def used(self) -> int:
        return len(self.references)

    def take(self, owner: Sequence) -> int:
        self.num_taken += 1
        self.references[self.num_taken] = 1
        self.owners[self.num_taken] = owner
        owner.own += 1
        self.peak = max(self.peak, self.used)
        assert self.used <= self.num_pages, f"{self.used} pages of {self.num_pages}"
        return self.num_taken

    def check(self, sequence: Sequence) -> None:
        limit = self.limit(sequence)
        assert limit is None or sequence.own <= limit, f"{sequence.name} owns {sequence.own} pages and has vouchers for {limit}"

    def release(self, sequence: Sequence, page: int) -> None:
        self.references[page] -= 1
        if self.owners[page] is sequence:
            sequence.own -= 1
            assert self.references[page] == 0, "whoever others share pages with outlives them"
        if self.references[page] == 0:
            del self.references[page], self.owners[page]

    def begin(self, name: str, life: int, fates: list[bytes], prefix: str | None = None) -> None:
        """A request, from nothing or with what a prefix has."""
        if prefix is None:
            lists = range(self.geometry.lines * len(self.geometry.windows))
            self.sequences[name] = Sequence(name, life, [[] for _ in lists], [[] for _ in lists], fates)
            return
        source = self.sequences[prefix]
        new = Sequence(name, life, [list(x) for x in source.tables], [list(x) for x in source.entries], fates, source.tokens)
        self.sequences[name] = new
        for table in new.tables:
            for page in table:
                self.references[page] += 1
        self.copy_open_pages(new)

    def fork(self, name: str, prefix: str) -> None:
        """A prefix of what a request has, to which its full pages go over."""
        self.begin(prefix, 0, self.sequences[name].fates, prefix=name)
        source, new = self.sequences[name], self.sequences[prefix]
        for page in {page for table in new.tables for page in table if self.owners[page] is source}:
            self.owners[page] = new
            source.own, new.own = source.own - 1, new.own + 1
        source.forks += 1
        self.check(source), self.check(new)

    def copy_open_pages(self, sequence: Sequence) -> None:
        for table, entries in zip(sequence.tables, sequence.entries, strict=True):
            if len(entries) % self.geometry.page_size:
                self.references[table[-1]] -= 1
                table[-1] = self.take(sequence)

    def end(self, name: str) -> None:
        sequence = self.sequences.pop(name)
        for table in sequence.tables:
            for page in table:
                self.release(sequence, page)
        assert sequence.own == 0

    def push(self, sequence: Sequence, line: int, tokens: int, num_new: int) -> None:
        """Store num_new tokens of a line that has tokens: give back what is gone, then append what leaves the ring."""
        ring, windows, P = self.geometry.ring, self.geometry.windows, self.geometry.page_size
        newest, lists = tokens + num_new - 1, range(line * len(windows), (line + 1) * len(windows))
        for c, number in enumerate(lists):
            entries = sequence.entries[number]
            while c > 0 and entries and newest - entries[min(P, len(entries)) - 1] > windows[c]:
                self.release(sequence, sequence.tables[number].pop(0))
                del entries[:P]
        fates = sequence.fates[line]
        for position in range(max(0, tokens - ring), max(0, tokens + num_new - ring)):
            c = max(0, fates[position] - 1)
            if fates[position] != 1 and (c == 0 or newest - position <= windows[c]):
                entries = sequence.entries[lists[c]]
                if len(entries) % P == 0:
                    sequence.tables[lists[c]].append(self.take(sequence))
                entries.append(position)
        self.check(sequence)

    def report(self, sequence: Sequence) -> Report:
        return Report(sequence.tokens, tuple(self._pages_at(sequence, horizon) for horizon in self.geometry.horizons))

    def _pages_at(self, sequence: Sequence, horizon: int) -> int:
        K, P, ring = len(self.geometry.windows), self.geometry.page_size, self.geometry.ring
        begin, end = max(0, sequence.tokens - ring), min(sequence.tokens, max(0, sequence.tokens + horizon - ring))
        pages = sequence.own
        for number, entries in enumerate(sequence.entries):
            line, c = divmod(number, K)
            comes = sequence.fates[line].count(c + 1 if c else 0, begin, end)
            pages += -(-(len(entries) + comes) // P) - -(-len(entries) // P)
        return pages


@dataclass
class Request:
    name: str
    prompt: int
    stop: int
    """Tokens at which it ends, which is known when it has them."""
    longest: int
    family: int
    """Requests of a family have the same first tokens."""
    shared: int
    """How many."""
    fates: list[list[bytes]]
    """Of each rank."""
    computed: int = 0
    known: int = 0
    life: int = 0
    may_share: bool = True


@dataclass
class Step:
    events: list[tuple]
    tokens: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Of each request: its life, tokens before, new tokens."""
    reports: dict[str, Report] | None = None


class Server:
    """Schedules as vLLM does: those that run first, in order; where vouchers run out the last one is preempted; then those that wait."""

    def __init__(self, ledger: Ledger, num_vouchers: int, ranks: int, random: Random, **options):
        self.ledger, self.geometry, self.num_vouchers, self.random = ledger, ledger.geometry, num_vouchers, random
        self.free = num_vouchers
        self.budget, self.chunk, self.max_requests = options["budget"], options["chunk"], options["max_requests"]
        self.delay, self.early = options["delay"], options["early"]
        self.fork_share, self.report_share = options["fork_share"], options["report_share"]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefixes: dict[str, tuple[int, int]] = {}
        """Family and tokens, the one used longest ago first."""
        self.lives: dict[str, tuple[int, int]] = {}
        """Of what holds vouchers: its life, and how often it was forked."""
        self.events: list[tuple] = []
        self.flying: deque[Step] = deque()
        num_pages = num_vouchers * self.geometry.pages_per_voucher
        self.ranks = [Rank(self.geometry, num_pages, self._limit) for _ in range(ranks)]
        self.preemptions = self.hits = self.finished = self.most_vouchers = self.most_running = self.steps = self.num_prefixes = 0

    def _limit(self, sequence: Sequence) -> int | None:
        """None where the scheduler has ended or forked the sequence meanwhile."""
        same = self.lives.get(sequence.name) == (sequence.life, sequence.forks)
        return self.ledger.held(sequence.name) * self.geometry.pages_per_voucher if same else None

    # Vouchers.

    def give(self, count: int) -> None:
        self.free += count
        assert self.free + self.ledger.num_held == self.num_vouchers, "vouchers are lost, or there twice"

    def take(self, count: int) -> None:
        assert count <= self.free, f"{count} vouchers of {self.free}"
        self.give(-count)
        self.most_vouchers = max(self.most_vouchers, self.num_vouchers - self.free)

    def drop_prefix(self) -> bool:
        for name in self.prefixes:
            if self.ledger.holders[name].users == 0:
                del self.prefixes[name], self.lives[name]
                self.give(self.ledger.free(name))
                self.events.append(("end", name))
                return True
        return False

    def leave(self, request: Request) -> None:
        self.give(self.ledger.free(request.name))
        if self.lives.pop(request.name, None) is not None:
            self.events.append(("end", request.name))
        request.computed, request.life = 0, request.life + 1

    # A step.

    def schedule(self) -> Step:
        step, budget, preempted, place = Step(self.events), self.budget, False, 0
        while place < len(self.running) and budget > 0:
            one = self.running[place]
            place += 1
            num_new = min(one.known - one.computed, budget, self.chunk)
            if num_new == 0:
                continue
            self.maybe_fork(one)
            while self.ledger.needed(one.name, one.computed + num_new) > self.free:
                if self.drop_prefix():
                    continue
                last = self.running.pop()
                self.leave(last)
                self.waiting.appendleft(last)
                last.may_share, preempted = False, True
                self.preemptions += 1
                if last is one:
                    break
            else:
                budget -= self.grant(step, one, num_new)
        while self.waiting and not preempted and budget > 0 and len(self.running) < self.max_requests:
            num_new = self.admitted(self.waiting[0], budget)
            if num_new == 0:
                break
            self.running.append(self.waiting.popleft())
            budget -= self.grant(step, self.running[-1], num_new)
        self.most_running = max(self.most_running, len(self.running))
        self.events = []
        return step

    def admitted(self, one: Request, budget: int) -> int:
        """New tokens with which the first one that waits begins, 0 where it waits on."""
        prefix = self.match(one)
        start = 0 if prefix is None else self.ledger.begin(one.name, prefix)
        num_new = min(one.known - start, budget, self.chunk)
        while self.ledger.admission(one.name, one.known, num_new) > self.free and self.drop_prefix():
            pass
        if self.ledger.admission(one.name, one.known, num_new) > self.free:
            self.give(self.ledger.free(one.name))
            if prefix is None or self.running:
                return 0
            # What it would share may be what is in the way.
            one.may_share = False
            return self.admitted(one, budget)
        one.computed, self.lives[one.name] = start, (one.life, 0)
        self.hits += prefix is not None
        self.events.append(("begin", one, one.life, prefix))
        return num_new

    def grant(self, step: Step, one: Request, num_new: int) -> int:
        self.take(self.ledger.schedule(one.name, one.computed + num_new, one.known))
        step.tokens[one.name] = one.life, one.computed, num_new
        one.computed += num_new
        if one.computed == one.known < one.longest:
            one.known += 1
        return num_new

    def match(self, one: Request) -> str | None:
        longest = min(one.shared, one.known - 1) if one.may_share else 0
        found = [(tokens, name) for name, (family, tokens) in self.prefixes.items() if family == one.family and tokens <= longest]
        if not found:
            return None
        name = max(found)[1]
        self.prefixes[name] = self.prefixes.pop(name)
        return name

    def maybe_fork(self, one: Request) -> None:
        key = one.family, one.computed
        if not one.may_share or one.computed > one.shared or key in self.prefixes.values():
            return
        if self.free >= self.ledger.fork_vouchers and self.random.random() < self.fork_share:
            self.num_prefixes += 1
            name = f"prefix {self.num_prefixes}"
            self.take(self.ledger.fork(one.name, name))
            life, forks = self.lives[one.name]
            self.prefixes[name], self.lives[name], self.lives[one.name] = key, (0, 0), (life, forks + 1)
            self.events.append(("fork", one.name, name))

    def run(self, step: Step) -> None:
        """The ranks' work, layer by layer."""
        said = {name for name in step.tokens if self.random.random() < self.report_share}
        step.reports = {}
        for number, rank in enumerate(self.ranks):
            for kind, *what in step.events:
                if kind == "begin":
                    one, life, prefix = what
                    rank.begin(one.name, life, one.fates[number], prefix)
                else:
                    getattr(rank, kind)(*what)
            for line in range(self.geometry.lines):
                for name, (_, before, num_new) in step.tokens.items():
                    sequence = rank.sequences[name]
                    assert sequence.tokens == before
                    cut = self.random.randint(0, num_new)
                    for start, end in ((0, cut), (cut, num_new)):
                        if end > start:
                            rank.push(sequence, line, before + start, end - start)
            for name, (_, before, num_new) in step.tokens.items():
                rank.sequences[name].tokens = before + num_new
            said_here = {name: rank.sequences[name] for name in said}
            said_here |= {what[1]: rank.sequences[what[1]] for kind, *what in step.events if kind == "fork" and what[1] in rank.sequences}
            for name, sequence in said_here.items():
                report = rank.report(sequence)
                step.reports[name] = report if number == 0 else step.reports[name].merge(report)

    def update(self, step: Step) -> None:
        for name, report in step.reports.items():
            self.give(self.ledger.report(name, report))
        for one in list(self.running):
            life, before, num_new = step.tokens.get(one.name, (-1, 0, 0))
            if life == one.life and before + num_new >= one.stop:
                self.running.remove(one)
                self.leave(one)
                self.finished += 1

    def abort(self) -> None:
        one = self.random.choice([*self.running, *self.waiting])
        (self.running if one in self.running else self.waiting).remove(one)
        self.leave(one)

    def serve(self, requests: list[tuple[int, Request]], abort_share: float) -> int:
        """requests: with the step in which they come. Returns how many were aborted."""
        aborted, limit = 0, 100 + sum(when + 2 * one.longest for when, one in requests) * (1 + len(requests))
        coming = deque(sorted(requests, key=lambda pair: pair[0]))
        while coming or self.waiting or self.running or self.flying:
            self.steps += 1
            assert self.steps < limit, "requests do not end"
            while coming and coming[0][0] <= self.steps:
                self.waiting.append(coming.popleft()[1])
            if self.random.random() < abort_share and (self.running or self.waiting):
                self.abort()
                aborted += 1
            self.flying.append(self.schedule())
            if self.early:
                self.run(self.flying[-1])
            while len(self.flying) > (self.delay if self.running else 0):
                step = self.flying.popleft()
                if not self.early:
                    self.run(step)
                self.update(step)
        while self.drop_prefix():
            pass
        self.run(Step(self.events))
        assert self.free == self.num_vouchers and not self.ledger.holders and not self.prefixes
        assert all(rank.used == 0 and not rank.sequences for rank in self.ranks), "pages are lost"
        return aborted


def make_fates(random: Random, length: int, lines: int, windows: int) -> list[bytes]:
    """Gates of any kind: those that keep all, evict all, change with the text or from token to token."""
    out = []
    for _ in range(lines):
        fates = bytearray()
        while len(fates) < length:
            kind, run = random.randrange(4), random.randint(1, length)
            weights = [random.random() ** 3 for _ in range(windows + 1)] if kind else [0.0] * (windows + 1)
            weights[random.randrange(windows + 1) if kind else 0] += 1e-3
            fates += bytes(random.choices(range(windows + 1), weights, k=min(run, length - len(fates))))
        out.append(bytes(fates))
    return out


def make_server(seed: int, geometry_class=Geometry, ledger_class=Ledger) -> tuple[Server, list[tuple[int, Request]], float]:
    """A random server, its requests with the steps in which they come, and how often one is aborted."""
    random = Random(seed)
    windows = tuple(sorted(random.sample(range(60), random.randint(1, 4))))
    windows = tuple(sorted({random.randint(0, 12), *windows[1:]}))
    geometry = geometry_class(
        lines=random.choice([1, 1, 2, 3, 4, 8]),
        windows=windows,
        page_size=random.choice([4, 4, 8, 16, 32]),
        pages_per_voucher=random.choice([1, 1, 2, 3, 7]),
    )
    ranks, scale = random.choice([1, 1, 2, 3]), random.choice([20, 60, 120])
    families = [[make_fates(random, 2 * scale, geometry.lines, len(windows)) for _ in range(ranks)] for _ in range(2)]
    requests = []
    for number in range(random.randint(2, 12)):
        prompt, more, family = random.randint(1, scale), random.randint(1, 30), random.randrange(2)
        shared = random.choice([0, prompt, random.randint(0, prompt)])
        longest = prompt + more
        fates = [
            [
                first[:shared] + rest[shared:]
                for first, rest in zip(base, make_fates(random, longest, geometry.lines, len(windows)), strict=True)
            ]
            for base in families[family]
        ]
        stop = random.randint(prompt + 1, longest)
        request = Request(f"request {number}", prompt, stop, longest, family, shared, fates, known=prompt)
        requests.append((random.choice([0, random.randint(0, 40)]), request))
    least = geometry.of_longest(max(one.longest for _, one in requests))
    server = Server(
        ledger_class(geometry, kept=random.choice([1.0, 0.1])),
        max(least, round(least * random.choice([1.0, 1.0, 1.5, 3.0]))),
        ranks,
        random,
        budget=random.choice([1, 7, 32, 200]),
        chunk=random.choice([5, 16, 200]),
        max_requests=random.choice([1, 3, 16]),
        delay=random.choice([0, 1]),
        early=random.random() < 0.5,
        fork_share=random.choice([0.0, 0.0, 0.5, 1.0]),
        report_share=random.choice([1.0, 1.0, 0.5, 0.0]),
    )
    return server, requests, random.choice([0.0, 0.0, 0.03])

"""The worker's rows, prompts and prefixes against each request read alone at once, under vouchers, in a pool that cannot grow."""

import os
import random
from dataclasses import dataclass, field

import pytest
import torch

from dms.cache.fused_store import FusedStore, make_store
from dms.cache.layer import CompactedLayer
from dms.cache.page_pool import CacheFull
from dms.config import DMSConfig
from dms.masks import Tokens
from dms_kernels.quantization import KV_DTYPES, dequantize, fake_quantize
from dms_vllm.pool import FixedPool, page_bytes
from dms_vllm.vouchers import Geometry, Ledger
from dms_vllm.worker import Part, Worker

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 16
OPTIONS = {"scale": 0.3, "softcap": None, "sink_logits": None}


@dataclass
class Request:
    """Random keys, values, queries and decisions of all tokens that it will have, and what attention makes of them when they are read alone."""

    name: str
    prompt: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    evicts: torch.Tensor
    expected: torch.Tensor
    done: int = 0
    life: int = 0
    forks: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.q.shape[1]

    @property
    def in_worker(self) -> str:
        return f"{self.name}#{self.life}"


def make_request(rng: random.Random, name: str, config: DMSConfig, like: Request | None, most: int) -> Request:
    """like: another, whose first tokens it shares."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    prompt = rng.randint(1, most - 1)
    total = min(most, prompt + rng.randint(1, 12))
    shape = (LAYERS, total)
    q = torch.randn(*shape, HEADS * GROUP, DIM, generator=generator)
    k, v = (torch.randn(*shape, HEADS, DIM, generator=generator) for _ in range(2))
    windows = (len(config.windows),) if len(config.windows) > 1 else ()
    share = torch.rand(LAYERS, 1, HEADS, *[1] * len(windows), generator=generator)
    evicts = torch.rand(*shape, HEADS, *windows, generator=generator) < share
    if like is not None:
        shared = min(like.prompt, prompt)
        for own, others in ((q, like.q), (k, like.k), (v, like.v), (evicts, like.evicts)):
            own[:, :shared] = others[:, :shared]
    expected = torch.stack([read_alone(config, *tensors) for tensors in zip(q, k, v, evicts, strict=True)])
    return Request(name, prompt, q, k, v, evicts, expected)


def read_alone(config: DMSConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, evicts: torch.Tensor) -> torch.Tensor:
    layer, position = CompactedLayer(config, 16), torch.arange(len(q), dtype=torch.int32)[None]
    layer.decide(evicts[None], Tokens(torch.ones_like(position), position))
    layer.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    return layer.attend(q.transpose(0, 1)[None], **OPTIONS)[0]


class Server:
    """A scheduler as vLLM's, of a few lines: requests take turns, the last one is preempted where vouchers run out."""

    def __init__(self, rng: random.Random, loops: bool, late: bool = False):
        self.rng = rng
        windows = sorted(rng.sample(range(1, 40), rng.randint(1, 3)))
        alignment = rng.choice(["own", "next"]) if len(windows) == 1 else "own"
        self.config = DMSConfig(window=windows[0] if len(windows) == 1 else windows, sinks=rng.choice([0, 0, 3]), alignment=alignment)
        self.longest = rng.choice([40, 90, 140])
        self.geometry = Geometry(lines=LAYERS * HEADS, windows=self.config.windows, page_size=16, pages_per_voucher=rng.choice([1, 2, 4]))
        self.num_vouchers = int(self.geometry.of_longest(self.longest) * rng.choice([1.0, 1.0, 1.15, 1.5, 2.5])) + 1
        num_pages = self.num_vouchers * self.geometry.pages_per_voucher
        raw = torch.zeros(num_pages * page_bytes(16, DIM, torch.float32, None, self.config.windows) + 1024, dtype=torch.int8)
        # Memory for a few pages too many would hide a fault.
        spare = (3 * 64 + page_bytes(1, DIM, torch.float32, None, self.config.windows)) - 1024
        raw = raw[: len(raw) + spare]
        pool = FixedPool(raw, 16, DIM, torch.float32, kv_dtype=None, windows=self.config.windows)
        assert pool.num_pages == num_pages
        self.ledger = Ledger(self.geometry)
        self.worker = Worker([self.config] * LAYERS, LAYERS, pool, self.geometry.horizons, loops=loops, late=late)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.prefixes: dict[str, tuple[Request, int]] = {}
        self.num_preempted = self.num_forked = 0
        self.worst = 0.0

    @property
    def free(self) -> int:
        return self.num_vouchers - self.ledger.num_held

    def drop_prefix(self) -> bool:
        unused = [key for key in self.prefixes if self.ledger.holders[key].users == 0]
        if not unused:
            return False
        del self.prefixes[unused[0]]
        self.ledger.free(unused[0])
        self.worker.drop_fork(unused[0])
        return True

    def make_room(self, vouchers: int) -> bool:
        while self.free < vouchers:
            if not self.drop_prefix():
                return False
        return True

    def leave(self, request: Request) -> None:
        self.running.remove(request)
        self.ledger.free(request.name)
        self.worker.end([request.in_worker])
        request.life += 1

    def schedule(self) -> list[tuple[Request, int]]:
        """Requests and how many tokens each gets in the step."""
        budget, chosen = self.rng.randint(1, 60), []
        for request in list(self.running):
            if request not in self.running or budget == 0:
                continue
            n = min(budget, self.left(request))
            while not self.make_room(self.ledger.needed(request.name, request.done + n)):
                last = self.running[-1]
                chosen = [(one, m) for one, m in chosen if one is not last]
                self.preempt(last)
                if last is request:
                    break
            else:
                budget -= self.take(request, n, chosen)
        while self.waiting and budget and len(self.running) < 6:
            request = self.waiting[0]
            begun_from = self.begin_from_prefix(request)
            n = min(budget, self.left(request))
            if not self.make_room(
                max(self.ledger.admission(request.name, request.prompt), self.ledger.needed(request.name, request.done + n))
            ):
                self.ledger.free(request.name)
                request.done = 0
                break
            self.waiting.pop(0)
            self.running.append(request)
            self.worker.begin(request.in_worker, begun_from)
            budget -= self.take(request, n, chosen)
        return chosen

    def left(self, request: Request) -> int:
        return request.prompt - request.done if request.done < request.prompt else 1

    def preempt(self, request: Request) -> None:
        self.leave(request)
        request.done = 0
        self.waiting.insert(0, request)
        self.num_preempted += 1

    def begin_from_prefix(self, request: Request) -> str | None:
        for key, (source, length) in self.prefixes.items():
            same = min(source.prompt, request.prompt)
            fits = self.ledger.finishes(self.ledger.of_prefixes(key), length, self.longest, self.num_vouchers)
            # Prefixes that this step makes are for requests that begin after it, as in the scheduler.
            is_made = key in self.worker.forks
            if is_made and fits and length < min(same + 1, request.prompt) and torch.equal(source.k[:, :length], request.k[:, :length]):
                request.done = self.ledger.begin(request.name, key)
                assert request.done == length
                return key
        return None

    def take(self, request: Request, n: int, chosen: list[tuple[Request, int]]) -> int:
        end = request.done + n
        if request.done < request.prompt and n > 2 and self.rng.random() < 0.4:
            at = self.rng.randint(request.done + 1, end)
            after = max(self.ledger.fork_vouchers, self.geometry.vouchers(self.geometry.open_pages + self.geometry.growth(at, end)))
            one, needed = self.ledger.holders.get(request.name), self.ledger.needed(request.name, at)
            of_prefix = needed if one is None else self.ledger.of_prefixes(one.prefix) + one.held + needed
            if self.free >= needed + after and self.ledger.finishes(of_prefix, at, self.longest, self.num_vouchers):
                key = f"prefix {self.num_forked}"
                self.num_forked += 1
                self.ledger.schedule(request.name, at)
                self.ledger.fork(request.name, key)
                self.worker.keep_fork(request.in_worker, at, key)
                self.prefixes[key] = (request, at)
        self.ledger.schedule(request.name, end, request.prompt)
        chosen.append((request, n))
        return n

    def step(self) -> None:
        chosen = self.schedule()
        if not chosen:
            return
        self.rng.shuffle(chosen)
        parts, begin = [], 0
        for request, n in chosen:
            parts.append(Part(request.in_worker, begin, begin + n, request.done))
            begin += n
        step = self.worker.plan(parts)
        # Layers with a sliding window run among those with gates, and come after them elsewhere.
        for layer in self.rng.sample(range(LAYERS), LAYERS):

            def of_step(name: str, layer: int = layer) -> torch.Tensor:
                return torch.cat([getattr(one, name)[layer, one.done : one.done + n] for one, n in chosen])

            out = self.worker.attend(layer, step, *map(of_step, ("q", "k", "v", "evicts")), **OPTIONS)
            assert len(out) == begin
            self.compare(out, of_step("expected"))
        for request, n in chosen:
            request.done += n
        # A late report may be of a life that has ended.
        names = {one.in_worker: one.name for one in self.running} | {key: key for key in self.prefixes}
        for name, report in self.worker.report(step).items():
            if name in names:
                self.ledger.report(names[name], report)
        used = self.worker.pool.num_pages - int(self.worker.pool.num_free)
        assert used <= self.ledger.num_held * self.geometry.pages_per_voucher
        self.worst = max(self.worst, used / self.worker.pool.num_pages)
        for request in [one for one, _ in chosen if one.done == one.total]:
            if self.rng.random() < 0.3:
                key = f"prefix {self.num_forked}"
                self.num_forked += 1
                self.running.remove(request)
                self.ledger.keep(request.name, key)
                self.worker.become_fork(request.in_worker, key)
                self.prefixes[key] = (request, request.total)
            else:
                self.leave(request)
        if self.running and self.rng.random() < 0.03:
            # Aborted.
            self.leave(self.rng.choice(self.running))

    def compare(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def run(seed: int, loops: bool, late: bool = False) -> Server:
    rng = random.Random(seed)
    server = Server(rng, loops, late=late)
    requests: list[Request] = []
    for number in range(rng.randint(2, 7)):
        like = rng.choice([None, *requests])
        requests.append(make_request(rng, f"r{number}", server.config, like, server.longest))
    arrivals = list(requests)
    for _ in range(2000):
        if arrivals and rng.random() < 0.5:
            server.waiting.append(arrivals.pop(0))
        server.step()
        if not (arrivals or server.waiting or server.running):
            break
    else:
        raise AssertionError("requests starve")
    while server.prefixes:
        assert server.drop_prefix(), "of prefixes that nobody uses any goes"
    server.worker.end([])
    assert server.worker.pool.num_used == 0 and server.ledger.num_held == 0
    return server


@pytest.mark.parametrize(("loops", "late"), [(False, False), (False, True), (True, False)])
def test_requests_come_out_as_read_alone(loops, late):
    servers = [run(seed, loops, late) for seed in range(int(os.environ.get("DMS_CASES", 10)))]
    print(
        f"{len(servers)} schedules: {sum(s.num_preempted for s in servers)} preemptions, {sum(s.num_forked for s in servers)} prefixes, "
        f"at most {max(s.worst for s in servers):.3f} of a pool used"
    )
    assert sum(s.num_forked for s in servers) > 0 and (len(servers) < 20 or sum(s.num_preempted for s in servers) > 0)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here, for a GPU")
def test_requests_come_out_as_read_alone_on_kernels(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    servers = [run(seed, loops=False) for seed in range(int(os.environ.get("DMS_CASES", 3)))]
    assert all(isinstance(make_store(server.config, server.worker.pool, 1, 1), FusedStore) for server in servers)
    assert max(server.worst for server in servers) > 0


def test_a_pool_that_is_empty_says_so():
    pool = FixedPool(torch.zeros(9000, dtype=torch.int8), 16, 16, torch.float32, kv_dtype=None, windows=(4,))
    with pytest.raises(
        CacheFull, match=f"of the pool's {pool.num_pages} pages {pool.num_pages} are free, and {pool.num_pages + 1} are needed"
    ):
        pool.take(torch.ones(pool.num_pages + 1, dtype=torch.bool))


def test_a_request_that_goes_on_elsewhere_is_an_error():
    rng = random.Random(0)
    server = Server(rng, loops=False)
    request = make_request(rng, "a", server.config, None, server.longest)
    server.worker.begin("a#0")
    with pytest.raises(RuntimeError, match="goes on at token 3, and its cache holds 0"):
        server.worker.plan([Part("a#0", 0, 1, 3)])
    with pytest.raises(RuntimeError, match="has not begun"):
        server.worker.plan([Part("b#0", 0, 1, 0)])
    with pytest.raises(RuntimeError, match="has begun already"):
        server.worker.begin("a#0")
    assert request.total > 0


def test_memory_for_no_page_is_refused():
    with pytest.raises(ValueError, match="hold no page of 16 entries of 16"):
        FixedPool(torch.zeros(100, dtype=torch.int8), 16, 16, torch.float32, kv_dtype=None, windows=(4,))


@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES])
@pytest.mark.parametrize("windows", [(4,), (4, 9)])
def test_a_page_takes_what_the_pool_says(kv_dtype, windows):
    """Of memory for so many pages there are as many, and entries written to the first and the last are read back."""
    torch.manual_seed(0)
    bytes_each = page_bytes(16, 32, torch.bfloat16, kv_dtype, windows)
    pool = FixedPool(torch.zeros(7 * bytes_each + 512, dtype=torch.int8), 16, 32, torch.bfloat16, kv_dtype=kv_dtype, windows=windows)
    # Beside these a pool counts a page's references and its place on the free list.
    assert pool.num_pages == 7 and pool.page_bytes == bytes_each + 8
    row, kv = torch.tensor([0, pool.scratch - 17]), torch.randn(4, 32, dtype=torch.bfloat16)
    pool.write(torch.cat([row, row + 16]), kv)
    stored = pool.stored(torch.stack([row, row + 16]))
    read = stored.numbers if stored.scales is None else dequantize(stored.numbers, stored.scales, 0)
    for found, x, is_key in zip(read, kv.chunk(2), (True, False), strict=True):
        assert torch.equal(found.to(x.dtype), x if kv_dtype is None else fake_quantize(x, KV_DTYPES[kv_dtype], is_key))

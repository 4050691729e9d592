"""A worker's side: the layers' entries of all requests, in pages of the one pool, and attention over them.

Each request has a slot, a row of every layer's state, from its beginning to its end. All that decode do so in one launch, in their slots. One
that reads its prompt is taken out of its slot meanwhile, a request at a time. `loops` takes every request by itself, which is the reference that
the others are held to.

Shapes: N tokens of all requests of a step, one request after another; Hq query heads, H KV heads, D head dim; K windows.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dms.cache.fused_store import FusedStore, make_store
from dms.cache.layer import CompactedLayer
from dms.cache.page_pool import HostCopy, used_places
from dms.cache.pending import EVICT, list_of
from dms.cache.store import Store
from dms.config import DMSConfig
from dms.masks import Tokens
from dms_vllm.pool import FixedPool
from dms_vllm.vouchers import Report

# Slots that there are room for at first.
_FIRST_SLOTS = 8


@dataclass(frozen=True)
class Part:
    """A request's tokens in a step."""

    request: str
    begin: int
    """Its first token among all of the step."""
    end: int
    position: int
    """Of the first one within the request."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a request that is read by itself, and the key of the fork to keep when they are stored; None: no fork."""

    request: str
    begin: int
    end: int
    tokens: Tokens
    fork: str | None = None


@dataclass(frozen=True)
class Rows:
    """The step of the requests that decode."""

    requests: list[str]
    slot: torch.Tensor
    """[R] int32"""
    at: torch.Tensor
    """[R] int64: of each one's token its place among the step's."""
    tokens: Tokens
    """[R, 1]"""


@dataclass(frozen=True)
class Step:
    """What a pass of the model is over; the same for all layers."""

    num_tokens: int
    pieces: list[Piece]
    rows: Rows | None
    """None: no request decodes."""


class PoolLayer(CompactedLayer):
    """A layer of the compacted cache whose pages are in the one pool."""

    def __init__(self, config: DMSConfig, pool: FixedPool):
        super().__init__(config, pool.page_size, kv_dtype=pool.kv_dtype)
        self.pool = pool

    def make_store(self, batch: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Store:
        self._store = make_store(self.dms, self.pool, batch, num_heads)
        self.dtype, self.device, self.is_initialized = dtype, device, True
        return self._store

    def with_store(self, store: Store) -> "PoolLayer":
        """A layer of the same kind around a store."""
        layer = PoolLayer(self.dms, self.pool)
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, self.is_initialized
        layer._store, layer.columns = store, store.longest
        return layer


class Worker:
    """The requests of a worker process, and what its layers hold of them.

    Args:
        configs: of each layer, how its decisions are meant; `sliding` makes that of one without a gate.
        num_gated: how many of the layers, the first, have gates; the others have a sliding window, and nothing in pages.
        horizons: of which numbers of tokens to come the reports are.
        loops: keep every request by itself while it decodes, too.
        late: a step's report is what the step before left, whose numbers have come to the host meanwhile; None: where the device is no CPU.
    """

    def __init__(
        self,
        configs: list[DMSConfig],
        num_gated: int,
        pool: FixedPool,
        horizons: tuple[int, ...],
        *,
        loops: bool = False,
        late: bool | None = None,
    ):
        self.configs, self.num_gated, self.pool, self.horizons, self.loops = configs, num_gated, pool, horizons, loops
        self.layers = [PoolLayer(config, pool) for config in configs]
        """Of which each row is a slot."""
        self.num_slots = 0
        self.free_slots: list[int] = []
        self.slots: dict[str, int] = {}
        """Of the requests that run."""
        self.num_tokens: dict[str, int] = {}
        """Of requests, and of forks."""
        self.forks: dict[str, list[PoolLayer]] = {}
        """Prefixes that are kept for requests to come, by key."""
        self.partial_forks: dict[str, dict[int, PoolLayer]] = {}
        """Forks of which not all layers have run yet, by number of the layer."""
        self.parents: dict[str, str] = {}
        """The fork that a request or a fork began from, or that was last made of it, which the shared pages count as."""
        self.new_forks: list[str] = []
        """Of which no report was made."""
        self.forks_to_keep: dict[str, dict[int, str]] = {}
        """Of each request, the keys of the forks to keep once it has so many tokens."""
        self.fork_pages: dict[str, list[torch.Tensor]] = {}
        """Of forks that others began from: the numbers of each layer's pages."""
        self.late = not pool.reads_are_free if late is None else late
        self.counted: _Counted | None = None
        """What the next report is of, where reports are late."""
        self.peak_pages = 0
        self.peak_requests = 0

    # What the scheduler says, before a step.

    def begin(self, request: str, fork: str | None = None) -> None:
        """A request begins, from a prefix that is kept or from nothing."""
        if request in self.slots:
            raise RuntimeError(f"request {request} begins, and has begun already; please report this, with vLLM's version")
        if not self.free_slots:
            self._add_slots()
        slot = self.slots[request] = heapq.heappop(self.free_slots)
        self.num_tokens[request] = 0
        if fork is not None:
            for layer, kept in zip(self.layers, self.forks[fork], strict=True):
                layer.store.put_rows(self._rows([slot]), kept.store.copy())
            self.parents[request], self.num_tokens[request] = fork, self.num_tokens[fork]

    def _add_slots(self) -> None:
        """An eighth more: what is there is copied."""
        more = max(_FIRST_SLOTS, self.num_slots // 8)
        for layer in self.layers:
            if not layer.is_empty:
                layer.store.add_rows(more)
        for slot in range(self.num_slots, self.num_slots + more):
            heapq.heappush(self.free_slots, slot)
        self.num_slots += more

    def _rows(self, slots: list[int]) -> torch.Tensor:
        return torch.tensor(slots, device=self.pool.rows.device)

    def end(self, requests: Iterable[str]) -> None:
        """Requests have ended, or were preempted and will begin anew: their pages are free from here on."""
        ended = [request for request in requests if request in self.slots]
        if ended:
            self._take([self._leave(request) for request in ended])
        for request in ended:
            self.parents.pop(request, None)
            del self.num_tokens[request]
        self.pool.collect()

    def _leave(self, request: str) -> int:
        """Free a request's slot, which is yet to be emptied."""
        slot = self.slots.pop(request)
        heapq.heappush(self.free_slots, slot)
        self.forks_to_keep.pop(request, None)
        return slot

    def _take(self, slots: list[int]) -> list[PoolLayer]:
        """What is in slots, which are empty then."""
        return [layer if layer.is_empty else layer.with_store(layer.store.take_rows(self._rows(slots))) for layer in self.layers]

    def keep_fork(self, request: str, num_tokens: int, key: str) -> None:
        """Keep the prefix of so many tokens of a request, as soon as it has them."""
        self.forks_to_keep.setdefault(request, {})[num_tokens] = key

    def become_fork(self, request: str, key: str) -> None:
        """A request has ended, and all that it has is a prefix from here on."""
        self.forks[key] = self._take([self._leave(request)])
        self.num_tokens[key] = self.num_tokens.pop(request)
        if request in self.parents:
            self.parents[key] = self.parents.pop(request)
        self.new_forks.append(key)

    def drop_fork(self, key: str) -> None:
        self.forks.pop(key, None)
        self.parents.pop(key, None)
        self.num_tokens.pop(key, None)
        self.fork_pages.pop(key, None)
        self.pool.collect()

    # A step.

    def plan(self, parts: list[Part]) -> Step:
        """Who reads a step's tokens in what way."""
        for part in parts:
            self._check(part)
        decodes: list[Part] = []
        pieces: list[Piece] = []
        for part in parts:
            is_step = part.end - part.begin == 1 and part.position > 0 and part.request not in self.forks_to_keep and not self.loops
            if is_step:
                decodes.append(part)
            else:
                pieces += self._pieces(part)
            self.num_tokens[part.request] += part.end - part.begin
        rows = None
        if decodes:
            device, names = self.pool.rows.device, [part.request for part in decodes]
            numbers = torch.tensor([[self.slots[part.request], part.begin, part.position] for part in decodes]).to(device)
            slot, at, position = numbers.int()[:, 0].contiguous(), numbers[:, 1], numbers.int()[:, 2:]
            rows = Rows(names, slot, at, Tokens(torch.ones_like(position), position))
        return Step(sum(part.end - part.begin for part in parts), pieces, rows)

    def _check(self, part: Part) -> None:
        """Raises RuntimeError where a request goes on at another token than it was left at."""
        if part.request not in self.slots:
            raise RuntimeError(f"request {part.request} has not begun; please report this, with vLLM's version")
        held = self.num_tokens[part.request]
        if held != part.position:
            raise RuntimeError(
                f"request {part.request} goes on at token {part.position}, and its cache holds {held}; please report this, with vLLM's version"
            )

    def _pieces(self, part: Part) -> Iterable[Piece]:
        """The part's tokens, divided where forks are kept."""
        keep, device = self.forks_to_keep.get(part.request, {}), self.pool.rows.device
        last = part.position + part.end - part.begin
        begin = part.position
        for end in sorted({*(n for n in keep if begin < n < last), last}):
            position = torch.arange(begin, end, dtype=torch.int32, device=device)[None]
            first = part.begin + begin - part.position
            fork = keep.pop(end, None)
            if fork is not None:
                self.num_tokens[fork] = end
            yield Piece(part.request, first, first + end - begin, Tokens(torch.ones_like(position), position), fork)
            begin = end
        if not keep:
            self.forks_to_keep.pop(part.request, None)

    @torch.no_grad()
    def attend(
        self,
        layer: int,
        step: Step,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        evicts: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of a layer, by its number among `configs`, after which it holds the step's tokens.

        q [N, Hq, D], k and v [N, H, D], evicts [N, H] bool, with K > 1 windows [N, H, K]; N may be larger than the step's number of tokens,
        whose outputs are 0 then -> [N, Hq, D].
        """
        out = torch.zeros_like(q)
        options: dict = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        layer_of_slots = self.layers[layer]
        if layer_of_slots.is_empty:
            layer_of_slots.make_store(self.num_slots, k.shape[1], k.shape[2], v.dtype, v.device)
        slots = layer_of_slots.store
        for piece in step.pieces:
            row, part = self._rows([self.slots[piece.request]]), slice(piece.begin, piece.end)
            held = layer_of_slots.with_store(slots.take_rows(row))
            q_1, k_1, v_1 = (x[part].transpose(0, 1)[None] for x in (q, k, v))
            out[part] = _read(held, piece.tokens, q_1, k_1, v_1, evicts[part][None], options)[0]
            if piece.fork is not None:
                self._keep(piece.request, piece.fork, layer, held.copy())
            slots.put_rows(row, held.store)
        if (rows := step.rows) is not None:
            q_R, k_R, v_R, evicts_R = (x[rows.at] for x in (q, k, v, evicts))
            if isinstance(slots, FusedStore):
                out[rows.at] = slots.step_in_rows(rows.slot, k_R, v_R, evicts_R, q_R, **options)
            else:
                held = layer_of_slots.with_store(slots.take_rows(rows.slot.long()))
                answer = _read(held, rows.tokens, q_R[:, :, None], k_R[:, :, None], v_R[:, :, None], evicts_R[:, None], options)
                out[rows.at] = answer[:, 0]
                slots.put_rows(rows.slot.long(), held.store)
        return out

    def _keep(self, request: str, key: str, layer: int, copy: PoolLayer) -> None:
        # Layers run in the model's order, and here those with gates come first.
        layers = self.partial_forks.setdefault(key, {})
        layers[layer] = copy
        if len(layers) == len(self.configs):
            del self.partial_forks[key]
            self.forks[key] = [layers[number] for number in range(len(layers))]
            if request in self.parents:
                self.parents[key] = self.parents[request]
            self.parents[request] = key
            self.new_forks.append(key)

    # What the scheduler is told, after a step.

    def report(self, step: Step) -> dict[str, Report]:
        """Of each request of a step, and each fork made in it, what it holds: of this step, or where reports are late of the one before."""
        names = list(dict.fromkeys([*(piece.request for piece in step.pieces), *([] if step.rows is None else step.rows.requests)]))
        new, self.new_forks = [key for key in self.new_forks if key in self.forks], []
        parts = [self._count_pages([key], self.forks[key], [0]) for key in new]
        if names:
            parts.insert(0, self._count_pages(names, self.layers, [self.slots[name] for name in names]))
        names += new
        numbers = torch.cat([*(part.flatten() for part in parts), self.pool.num_free[None]])
        counted = _Counted(names, [self.num_tokens[name] for name in names], HostCopy(numbers))
        self.peak_requests = max(self.peak_requests, len(self.slots))
        told, self.counted = (self.counted, counted) if self.late else (counted, None)
        if told is None:
            return {}
        *pages, num_free = told.numbers.numbers()
        self.peak_pages = max(self.peak_pages, self.pool.num_pages - num_free)
        width = len(self.horizons)
        each = zip(told.names, told.num_tokens, (tuple(pages[i : i + width]) for i in range(0, len(pages), width)), strict=True)
        return {name: Report(num_tokens, of_horizons) for name, num_tokens, of_horizons in each}

    def held(self) -> dict[str, int]:
        """entries: those alive of the requests that run, over the KV heads of layers with gates; seen: what these would be had nothing been
        evicted; bytes: of pages in use, those of prefixes too, and of the requests' rings, sliding windows among them."""
        entries = seen = rings = 0
        for number, store in ((n, layer.store) for n, layer in enumerate(self.layers) if not layer.is_empty):
            if number < self.num_gated:
                entries += int(store.entries_alive().sum())
                seen += int(store.seq_len.sum()) * store.num_heads
            rings += (store.ring_kv.nbytes + store.ring_state.nbytes) // self.num_slots * len(self.slots)
        pages = self.pool.num_used * self.pool.page_size * self.pool.entry_bytes
        return {"entries": entries, "seen": seen, "bytes": pages + rings}

    def _count_pages(self, names: list[str], layers: list[PoolLayer], slots: list[int]) -> torch.Tensor:
        """[names, horizons] int64: pages of what is in the slots of layers, whose names these are."""
        layers, rows = layers[: self.num_gated], self._rows(slots)
        pages = sum(torch.stack([pages_in(layer.store, rows, tokens) for tokens in self.horizons], 1) for layer in layers)
        assert isinstance(pages, torch.Tensor), "there are layers"
        for place, (name, slot) in enumerate(zip(names, slots, strict=True)):
            if name in self.parents:
                shared = self._pages_of_fork(self.parents[name])
                pages[place] -= sum(shared_pages(layer.store, slot, numbers) for layer, numbers in zip(layers, shared, strict=True))
        return pages

    def _pages_of_fork(self, key: str) -> list[torch.Tensor]:
        if key not in self.fork_pages:
            self.fork_pages[key] = [layer.store.page_numbers() for layer in self.forks[key][: self.num_gated]]
        return self.fork_pages[key]


@dataclass(frozen=True)
class _Counted:
    """What a step left."""

    names: list[str]
    num_tokens: list[int]
    numbers: HostCopy
    """Pages by name and horizon, then the pool's free ones."""


def _read(
    held: PoolLayer, tokens: Tokens, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, evicts: torch.Tensor, options: dict
) -> torch.Tensor:
    """Tokens [B, T] of rows, which are stored: q [B, Hq, T, D], k and v [B, H, T, D], evicts [B, T, H] or [B, T, H, K] -> [B, T, Hq, D]."""
    held.decide(evicts, tokens)
    held.update(k, v)
    return held.attend(q, **options)


def shared_pages(store: Store, row: int, numbers: torch.Tensor) -> torch.Tensor:
    """How many of a row's pages are among these numbers."""
    table = store.page_table[row : row + 1]
    used = used_places(table, store.num_kept[row : row + 1], store.pool.page_size)
    return (torch.isin(table, numbers) & used).sum()


def sliding(num_visible: int, num_windows: int) -> DMSConfig:
    """Of a layer in which a token sees itself and those before it, num_visible in all: one whose gate evicts everything. It needs as many
    windows as the others have, since all have pages of one kind."""
    windows = tuple(num_visible - 1 + more for more in range(num_windows))
    return DMSConfig(window=windows[0] if num_windows == 1 else windows)


def pages_in(store: Store, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Pages of the rows [R] once so many more tokens have come, as far as the ring decides, and if no page was given back."""
    P, counts, state = store.pool.page_size, store.num_kept[rows], store.ring_state[rows]
    if num_tokens:
        slot = torch.arange(state.shape[2], dtype=torch.int32, device=store.device)
        end = store.seq_len[rows, None] - 1
        # Negative where there is nothing yet.
        position = end - (end - slot) % store.ring_size
        leaves = (position >= 0) & (position <= end + num_tokens - store.ring_size)
        goes_on = leaves[:, None] & (state != EVICT)
        if store.lists_per_head == 1:
            counts = counts + goes_on.sum(2)
        else:
            each = torch.arange(store.lists_per_head, device=store.device)[:, None]
            counts = counts + ((list_of(state)[:, :, None] == each) & goes_on[:, :, None]).sum(3).flatten(1)
    return (-(-counts // P)).sum(1)

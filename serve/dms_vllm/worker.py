"""A worker's side: the layers' entries of all requests, in pages of the one pool, and attention over them.

Requests that decode are rows of one cache layer; one that reads its prompt has a cache layer of its own, and joins them with its first
token. `loops` keeps every request by itself, which is the reference that the rows are held to.

Shapes: N tokens of all requests of a step, one request after another; Hq query heads, H KV heads, D head dim; K windows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dms.cache.fused_store import make_store
from dms.cache.layer import CompactedLayer
from dms.cache.page_pool import used_places
from dms.cache.pending import EVICT, list_of
from dms.cache.store import Store
from dms.config import DMSConfig
from dms.masks import Tokens
from dms_vllm.pool import FixedPool
from dms_vllm.vouchers import Report


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

    at: torch.Tensor
    """[B] int64: of each row's token its place among the step's; 0 where it has none."""
    present: torch.Tensor
    """[R] int64: which rows have a token."""
    to: torch.Tensor
    """[R] int64: its place among the step's."""
    tokens: Tokens
    """Of the rows, [B, 1]."""


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
        super().__init__(config, pool.page_size, kv_dtype=None if pool.row_scales is None else "int8")
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
    """

    def __init__(self, configs: list[DMSConfig], num_gated: int, pool: FixedPool, horizons: tuple[int, ...], *, loops: bool = False):
        self.configs, self.num_gated, self.pool, self.horizons, self.loops = configs, num_gated, pool, horizons, loops
        self.alone: dict[str, list[PoolLayer]] = {}
        """The layers of requests that are read by themselves."""
        self.decoding: list[str] = []
        """The requests that are rows, in order."""
        self.row_layers: list[PoolLayer] = []
        """The layers whose rows they are."""
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
        self.peak_pages = 0
        self.peak_requests = 0

    # What the scheduler says, before a step.

    def begin(self, request: str, fork: str | None = None) -> None:
        """A request begins, from a prefix that is kept or from nothing."""
        if request in self.alone or request in self.decoding:
            raise RuntimeError(f"request {request} begins, and has begun already; please report this, with vLLM's version")
        if fork is None:
            self.alone[request] = [PoolLayer(config, self.pool) for config in self.configs]
        else:
            self.alone[request] = [layer.copy() for layer in self.forks[fork]]
            self.parents[request] = fork

    def end(self, requests: Iterable[str]) -> None:
        """Requests have ended, or were preempted and will begin anew: their pages are free from here on."""
        ended = set(requests)
        for request in ended:
            self.alone.pop(request, None)
            self.forks_to_keep.pop(request, None)
            self.parents.pop(request, None)
        rows = [row for row, request in enumerate(self.decoding) if request in ended]
        if rows:
            self._part_with(rows)
        self.pool.collect()

    def keep_fork(self, request: str, num_tokens: int, key: str) -> None:
        """Keep the prefix of so many tokens of a request, as soon as it has them."""
        self.forks_to_keep.setdefault(request, {})[num_tokens] = key

    def become_fork(self, request: str, key: str) -> None:
        """A request has ended, and all that it has is a prefix from here on."""
        if request in self.decoding:
            self.alone[request] = self._part_with([self.decoding.index(request)])
        self.forks[key] = self.alone.pop(request)
        self.forks_to_keep.pop(request, None)
        if request in self.parents:
            self.parents[key] = self.parents.pop(request)
        self.new_forks.append(key)

    def drop_fork(self, key: str) -> None:
        self.forks.pop(key, None)
        self.parents.pop(key, None)
        self.pool.collect()

    # A step.

    def plan(self, parts: list[Part]) -> Step:
        """Put the requests of a step where its tokens are read."""
        for part in parts:
            self._check(part)
        device = self.pool.rows.device
        decodes = {part.request: part for part in parts if not self.loops and part.end - part.begin == 1 and part.position > 0}
        if leaving := [
            row for row, request in enumerate(self.decoding) if any(p.request == request for p in parts) and request not in decodes
        ]:
            names = [self.decoding[row] for row in leaving]
            for name, layers in zip(names, self._split(self._part_with(leaving)), strict=True):
                self.alone[name] = layers
        for request in decodes:
            if request in self.alone and request not in self.forks_to_keep:
                self._join(request)
        pieces = [piece for part in parts if part.request in self.alone for piece in self._pieces(part)]
        rows = None
        if any(request in decodes for request in self.decoding):
            real = torch.tensor([request in decodes for request in self.decoding], device=device)
            present = real.nonzero()[:, 0]
            at = torch.tensor([decodes[request].begin if request in decodes else 0 for request in self.decoding], device=device)
            position = torch.tensor([decodes[request].position if request in decodes else 0 for request in self.decoding], device=device)
            rows = Rows(at, present, at[present], Tokens(real.int()[:, None], position.int()[:, None]))
        return Step(sum(part.end - part.begin for part in parts), pieces, rows)

    def _check(self, part: Part) -> None:
        """Raises RuntimeError where a request goes on at another token than the cache does."""
        if part.request in self.alone:
            layer = self.alone[part.request][0]
            held = 0 if layer.is_empty else int(layer.store.seq_len[0])
        elif part.request in self.decoding:
            held = int(self.row_layers[0].store.seq_len[self.decoding.index(part.request)])
        else:
            raise RuntimeError(f"request {part.request} has not begun; please report this, with vLLM's version")
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
            yield Piece(part.request, first, first + end - begin, Tokens(torch.ones_like(position), position), keep.pop(end, None))
            begin = end
        if not keep:
            self.forks_to_keep.pop(part.request, None)

    def _join(self, request: str) -> None:
        """Make a request a row of those that decode."""
        layers = self.alone.pop(request)
        if not self.decoding:
            self.row_layers = layers
        else:
            for layer, joining in zip(self.row_layers, layers, strict=True):
                layer.store.take_over(joining.store)
        self.decoding.append(request)

    def _part_with(self, rows: list[int]) -> list[PoolLayer]:
        """Take rows out; the layers of those."""
        index = torch.tensor(rows, device=self.pool.rows.device)
        parted = [layer.with_store(layer.store.part_with(index)) for layer in self.row_layers]
        self.decoding = [request for row, request in enumerate(self.decoding) if row not in rows]
        if not self.decoding:
            self.row_layers = []
        return parted

    def _split(self, layers: list[PoolLayer]) -> list[list[PoolLayer]]:
        """One row each of layers with several."""
        first = torch.zeros(1, dtype=torch.long, device=self.pool.rows.device)
        split = []
        while len(layers[0].store.seq_len):
            split.append([layer.with_store(layer.store.part_with(first)) for layer in layers])
        return split

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
        for piece in step.pieces:
            held, part = self.alone[piece.request][layer], slice(piece.begin, piece.end)
            held.decide(evicts[part][None], piece.tokens)
            held.update(k[part].transpose(0, 1)[None], v[part].transpose(0, 1)[None])
            out[part] = held.attend(q[part].transpose(0, 1)[None], **options)[0]
            if piece.fork is not None:
                self._keep(piece.request, piece.fork, layer, held.copy())
        if step.rows is not None:
            held, rows = self.row_layers[layer], step.rows
            held.decide(evicts[rows.at][:, None], rows.tokens)
            held.update(k[rows.at][:, :, None], v[rows.at][:, :, None])
            answer = held.attend(q[rows.at][:, :, None], **options)[:, 0]
            out[rows.to] = answer[rows.present]
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
        """Of each request of a step, and each fork made in it, what it holds."""
        reports = {piece.request: self._reports([piece.request], self.alone[piece.request])[0] for piece in step.pieces}
        if step.rows is not None:
            by_row = self._reports(self.decoding, self.row_layers)
            reports |= {self.decoding[row]: by_row[row] for row in step.rows.present.tolist()}
        new, self.new_forks = self.new_forks, []
        reports |= {key: self._reports([key], self.forks[key])[0] for key in new if key in self.forks}
        self.peak_pages = max(self.peak_pages, self.pool.num_pages - int(self.pool.num_free))
        self.peak_requests = max(self.peak_requests, len(self.alone) + len(self.decoding))
        return reports

    def held(self) -> dict[str, int]:
        """entries: those alive of the requests that run, over the KV heads of layers with gates; seen: what these would be had nothing been
        evicted; bytes: of pages in use, those of prefixes too, and of the requests' rings, sliding windows among them."""
        entries = seen = rings = 0
        requests = [*self.alone.values(), *([self.row_layers] if self.row_layers else [])]
        for number, layer in ((n, layer) for layers in requests for n, layer in enumerate(layers) if not layer.is_empty):
            store = layer.store
            if number < self.num_gated:
                entries += int(store.entries_alive().sum())
                seen += int(store.seq_len.sum()) * store.num_heads
            rings += store.ring_kv.nbytes + store.ring_state.nbytes
        pages = self.pool.num_used * self.pool.page_size * self.pool.entry_bytes
        return {"entries": entries, "seen": seen, "bytes": pages + rings}

    def _reports(self, names: list[str], layers: list[PoolLayer]) -> list[Report]:
        """Of the rows of layers, whose names these are."""
        layers = layers[: self.num_gated]
        pages = sum(torch.stack([pages_in(layer.store, tokens) for tokens in self.horizons], 1) for layer in layers)
        assert isinstance(pages, torch.Tensor), "there are layers"
        for row, name in enumerate(names):
            if name in self.parents:
                parents = self.forks[self.parents[name]][: self.num_gated]
                pages[row] -= sum(shared_pages(layer.store, row, parent.store) for layer, parent in zip(layers, parents, strict=True))
        tokens = layers[0].store.seq_len.tolist()
        return [Report(number, tuple(row)) for number, row in zip(tokens, pages.tolist(), strict=True)]


def shared_pages(store: Store, row: int, parent: Store) -> int:
    """Pages of a row that another store has too."""
    used = used_places(store.page_table[row : row + 1], store.num_kept[row : row + 1], store.pool.page_size)
    return int(torch.isin(store.page_table[row : row + 1][used], parent.page_numbers()).sum())


def sliding(num_visible: int, num_windows: int) -> DMSConfig:
    """Of a layer in which a token sees itself and those before it, num_visible in all: one whose gate evicts everything. It needs as many
    windows as the others have, since all have pages of one kind."""
    windows = tuple(num_visible - 1 + more for more in range(num_windows))
    return DMSConfig(window=windows[0] if num_windows == 1 else windows)


def pages_in(store: Store, num_tokens: int) -> torch.Tensor:
    """Pages of each row [B] once so many more tokens have come, as far as the ring decides, and if no page was given back."""
    P, counts = store.pool.page_size, store.num_kept
    if num_tokens:
        slot = torch.arange(store.ring_state.shape[2], dtype=torch.int32, device=store.device)
        end = store.seq_len[:, None] - 1
        # Negative where there is nothing yet.
        position = end - (end - slot) % store.ring_size
        leaves = (position >= 0) & (position <= end + num_tokens - store.ring_size)
        goes_on = leaves[:, None] & (store.ring_state != EVICT)
        if store.lists_per_head == 1:
            counts = counts + goes_on.sum(2)
        else:
            each = torch.arange(store.lists_per_head, device=store.device)[:, None]
            counts = counts + ((list_of(store.ring_state)[:, :, None] == each) & goes_on[:, :, None]).sum(3).flatten(1)
    return (-(-counts // P)).sum(1)

"""The layers of both caches that evict, as transformers calls them: compacted, and masked, the reference that compacting is held to.

Shapes: B batch, H KV heads, S cached tokens, N new tokens, D head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from dms import masks
from dms.cache.fused_store import FusedStore, make_store
from dms.cache.host_pages import HostPagePool, PageBuffers
from dms.cache.page_pool import CacheBudget, PagePool, check_kv_dtype
from dms.cache.pending import PendingGate, PendingTokens
from dms.cache.store import Store
from dms.config import DMSConfig
from dms.masks import Tokens
from dms_kernels.arguments import Keys, PagedKV
from dms_kernels.cached_attention import cached_attention

WITHOUT_DECISIONS = (
    "this cache belongs to evict mode, and tokens came to it without decisions; "
    'call dms.set_mode(model, "evict"), or give dense mode a cache of its own'
)

AnyLayer = TypeVar("AnyLayer", bound="CompactedLayer")


class Reading(NamedTuple):
    """What a pass's queries are answered by, those of a layer itself and of layers that follow it."""

    attend: Callable[..., torch.Tensor]
    """Queries [B, Hq, N, D] and options -> [B, N, Hq, D]."""
    unstored: PendingTokens | None
    """What is stored, or waits on trial, when all have come; None: it is stored already."""


def _attend_by(position: torch.Tensor | None, pages: Callable[[], PagedKV | None], recent: list[Keys]) -> Callable[..., torch.Tensor]:
    """position [B, N] of the newest tokens; None: all keys are visible. pages: asked for each time, since they may have moved."""

    def attend(query: torch.Tensor, **options: Any) -> torch.Tensor:
        return cached_attention(query, None if position is None else position[:, -query.shape[2] :], pages(), recent, **options)

    return attend


class CompactedLayer(CacheLayerMixin):
    """A layer whose evicted entries are freed.

    A forward pass brings the gates' decisions (`decide`), keys and values (`update`), and queries (`attend`), which read what is
    stored and the new tokens; then it stores those (`end_reading`). After `activate_past_recording` new tokens wait on trial until `crop` has said
    how many of them stay.

    Args:
        page_size: entries of a page, 16, 32 or 64.
        budget: None: no bound.
        kv_dtype: "int8", "fp8" or "int4" for what is in pages; None: the model's own dtype.
        reserved: tokens that rows will have, and the share of them that is kept, for which there is room from the first token on; None: the cache
            grows as they come.
        buffers: of each device, where pages are while they are read, and shared by the layers of a cache; pages rest in host memory. None: they
            are on the device.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        config: DMSConfig,
        page_size: int = 64,
        budget: CacheBudget | None = None,
        kv_dtype: str | None = None,
        reserved: tuple[int, float] | None = None,
        buffers: dict[torch.device, PageBuffers] | None = None,
    ):
        super().__init__()
        if page_size not in (16, 32, 64):
            raise ValueError(f"page_size is {page_size!r}; a page holds 16, 32 or 64 entries")
        check_kv_dtype(kv_dtype)
        self.dms, self.page_size, self.budget, self.kv_dtype, self.reserved = config, page_size, budget, kv_dtype, reserved
        self.buffers = buffers
        self._store: Store | None = None
        self._decided: tuple[torch.Tensor | PendingGate, Tokens] | None = None
        """The newest tokens and their decisions, from `decide` until the tokens are stored."""
        self.pending: PendingTokens | None = None
        """The same with keys and values, from `update` on."""
        self._reading: Reading | None = None
        """From the pass's first query until `end_reading`."""
        self.trial: PendingTokens | None = None
        """Tokens that the next `crop` may take back."""
        self.columns = 0
        """Tokens stored, padding included, which is what `generate` counts."""
        self.record_past = False

    @property
    def is_empty(self) -> bool:
        """No token has come yet: there is no store."""
        return self._store is None

    @property
    def store(self) -> Store:
        """The entries. Raises RuntimeError while the layer is empty."""
        if self._store is None:
            raise RuntimeError("this cache layer is empty; what it stores begins with the first token")
        return self._store

    # Forward.

    def runs_gate(self, num_tokens: int) -> bool:
        """Whether `decide` may get a gate instead of its decision, for num_tokens new tokens a row."""
        return num_tokens == 1 and self.trial is None and not self.record_past and isinstance(self._store, FusedStore)

    def decide(self, decision_BNH: torch.Tensor | PendingGate, tokens: Tokens) -> None:
        """Take the newest tokens' decisions, made before their keys and values exist."""
        self._decided, self.pending, self._reading = (decision_BNH, tokens), None, None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, H, _, D = key_states.shape
        if value_states.shape[-1] != D:
            raise ValueError(
                f"keys have {D} dimensions and values {value_states.shape[-1]}, and a page holds both side by side; "
                "pass cache=dms.cache.masked_cache(model), which hides what is evicted and keeps it"
            )
        self.make_store(B, H, D, value_states.dtype, key_states.device)

    def make_store(self, batch: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Store:
        """Begin with no entries, in a pool of its own."""
        windows = self.dms.windows if len(self.dms.windows) > 1 else ()
        kind: Callable[..., PagePool] = PagePool
        if self.buffers is not None:
            kind = functools.partial(HostPagePool, buffers=self.buffers.setdefault(device, PageBuffers(device)))
        pool = kind(self.page_size, head_dim, dtype, device, self.budget, kv_dtype=self.kv_dtype, windows=windows)
        self._store = make_store(self.dms, pool, batch, num_heads)
        if self.reserved is not None:
            self._store.reserve_tokens(*self.reserved)
        self.dtype, self.device, self.is_initialized = dtype, device, True
        # Some models look for keys in every layer of a cache that is in use.
        self.keys = self.values = torch.empty(0, dtype=dtype, device=device)
        return self._store

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the newest tokens' keys and values [B, H, N, D]; they are stored once attention has read them."""
        if self._decided is None:
            raise ValueError(WITHOUT_DECISIONS)
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
        batch, num_heads = self.store.evicted.shape
        D = self.store.pool.head_dim
        if (*key_states.shape[:2], key_states.shape[-1]) != (batch, num_heads, D):
            raise ValueError(
                f"the cache holds {batch} sequences of {num_heads} heads of {D}, and keys came as {tuple(key_states.shape)}; "
                "use batch_repeat_interleave or batch_select_indices to change the batch, and each model's own cache"
            )
        # Under autocast, rotation leaves keys in float32 and values are narrower.
        k, v = (x.detach().to(self.dtype) for x in (key_states, value_states))
        decided, tokens = self._decided
        self.pending = PendingTokens(decided, tokens, k, v)
        return key_states, value_states

    def attend(
        self, query: torch.Tensor, *, scale: float, softcap: float | None, sink_logits: torch.Tensor | None, ends: bool = True
    ) -> torch.Tensor:
        """Queries [B, Hq, N', D] of the last N' of the newest tokens -> [B, N', Hq, D].

        ends: then the tokens are stored; else other layers' queries may come, and `end_reading` stores them.
        """
        if self._reading is None:
            self._reading = self._begin_reading()
        options: dict[str, Any] = {"window": self.dms.window, "scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        out = self._reading.attend(query, **options)
        if ends:
            self.end_reading()
        return out

    def _begin_reading(self) -> Reading:
        new, store = self.pending, self.store
        assert new is not None, "keys and values come before queries"
        if new.num_tokens == 1 and self.trial is None and not self.record_past:
            # Stored first, and read from the ring.
            if isinstance(store, FusedStore):
                self._push(new)
                return Reading(functools.partial(store.attend_newest, real_B=new.tokens.real[:, 0]), None)
            newest = store.longest if store.writes_one_slot(new) else None
            position = store.positions(new) if newest is None else None
            self._push(new)
            pages = functools.partial(store.pages, newest_only=True, newest=newest)
            return Reading(_attend_by(position, pages, [store.ring(newest_only=True)]), None)
        whole = new if self.trial is None else self.trial.cat(new)
        decisions, positions = store.decisions(whole), store.positions(whole)
        recent = [store.keys(whole.k, whole.v, positions, decisions.state)]
        if store.longest > 0:
            recent.insert(0, store.ring(decisions.last))
        if isinstance(store, FusedStore):
            return Reading(functools.partial(store.attend, position=positions, recent=recent, decisions=decisions, new=whole), whole)
        return Reading(_attend_by(positions, store.pages, recent), whole)

    def end_reading(self) -> None:
        """All queries of the newest tokens have come: store those."""
        self._store_read()
        if isinstance(self.store.pool, HostPagePool):
            self.store.pool.end_reading()

    def _store_read(self) -> None:
        reading, self._reading = self._reading, None
        new = self._take_pending()
        if reading is None:
            # Of rows that hold several documents, the last one goes on; the rows' queries were answered elsewhere.
            if self.get_seq_length() > 0 or self.record_past:
                raise ValueError("several documents in a row can be read into an empty cache alone, and not on trial; read them one by one")
            self._push(new.last_documents())
        elif reading.unstored is None:
            return
        elif self.record_past:
            self.trial = reading.unstored
        else:
            self._push(reading.unstored)
        self._check_budget()

    def extend(self, k: torch.Tensor, v: torch.Tensor, decision_BNH: torch.Tensor, tokens: Tokens) -> None:
        """Store tokens whose queries are answered elsewhere, or never."""
        self.decide(decision_BNH, tokens)
        self.update(k, v)
        self._push(self._take_pending())

    def _take_pending(self) -> PendingTokens:
        new, self.pending, self._decided = self.pending, None, None
        assert new is not None, "keys and values come before queries"
        return new

    def _push(self, new: PendingTokens) -> None:
        self.store.push(new)
        self.columns += new.num_tokens

    def _check_budget(self) -> None:
        if self.budget is not None:
            self.budget.check()

    def drop(self, dropped_BHS: torch.Tensor) -> None:
        """As `DMSCache.drop`."""
        expected = (0, 0, 0) if self.is_empty else (*self.store.num_kept.shape, int(self.store.num_kept.max()))
        if dropped_BHS.dtype != torch.bool or dropped_BHS.dim() != 3 or tuple(dropped_BHS.shape) != expected:
            raise ValueError(
                f"drop was given {dropped_BHS.dtype} {tuple(dropped_BHS.shape)}, and this layer takes torch.bool {expected}: "
                "[sequences, KV heads, most entries that a head has in pages]; with several windows the lists of each KV head stand for the head"
            )
        if expected[2]:
            self.store.drop(dropped_BHS.to(self.device))

    # Taking back.

    def activate_past_recording(self) -> None:
        self.record_past = True

    def stop_past_recording(self) -> None:
        """Keep what is on trial, and from now on everything at once."""
        self.crop(0)
        self.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, and keep the others that were on trial. Exact for tokens appended since the last crop.

        Raises:
            ValueError: more tokens than that: what was evicted since can't come back.
        """
        self.check_crop(tokens_to_remove)
        trial, self.trial = self.trial, None
        if trial is not None and trial.num_tokens > -tokens_to_remove:
            self._push(trial.first(trial.num_tokens + tokens_to_remove))

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError where `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): to take back tokens pass their number below 0, as crop({-tokens_to_remove})")
        on_trial = 0 if self.trial is None else self.trial.num_tokens
        if not self.is_empty and -tokens_to_remove > on_trial:
            raise ValueError(
                f"crop of {-tokens_to_remove} tokens: {on_trial} were appended since the last crop, and of those before it evicted entries can't "
                "come back; call activate_past_recording before tokens that may be taken back, or fork the cache there"
            )

    # How much there is.

    def get_seq_length(self) -> int:
        return self.columns + (0 if self.trial is None else self.trial.num_tokens)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def row_lengths(self) -> torch.Tensor:
        """[B] tokens of each row's document, padding not counted, trial tokens included."""
        stored = self.store.seq_len
        return stored if self.trial is None else stored + self.trial.tokens.real.sum(1, dtype=torch.int32)

    def entries_alive(self) -> torch.Tensor:
        """[B, H] int64, those of trial tokens included."""
        return self.store.entries_alive() + (self.row_lengths() - self.store.seq_len)[:, None]

    def own_tensors(self) -> list[torch.Tensor]:
        """All that this cache holds alone."""
        if self.is_empty:
            return []
        return [*self.store.tensors().values(), *([] if self.trial is None else self.trial.tensors().values())]

    def held_tensors(self) -> list[torch.Tensor]:
        """Own ones and the pool's."""
        return [] if self.is_empty else [*self.own_tensors(), *self.store.pool.tensors()]

    def own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.own_tensors())

    # Undoing a forward that failed.

    def snapshot(self) -> dict[str, Any]:
        return vars(self) | {"tensors": None if self.is_empty else self.store.snapshot()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        fields = dict(snapshot)
        tensors = fields.pop("tensors")
        vars(self).update(fields)
        self._decided = self.pending = self._reading = None
        if self._store is not None:
            self._store.restore(tensors)

    # Rows.

    def copy(self: AnyLayer) -> AnyLayer:
        """The same entries for another conversation: full pages shared, ring and last pages copied."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new._store = None if self.is_empty else self.store.copy()
        return new

    def reset(self) -> None:
        self._store = self._decided = self.pending = self._reading = self.trial = None
        self.keys = self.values = None
        self.columns, self.is_initialized, self.record_past = 0, False, False

    def _select(self, rows: torch.Tensor) -> None:
        if not self.is_empty:
            rows = rows.to(self.device).long()
            self.store.select(rows)
            self.trial = None if self.trial is None else self.trial.select(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.is_empty:
            self._select(torch.arange(self.store.num_kept.shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_empty:
            rows = torch.arange(self.store.num_kept.shape[0], device=self.device)
            self._select(rows[torch.as_tensor(indices, device=self.device)])
            self.store.pool.trim()

    def append_rows(self, other: "CompactedLayer", rows: torch.Tensor) -> None:
        """As `dms.cache.rows.append_rows`."""
        if self.is_empty or other.is_empty or self.trial is not None or other.trial is not None:
            raise ValueError(
                "sequences join a cache that holds some, from one that does, and neither with tokens on trial: crop(0) keeps those, and a fork "
                "takes the place of an empty cache"
            )
        self.store.append_rows(other.store, rows.to(self.device))
        self.columns = max(self.columns, other.columns)

    def offload(self) -> None:
        raise ValueError(
            "a compacted cache is not offloaded by transformers, which would move all of a layer each time; leave out cache_implementation, and set "
            "model.dms.offload_layers = True (or move idle caches with cache.offload_to)"
        )

    prefetch = offload


class DecidedTokens(NamedTuple):
    """Tokens of a masked cache, with the decisions [B, S, H] bool as their gates made them."""

    decision: torch.Tensor
    tokens: Tokens

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "DecidedTokens":
        return DecidedTokens(fn(self.decision), self.tokens.map(fn))

    def cat(self, other: "DecidedTokens") -> "DecidedTokens":
        return DecidedTokens(torch.cat([self.decision, other.decision], 1), self.tokens.cat(other.tokens))


class MaskedLayer(DynamicLayer):
    """A layer that keeps every entry and remembers what was decided; attention hides what is evicted."""

    def __init__(self, config: DMSConfig):
        super().__init__()
        self.dms = config
        self.decided: DecidedTokens | None = None

    @property
    def tokens(self) -> Tokens | None:
        """None while empty."""
        return None if self.decided is None else self.decided.tokens

    def decide(self, decision_BTH: torch.Tensor, tokens: Tokens) -> None:
        """Append the newest tokens' decisions; their keys and values follow through `update`.

        Raises:
            ValueError: keys and values came in between without decisions.
        """
        num_decided = 0 if self.decided is None else self.decided.decision.shape[1]
        if num_decided != self.get_seq_length():
            raise ValueError(
                f"the given cache holds {self.get_seq_length()} tokens and decisions for {num_decided}: "
                "it was used in another mode between; start evict mode with an empty cache"
            )
        new = DecidedTokens(decision_BTH, tokens)
        self.decided = new if self.decided is None else self.decided.cat(new)

    def evicted(self) -> torch.Tensor:
        """[B, S, H] bool, aligned to the tokens that the decisions are for."""
        assert self.decided is not None, "decisions come first"
        return masks.align(self.decided.decision, self.decided.tokens.segment_BT, self.dms.alignment, False)

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.decided is not None:
            self.decided = self.decided.map(fn)

    def reset(self) -> None:
        super().reset()
        self.decided = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._map(lambda x: x[:, : -abs(tokens_to_remove)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices, ...])

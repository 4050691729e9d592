"""One layer of the compacted cache, as transformers calls it.

A forward pass brings the gates' decisions (`decide`), keys and values (`update`), and queries (`attend`), which reads what is
stored and the new tokens, and stores those. After `activate_past_recording` new tokens wait on trial until `crop` has said how
many of them stay. Shapes: B batch, H KV heads, N new tokens, D head dim.
"""

import torch
from transformers.cache_utils import CacheLayerMixin

from dms.cache.budget import Budget
from dms.cache.fused_store import FusedStore, make_store
from dms.cache.page_pool import PagePool
from dms.cache.pending_tokens import Incoming, PendingGate
from dms.cache.store import EVICT, Store
from dms.config import DMSConfig
from dms.masks import Tokens
from dms_kernels.cached_attention import Keys, cached_attention

WITHOUT_DECISIONS = (
    "this cache belongs to evict mode, and tokens came to it without decisions; "
    'call dms.set_mode(model, "evict"), or give dense mode a cache of its own'
)


class CompactedLayer(CacheLayerMixin):
    """store: the entries, None while empty. trial: tokens that the next `crop` may take back. columns: tokens stored, padding
    included, which is what `generate` counts. budget: None: no bound."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: DMSConfig, page_size: int = 64, budget: Budget | None = None, kv_dtype: str | None = None):
        super().__init__()
        if page_size not in (16, 32, 64):
            raise ValueError(f"page_size is {page_size!r}; a page holds 16, 32 or 64 entries")
        if kv_dtype not in (None, "int8"):
            raise ValueError(f"kv_dtype is {kv_dtype!r}; pages hold the model's own dtype (None) or 'int8'")
        self.dms, self.page_size, self.budget, self.kv_dtype = config, page_size, budget, kv_dtype
        self.store: Store | None = None
        self.trial: Incoming | None = None
        self.incoming: Incoming | None = None
        self.columns = 0
        self.record_past = False

    # Forward.

    def runs_gate(self, num_tokens: int) -> bool:
        """Whether `decide` may get a gate instead of its decision, for so many new tokens a row."""
        return num_tokens == 1 and self.trial is None and not self.record_past and isinstance(self.store, FusedStore)

    def decide(self, decision_BNH: torch.Tensor | PendingGate, tokens: Tokens) -> None:
        """Take the newest tokens' gates, made before their keys and values exist."""
        if isinstance(decision_BNH, PendingGate):
            self.incoming = Incoming(None, tokens, gate=decision_BNH)
        else:
            self.incoming = Incoming(decision_BNH, tokens)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, H, _, D = key_states.shape
        if value_states.shape[-1] != D:
            raise ValueError(
                f"keys have {D} dimensions and values {value_states.shape[-1]}, and a page holds both side by side; "
                "pass past_key_values=dms.cache.masked.masked_cache(model), which hides what is evicted and keeps it"
            )
        self.store = self.make_store(B, H, D, value_states.dtype, key_states.device)
        self.dtype, self.device, self.is_initialized = value_states.dtype, key_states.device, True

    def make_store(self, batch: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Store:
        """An empty one, with a pool of its own."""
        pool = PagePool(self.page_size, head_dim, dtype, device, self.budget, quantized=self.kv_dtype == "int8")
        return make_store(self.dms, pool, batch, num_heads)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the newest tokens' keys and values [B, H, N, D]; they are stored once attention has read them."""
        if self.incoming is None:
            raise ValueError(WITHOUT_DECISIONS)
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        batch, num_heads = self.store.num_kept.shape
        D = self.store.pool.head_dim
        if (*key_states.shape[:2], key_states.shape[-1]) != (batch, num_heads, D):
            raise ValueError(
                f"the cache holds {batch} sequences of {num_heads} heads of {D}, and keys came as {tuple(key_states.shape)}; "
                "use batch_repeat_interleave or batch_select_indices to change the batch, and each model's own cache"
            )
        # Under autocast, rotation leaves keys in float32 and values are narrower.
        self.incoming.k, self.incoming.v = (x.detach().to(self.dtype) for x in (key_states, value_states))
        return key_states, value_states

    def attend(self, query: torch.Tensor, *, scale: float, softcap: float | None, sink_logits: torch.Tensor | None) -> torch.Tensor:
        """The newest tokens' queries [B, Hq, N, D] -> [B, N, Hq, D]; then the tokens are stored."""
        new, self.incoming = self.incoming, None
        store, num_queries = self.store, query.shape[2]
        options = {"window": self.dms.window, "scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        fused = isinstance(store, FusedStore)
        if num_queries == 1 and self.trial is None and not self.record_past:
            if fused:
                self._keep(new)
                return store.attend_newest(query, new.tokens.real[:, 0], **options)
            position = None if store.in_step(new) else store.positions(new)
            self._keep(new)
            return cached_attention(query, position, store.pages(), [store.ring(newest_only=True)], **options)
        whole = new if self.trial is None else self.trial.cat(new)
        decisions, position = store.decisions(whole), store.positions(whole)
        recent = [Keys(whole.k, whole.v, position, decisions.state == EVICT)]
        if store.longest > 0:
            recent.insert(0, store.ring(decisions.last))
        if fused:
            out = store.attend(query, position, recent, decisions, whole, **options)
        else:
            out = cached_attention(query, position[:, -num_queries:], store.pages(), recent, **options)
        if self.record_past:
            self.trial = whole
        else:
            self._keep(whole)
        if self.budget is not None:
            self.budget.check()
        return out

    def extend(self, k: torch.Tensor, v: torch.Tensor, decision_BNH: torch.Tensor, tokens: Tokens) -> None:
        """Store tokens whose queries are answered elsewhere, or never."""
        self.decide(decision_BNH, tokens)
        self.update(k, v)
        new, self.incoming = self.incoming, None
        self._keep(new)

    def keep_last_documents(self) -> None:
        """Store what goes on of rows that hold several documents; their queries are answered elsewhere."""
        if self.get_seq_length() > 0 or self.record_past:
            raise ValueError("several documents in a row can be read into an empty cache alone, and not on trial; read them one by one")
        new, self.incoming = self.incoming, None
        self._keep(new.last_documents())
        if self.budget is not None:
            self.budget.check()

    def _keep(self, new: Incoming) -> None:
        self.store.push(new)
        self.columns += new.k.shape[2]

    def drop(self, dropped_BHS: torch.Tensor) -> None:
        """As `DMSCache.drop`."""
        held = (0, 0, 0) if self.store is None else (*self.store.num_kept.shape, int(self.store.num_kept.max()))
        if dropped_BHS.dtype != torch.bool or dropped_BHS.dim() != 3 or tuple(dropped_BHS.shape) != held:
            raise ValueError(
                f"drop was given {dropped_BHS.dtype} {tuple(dropped_BHS.shape)}, and this layer takes torch.bool {held}: "
                "[sequences, KV heads, most entries that a head has kept]"
            )
        if held[2]:
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
        if trial is not None and trial.k.shape[2] > -tokens_to_remove:
            self._keep(trial.columns(slice(0, trial.k.shape[2] + tokens_to_remove)))

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError where `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): to take back tokens pass their number below 0, as crop({-tokens_to_remove})")
        on_trial = 0 if self.trial is None else self.trial.k.shape[2]
        if self.store is not None and -tokens_to_remove > on_trial:
            raise ValueError(
                f"crop of {-tokens_to_remove} tokens: {on_trial} were appended since the last crop, and of those before it evicted entries can't "
                "come back; call activate_past_recording before tokens that may be taken back, or fork the cache there"
            )

    # How much there is.

    def get_seq_length(self) -> int:
        return self.columns + (0 if self.trial is None else self.trial.k.shape[2])

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def seen(self) -> torch.Tensor | None:
        """Tokens of each row, padding not counted, [B]; None while empty."""
        if self.store is None or self.trial is None:
            return None if self.store is None else self.store.seq_len
        return self.store.seq_len + (self.trial.tokens.segment_BT > 0).sum(1, dtype=torch.int32)

    def entries_alive(self) -> torch.Tensor:
        """[B, H] int64, what is on trial included."""
        return self.store.entries_alive() + (self.seen() - self.store.seq_len)[:, None]

    def own_tensors(self) -> list[torch.Tensor]:
        """All that this cache holds alone."""
        trial = [] if self.trial is None else list(self.trial.tensors().values())
        return [*self.store.tensors().values(), *trial] if self.store is not None else []

    def held_tensors(self) -> list[torch.Tensor]:
        """Own ones and the pool's."""
        return [*self.own_tensors(), *(self.store.pool.tensors() if self.store is not None else ())]

    def own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.own_tensors())

    # Undoing a forward that failed.

    def snapshot(self) -> dict:
        return vars(self) | {"tensors": None if self.store is None else self.store.snapshot()}

    def restore(self, snapshot: dict) -> None:
        fields = dict(snapshot)
        tensors = fields.pop("tensors")
        vars(self).update(fields)
        self.incoming = None
        if self.store is not None:
            self.store.restore(tensors)

    # Rows.

    def copy(self) -> "CompactedLayer":
        """The same entries for another conversation: full pages shared, ring and last pages copied."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new.store = None if self.store is None else self.store.copy()
        return new

    def reset(self) -> None:
        self.store = self.trial = self.incoming = None
        self.columns, self.is_initialized, self.record_past = 0, False, False

    def _select(self, rows: torch.Tensor) -> None:
        if self.store is not None:
            rows = rows.to(self.device).long()
            self.store.select(rows)
            self.trial = None if self.trial is None else self.trial.map(lambda x: x.index_select(0, rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self._select(torch.arange(self.store.num_kept.shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.store is not None:
            rows = torch.arange(self.store.num_kept.shape[0], device=self.device)
            self._select(rows[torch.as_tensor(indices, device=self.device)])
            self.store.pool.trim()

    def offload(self) -> None:
        raise ValueError("a compacted cache is not offloaded: it is small, and attention reads all of it; leave out cache_implementation")

    prefetch = offload

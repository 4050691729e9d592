"""The KV caches of a retrofitted model: `DMSCache`, for everything that `generate` does, and the masked reference."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from dms import hf_compat
from dms.cache import serialization
from dms.cache.capture import CapturedStep, check_capture, expected_share
from dms.cache.fused_store import FusedStore
from dms.cache.host_pages import PageBuffers, growth_bytes
from dms.cache.layer import WITHOUT_DECISIONS, CompactedLayer, MaskedLayer
from dms.cache.offloading import Offloaded, placeholder
from dms.cache.page_pool import CacheBudget, CacheFull, PagePool, held_bytes, layer_bytes, outside_inference_mode
from dms.cache.rows import append_rows
from dms.cache.stats import CacheStats, bytes_to_return, cache_stats, compacted_layers
from dms.cache.store import Store
from dms.modes import DMSState, state_of
from dms.placement import compute_device


class DMSCache(Cache):
    """A cache whose evicted entries are freed and not read: each head has the last w + 1 tokens and the kept ones before them, with several
    windows also what goes by a later window, as long as that lasts.

    `model.generate` and forwards in evict mode make one by themselves; make one to keep it: `cache = DMSCache(model)`, then
    pass it as `cache` (before transformers 5.24: `past_key_values`). Layers without gates have transformers' own cache layers in it.

    Args:
        model: a retrofitted model.
        page_size: entries of a page, 16, 32 or 64; None: `model.dms.page_size`. Half a page is wasted per head.
        max_cache_bytes: bound for this cache and its forks together (None: `model.dms.max_cache_bytes`); a forward that
            would exceed it raises CacheFull and leaves the cache as it was.
        budget: one bound for several caches, in place of max_cache_bytes.
        kv_dtype: how what leaves the window is kept: "int8" or "fp8" in a byte a number, with a scale for each key and each value; "int4" in
            half a byte, with a scale and a least number for each 32. None: `model.dms.kv_dtype`, which is the model's own dtype unless it was set.
        reserve_tokens: tokens that each sequence will have at most, prompt included: ring, page tables and pages for them are there from the
            first token on, pages for as many as the gates were trained to keep and a quarter more. On a GPU decode steps are then captured as a CUDA graph
            and replayed. Longer sequences, and heads that keep more, are not refused: the cache grows as any other, and the next step is
            captured anew. None: nothing is reserved or captured.
        offload_layers: pages rest in host memory, and those of two layers at a time are on the device: of the one that is read, and of the next, which
            are copied meanwhile. None: `model.dms.offload_layers`, which is False unless it was set.
        state: the retrofitted model's, where `model` is only its decoder; None: `model.dms`.
    """

    def __init__(
        self,
        model,
        *,
        page_size: int | None = None,
        max_cache_bytes: int | None = None,
        kv_dtype: str | None = None,
        budget: CacheBudget | None = None,
        reserve_tokens: int | None = None,
        offload_layers: bool | None = None,
        state: DMSState | None = None,
    ):
        if budget is not None and max_cache_bytes is not None:
            raise ValueError(f"max_cache_bytes is {max_cache_bytes} and a budget was given, which has a bound of its own; give one of them")
        state = state or state_of(model)
        if not state.takes_cache:
            raise ValueError(
                f"{type(model).__name__} works with a cache of its own kind alone; give it no cache, and the one that it makes evicts"
            )
        self.budget = budget or CacheBudget(max_cache_bytes if max_cache_bytes is not None else state.max_cache_bytes)
        self.last_use = 0
        """By the budget's count."""
        self.is_offloaded = False
        """Whether `offload_to` has moved it, and nothing has brought it back."""
        self._offloaded_dense: dict[int, Offloaded] = {}
        """Of layers without gates, by index, while the cache is elsewhere."""
        self.budget.caches.add(self)
        self.reserve_tokens = reserve_tokens
        self.captured: CapturedStep | None = None
        """The latest decode step that was captured, where tokens are reserved."""
        self._buffers: dict[torch.device, PageBuffers] | None = None
        """Where pages are while they are read, if they rest in host memory."""
        if state.offload_layers if offload_layers is None else offload_layers:
            self._buffers = {}
        self._reserved = None if reserve_tokens is None else (reserve_tokens, expected_share(model, reserve_tokens))
        layers = DynamicCache(config=model.config).layers
        for index in (layer.index for layer in state.layers):
            # Assisted by its own first layers (assistant_early_exit), a model says that it has no others.
            if index < len(layers):
                layers[index] = self._make_layer(state, page_size, kv_dtype)
        super().__init__(layers=layers)
        self.state = weakref.ref(state)
        if reserve_tokens is not None:
            check_capture(self, state, type(model).__name__, offloads=self._buffers is not None)
        self._undo: list[dict[str, Any]] | None = None
        self._is_prepared = False
        """`prepare_step` was called, and the step has not come yet."""
        self.rotary_length: int | None = None
        """The length that keys were rotated for, where a model's rotary frequencies depend on it."""

    def _make_layer(self, state: DMSState, page_size: int | None, kv_dtype: str | None) -> CompactedLayer:
        budget = None if self.budget.max_bytes is None else self.budget
        page_size = state.page_size if page_size is None else page_size
        kv_dtype = state.kv_dtype if kv_dtype is None else kv_dtype
        return CompactedLayer(state.config, page_size, budget, kv_dtype, self._reserved, self._buffers)

    def compacted_layers(self) -> dict[int, CompactedLayer]:
        """The layers that evict and hold something, by index."""
        return compacted_layers(self)

    def _stores(self) -> list[Store]:
        return [layer.store for layer in self.compacted_layers().values()]

    def _layers_without_gates(self) -> list[Any]:
        """Of transformers' own kinds, each with methods of its own."""
        return [layer for layer in self.layers if not isinstance(layer, CompactedLayer)]

    def fork(self) -> "DMSCache":
        """A second conversation from here on: full pages are shared, ring and last pages copied. `copy.deepcopy` does the same."""
        self._begin_use()
        if self._is_bounded:
            stores = self._stores()
            own = layer_bytes(self._layers_without_gates()) + sum(store.own_bytes() for store in stores)
            self._make_room(own, [(store.pool, store.num_last_pages()) for store in stores])
        new = object.__new__(type(self))
        vars(new).update(vars(self), layers=[], _undo=None, _offloaded_dense={}, captured=None)
        for layer in self.layers:
            new.layers.append(layer.copy() if isinstance(layer, CompactedLayer) else copy.deepcopy(layer))
        self.budget.caches.add(new)
        return new

    def __deepcopy__(self, memo) -> "DMSCache":
        return self.fork()

    def report(self, warn: bool = True) -> CacheStats:
        """Entries, pages and bytes that the cache holds; warns where nothing was evicted or bytes exceed their bound."""
        return cache_stats(self, warn)

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file, to go on later or elsewhere; trial tokens are stored first.

        Raises:
            ValueError: an empty cache, one whose model is gone, or one with layers that keep something else than keys and values.
        """
        state = self.state()
        if state is None:
            raise ValueError("the model that made this cache is gone; save a cache while its model lives")
        if not self.compacted_layers():
            raise ValueError("the cache is empty; there is nothing to save")
        self._begin_use()
        serialization.write(serialization.describe(self.layers, state, self.rotary_length), Path(path))

    @classmethod
    @outside_inference_mode
    def load(cls, path: str | Path, model, **options) -> "DMSCache":
        """Read what `save` wrote; options as of the constructor.

        Raises:
            ValueError: a damaged file, the cache of another model, or a kv_dtype that is not the file's.
            CacheFull: max_cache_bytes is below what the cache holds.
        """
        path, state = Path(path), state_of(model)
        saved = serialization.read(path)
        saved.require_model(state, type(model).__name__, path)
        held = saved.settings.get("kv_dtype")
        options = {"page_size": saved.settings["page_size"], "kv_dtype": held} | options
        if (own := options["kv_dtype"] or state.kv_dtype) != held:
            raise ValueError(
                f"{path} holds entries of kv_dtype {held!r}, and this cache's is {own!r} (as given, else model.dms.kv_dtype); load it with the file's, or "
                "read the text again"
            )
        cache = cls(model, **options)
        gated = {layer.index: compute_device(layer.module) for layer in state.layers}
        elsewhere = compute_device(model)
        saved.fill(cache.layers, [gated.get(index, elsewhere) for index in range(len(cache.layers))])
        cache.rotary_length = saved.settings.get("rotary_length")
        cache.budget.check()
        return cache

    @property
    def is_trial(self) -> bool:
        """Whether new tokens wait until `crop` has said how many of them stay."""
        return any(layer.record_past or layer.trial is not None for layer in self.layers if isinstance(layer, CompactedLayer))

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 while empty."""
        return next((store.num_kept.shape[0] for store in self._stores()), -1)

    def reset(self) -> None:
        self._begin_use()
        self._undo = None
        super().reset()
        for layer in self.layers:
            hf_compat.empty_layer(layer)
        for buffers in (self._buffers or {}).values():
            if not buffers.pools:
                buffers.free()

    # Rows.

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(max(0, self.batch_size))[torch.as_tensor(indices).cpu()])
        for store in self._stores():
            store.pool.trim()

    def batch_append(self, other: "DMSCache", rows: torch.Tensor | None = None) -> None:
        """Put sequences of another cache of the same model behind this one's, whatever their lengths, as `dms.generate_batch` does.

        Full pages are then shared with the other cache, which keeps its sequences; its pages lie in this cache's pools from then on. Layers
        without gates are padded on the left: give later forwards an attention mask and position ids that say so.

        rows: [K] int64, which of the other's sequences; one may occur several times; None: all.

        Raises:
            ValueError: an empty cache, or one of another model, page size or dtype.
            CacheFull: the bound leaves no room for them.
        """
        if not isinstance(other, DMSCache) or other is self:
            raise ValueError(f"batch_append takes another DMSCache, and was given {'this one' if other is self else type(other).__name__}")
        rows = torch.arange(max(0, other.batch_size)) if rows is None else rows
        self._begin_use(other)
        # What was appended cannot be taken away by undoing the forward before.
        self._undo = other._undo = None
        with self._all_or_nothing():
            append_rows(self, other, rows)
            self.budget.check()

    def _select(self, rows: torch.Tensor) -> None:
        batch = self.batch_size
        if batch < 0:
            return
        self._begin_use()
        if self._is_bounded:
            own = layer_bytes(self._layers_without_gates()) + sum(layer.own_bytes() for layer in self.compacted_layers().values())
            num_more = len(rows) - batch
            self._make_room(-(-own * num_more // batch), [(store.pool, store.pages_to_select(rows)) for store in self._stores()])
        layers: list[Any] = list(self.layers)
        for layer in layers:
            # Layers of linear attention know no other change of rows.
            layer.reorder_cache(rows)

    def drop(self, layer: int, dropped_BHS: torch.Tensor) -> None:
        """Free entries of a layer that are in pages, for policies of your own.

        dropped [B, H, S] bool: which of each head's entries in pages, in order of age. Those are the kept entries that have left
        the window: S is the most that a head of the layer has, and what is beyond a head's own number is not read. With several
        windows [B, H * (number of windows), S]: of each head's lists, first of what stays for good, then of what goes by the second
        window, and so on. What forks share stays theirs.

        Raises:
            ValueError: a layer that does not evict, or another shape or dtype.
            CacheFull: pages that forks share would have to be copied, and the bound leaves no room for that.
        """
        layers = self.compacted_layers()
        if layer not in layers:
            raise ValueError(f"layer {layer} of this cache holds nothing that can be dropped; those that do are {sorted(layers)}")
        self._begin_use()
        with self._all_or_nothing():
            layers[layer].drop(dropped_BHS)
        # What was dropped cannot be brought back by undoing the forward before.
        self._undo = None

    # Taking back.

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest trial tokens, and keep the others; all layers or none."""
        for layer in self.layers:
            if isinstance(layer, CompactedLayer):
                layer.check_crop(tokens_to_remove)
        self._begin_use()
        with self._all_or_nothing():
            super().crop(tokens_to_remove)

    def stop_past_recording(self) -> None:
        """Keep the trial tokens; from now on nothing can be taken back."""
        self._begin_use()
        with self._all_or_nothing():
            layers: list[Any] = list(self.layers)
            for layer in layers:
                if isinstance(layer, CompactedLayer) or (getattr(layer, "record_past", False) and _is_filled(layer)):
                    layer.crop(0)
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    # Forward.

    def update(self, *args, **kwargs):
        return self._update_layer(super().update, *args, **kwargs)

    def update_conv_state(self, *args, **kwargs):
        return self._update_layer(super().update_conv_state, *args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs):
        return self._update_layer(super().update_recurrent_state, *args, **kwargs)

    def _update_layer(self, update, *args, **kwargs):
        """Give a layer new states; without room for them the forward is undone."""
        state = self.state()
        # A layer without gates would take them in any mode, and be ahead of the others.
        if state is not None and state.mode != "evict":
            raise ValueError(WITHOUT_DECISIONS)
        try:
            out = update(*args, **kwargs)
            if self._undo is not None:
                self.budget.check()
        except CacheFull:
            self.undo_forward()
            raise
        return out

    def before_forward(self, num_new: int) -> None:
        """Where the cache is bounded: make room for a step or refuse it, or remember how to undo a longer forward."""
        if self._is_prepared:
            return
        self._begin_use()
        self._undo = None
        if not self._is_bounded:
            return
        for store in self._stores():
            # What is given back stays as it is until the forward before can no longer be undone.
            store.release_gone()
        if num_new > 1 or any(getattr(layer, "record_past", False) or not _is_filled(layer) for layer in self.layers):
            self._undo = [_snapshot(layer) for layer in self.layers]
            return
        stores = self._stores()
        growth = sum(store.step_bytes() for store in stores) + sum(_step_bytes(layer) for layer in self._layers_without_gates())
        self._make_room(growth, [(store.pool, store.next_pages()) for store in stores])

    def prepare_step(self) -> None:
        """All that the host does before a decode step of one token a row, where kernels append."""
        self.before_forward(1)
        self._is_prepared = True
        for store in self._stores():
            assert isinstance(store, FusedStore), "kernels append"
            store.prepare_step()

    def end_step(self, replayed: bool) -> None:
        """After `prepare_step` and a step. replayed: it was a graph, and its host code did not run."""
        self._is_prepared = False
        for layer in self.compacted_layers().values():
            assert isinstance(layer.store, FusedStore), "kernels append"
            if replayed:
                layer.store.count_step()
                layer.columns += 1
            # Of a step that failed before this layer: the next one may be of another kind.
            layer.store.is_prepared = False

    def undo_forward(self) -> None:
        """After a forward that failed half-way: as it was before."""
        self._restore(self._undo)
        self._undo = None

    # Offloaded.

    def offload_to(self, place: str | Path) -> int:
        """Move an idle cache off its device, to host memory ("cpu") or into a file in a folder; the next use brings it back bit by bit, and so does
        `reload`. Pages that forks share go once, when all of them are offloaded, or at the next call when those that were not are gone. Tables,
        counts and tokens on trial stay, so that `report` works. Returns the bytes that left the device.

        A file goes when the cache comes back or is dropped; where a process is killed it stays behind.

        Raises:
            ValueError: a place that is neither.
            OSError: a folder that cannot be written.
        """
        if not isinstance(place, str | Path):
            raise ValueError(f"place is {place!r}; give 'cpu', which is host memory, or a folder")
        if not self._stores():
            return 0
        folder = None if place == "cpu" else Path(place)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        before = held_bytes(self)
        if self.is_offloaded:
            for store in self._stores():
                store.pool.offload_entries(folder)
            return before - held_bytes(self)
        self._undo, self.is_offloaded = None, True
        try:
            for index, layer in enumerate(self.layers):
                if not isinstance(layer, CompactedLayer):
                    self._offload_dense(index, folder)
                elif not layer.is_empty:
                    layer.store.offload(folder)
        except BaseException:
            # As a disk that is full: all or nothing.
            self._return()
            raise
        return before - held_bytes(self)

    def _offload_dense(self, index: int, folder: Path | None) -> None:
        fields = vars(self.layers[index])
        moved = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor) and value.numel() > 1}
        if moved:
            self._offloaded_dense[index] = Offloaded(moved, folder)
            fields.update({name: placeholder(value) for name, value in moved.items()})

    def reload(self) -> None:
        """Back to the device, where `offload_to` moved it from.

        Raises:
            CacheFull: the bound leaves no room for it; it stays where it is.
        """
        if not self.is_offloaded:
            return
        self.budget.check(bytes_to_return(self))
        self._return()

    @outside_inference_mode
    def _return(self) -> None:
        for store in self._stores():
            if store.is_offloaded:
                store.reload()
        for index, away in self._offloaded_dense.items():
            vars(self.layers[index]).update(away.take())
        self._offloaded_dense, self.is_offloaded = {}, False

    def _begin_use(self, *others: "DMSCache") -> None:
        """What is to be used is on its device, and stays there meanwhile."""
        self.budget.use(self, *others)
        for cache in (self, *others):
            cache.reload()

    # Bounds.

    @property
    def _is_bounded(self) -> bool:
        return self.budget.max_bytes is not None

    def _make_room(self, num_bytes: int, wanted: list[tuple[PagePool, int]]) -> None:
        """Get pools the pages that they miss, and make sure of num_bytes beside them, or raise CacheFull and change nothing."""
        missing = [(pool, pool.missing(num_pages)) for pool, num_pages in wanted]
        pages = growth_bytes(missing)
        if num_bytes + pages <= 0:
            return
        self.budget.check(num_bytes + pages)
        ahead = [(pool, max(num_pages, pool.growth()) if num_pages else 0) for pool, num_pages in missing]
        if self.budget.allows(num_bytes + growth_bytes(ahead), with_spare=True):
            missing = ahead
        for pool, num_pages in missing:
            if num_pages:
                pool.resize(pool.num_pages + num_pages)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Where the cache is bounded: all layers change, or none."""
        before = [_snapshot(layer) for layer in self.layers] if self._is_bounded else None
        try:
            yield
        except CacheFull:
            self._restore(before)
            raise

    def _restore(self, snapshots: list[dict[str, Any]] | None) -> None:
        for layer, fields in zip(self.layers, snapshots or [], strict=False):
            if isinstance(layer, CompactedLayer):
                layer.restore(fields)
            else:
                vars(layer).clear()
                vars(layer).update(fields)


def _snapshot(layer) -> dict[str, Any]:
    if isinstance(layer, CompactedLayer):
        return layer.snapshot()
    # A DynamicLayer makes new tensors when it grows; other kinds may write into theirs.
    return dict(vars(layer)) if isinstance(layer, DynamicLayer) else copy.deepcopy(vars(layer))


def _is_filled(layer) -> bool:
    """Whether the layer has made the tensors that it writes to."""
    if isinstance(layer, CompactedLayer):
        return not layer.is_empty
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return hf_compat.linear_state_is_filled(layer)
    return getattr(layer, "is_initialized", True)


def _step_bytes(layer) -> int:
    """How much a layer without gates grows, at most, by a token a row; linear attention does not."""
    if not isinstance(layer, DynamicLayer):
        return 0
    tensors = [x for x in (layer.keys, layer.values) if x is not None]
    needed = sum(x.numel() // x.shape[2] * (x.shape[2] + 1) * x.element_size() for x in tensors)
    return max(0, needed - sum(x.untyped_storage().nbytes() for x in tensors))


class MaskedCache(DynamicCache):
    """A cache with masked layers; `masked_cache` makes one."""

    def reset(self) -> None:
        super().reset()
        for layer in self.layers:
            hf_compat.empty_layer(layer)


def masked_cache(model, *, state: DMSState | None = None) -> MaskedCache:
    """An empty cache that hides what is evicted and keeps it, the reference for `DMSCache`: pass it as `cache` in evict mode.

    state: of the model that `model` is part of; None: its own.
    """
    state = state or state_of(model)
    cache = MaskedCache(config=model.config)
    for layer in state.layers:
        cache.layers[layer.index] = MaskedLayer(state.config)
    return cache


def compact_layers(cache: Cache, state: DMSState) -> None:
    """Replace the layers with gates of an empty DynamicCache, which a user gave or the model made; those that evict stay.

    Raises:
        ValueError: a cache whose layers do not grow (static, quantised), or one that was filled without decisions.
    """
    layers = cache.layers
    buffers: dict[torch.device, PageBuffers] | None = {} if state.offload_layers else None
    for index in (layer.index for layer in state.layers):
        while len(layers) <= index:
            layers.append(DynamicLayer())
        layer = layers[index]
        if isinstance(layer, MaskedLayer | CompactedLayer):
            continue
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"evict mode needs a DMSCache (or an empty DynamicCache), and layer {index} of the given cache is a {type(layer).__name__}; "
                "leave out cache_implementation, or pass cache=DMSCache(model)"
            )
        if layer.get_seq_length() > 0:
            raise ValueError(
                f"the given cache holds {layer.get_seq_length()} tokens that were read without eviction; start evict mode with an empty cache"
            )
        layers[index] = CompactedLayer(state.config, state.page_size, kv_dtype=state.kv_dtype, buffers=buffers)

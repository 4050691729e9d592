"""`DMSCache`: the KV cache of a retrofitted model, for everything that `generate` does."""

import copy
import weakref

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dms.cache.layer import CompactedLayer
from dms.cache.pool import CacheFull
from dms.cache.report import Report, make_report
from dms.state import DMSState, state_of


class Budget:
    """max_bytes for a cache and all its forks together; None: no bound."""

    def __init__(self, max_bytes: int | None):
        self.max_bytes = max_bytes
        self.caches: weakref.WeakSet[DMSCache] = weakref.WeakSet()

    def check(self, wanted: int) -> None:
        """Raises CacheFull where so many more bytes would be too many."""
        if self.max_bytes is None:
            return
        held = held_bytes(*self.caches)
        if held + wanted > self.max_bytes:
            raise CacheFull(
                f"the cache holds {held:,} bytes and needs {wanted:,} more, and max_cache_bytes is {self.max_bytes:,}; the cache is as it was "
                "before these tokens: end some sequences (batch_select_indices, or drop a fork), evict more (evict_bias), or raise the bound"
            )


class DMSCache(Cache):
    """Evicted entries are freed and not read: per layer and head, the last w + 1 tokens and what was kept of those before.

    `model.generate` and forwards in evict mode make one by themselves; make one to keep it: `cache = DMSCache(model)`, then
    pass `past_key_values=cache`. Layers without gates have transformers' own cache layers in it.

    Args:
        model: a retrofitted model.
        page_size: entries of a page, 16, 32 or 64; None: `model.dms.page_size`. Half a page is wasted per head.
        max_cache_bytes: bound for this cache and its forks together (None: `model.dms.max_cache_bytes`); a forward that
            would exceed it raises CacheFull and leaves the cache as it was.
    """

    def __init__(self, model, *, page_size: int | None = None, max_cache_bytes: int | None = None, state: DMSState | None = None):
        state = state or state_of(model)
        self.budget = Budget(max_cache_bytes if max_cache_bytes is not None else state.max_cache_bytes)
        self.budget.caches.add(self)
        layers = DynamicCache(config=model.config).layers
        for index in (layer.index for layer in state.layers):
            layers[index] = self._make_layer(state, page_size)
        super().__init__(layers=layers)
        self.state = weakref.ref(state)
        self._undo: list[dict] | None = None

    def _make_layer(self, state: DMSState, page_size: int | None) -> CompactedLayer:
        limit = None if self.budget.max_bytes is None else self.budget.check
        return CompactedLayer(state.config, page_size or state.page_size, limit)

    def compacted_layers(self) -> dict[int, CompactedLayer]:
        """Those that evict and hold something, by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, CompactedLayer) and layer.store is not None}

    def fork(self) -> "DMSCache":
        """A second conversation from here on: full pages are shared, ring and last pages copied. `copy.deepcopy` does the same."""
        new = object.__new__(type(self))
        vars(new).update(vars(self), layers=[])
        for layer in self.layers:
            new.layers.append(layer.copy() if isinstance(layer, CompactedLayer) else copy.deepcopy(layer))
        self.budget.caches.add(new)
        return new

    def __deepcopy__(self, memo) -> "DMSCache":
        return self.fork()

    def report(self, warn: bool = True) -> Report:
        """What is held, in entries, pages and bytes; warns where nothing was evicted or bytes leave their bound."""
        return make_report(self, warn)

    def save(self, path) -> None:
        """Write the cache to a safetensors file, to go on later or elsewhere; what is on trial is kept first."""
        from dms.cache.saved import save

        save(self, path)

    @classmethod
    def load(cls, path, model, **options) -> "DMSCache":
        """Read what `save` wrote; options as of the constructor.

        Raises:
            ValueError: a damaged file, or the cache of another model.
        """
        from dms.cache.saved import load

        return load(path, model, **options)

    def stop_past_recording(self) -> None:
        """Keep what is on trial; from now on nothing can be taken back."""
        for layer in self.layers:
            if isinstance(layer, CompactedLayer):
                layer.stop_past_recording()
            elif getattr(layer, "record_past", False):
                layer.crop(0)
                layer.record_past = False

    def before_forward(self, num_new: int) -> None:
        """Where the cache is bounded: refuse a step that has no room, or remember how to undo a longer forward."""
        self._undo = None
        if self.budget.max_bytes is None:
            return
        layers = self.compacted_layers().values()
        if num_new == 1 and not any(layer.record_past for layer in layers):
            stores = [layer.store for layer in layers]
            missing = ((store.next_pages() - int(store.pool.num_free), store.pool.page_bytes) for store in stores)
            wanted = sum(max(0, pages) * size for pages, size in missing)
            if wanted:
                self.budget.check(wanted)
            return
        self._undo = [_snapshot(layer) for layer in self.layers]

    def undo_forward(self) -> None:
        """After a forward that failed half-way: as it was before."""
        for layer, fields in zip(self.layers, self._undo or [], strict=False):
            layer.restore(fields) if isinstance(layer, CompactedLayer) else vars(layer).update(fields)
        self._undo = None


def _snapshot(layer) -> dict:
    if isinstance(layer, CompactedLayer):
        return layer.snapshot()
    # A DynamicLayer makes new tensors when it grows; other kinds may write into theirs.
    return dict(vars(layer)) if isinstance(layer, DynamicLayer) else copy.deepcopy(vars(layer))


def held_bytes(*caches: Cache) -> int:
    """Bytes of all tensors that the caches hold, each counted once, whichever of them share it."""
    storages: dict[int, int] = {}

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                add(item)

    for cache in caches:
        for layer in cache.layers:
            if isinstance(layer, CompactedLayer):
                add([*layer.own_tensors(), *(layer.store.pool.tensors() if layer.store is not None else ())])
            else:
                add(vars(layer))
    storages.pop(0, None)
    return sum(storages.values())

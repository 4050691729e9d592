"""A bound for the bytes of a cache and of all that were forked from it."""

import weakref

import torch
from transformers.cache_utils import Cache

# Room that pools leave when they grow ahead of need: it is for what is needed.
_SPARE = 1 / 16


class CacheFull(RuntimeError):
    """`max_cache_bytes` does not allow what was asked for; the cache is as it was before."""


class Budget:
    """max_bytes for a cache and all its forks together; None: no bound."""

    def __init__(self, max_bytes: int | None):
        self.max_bytes = max_bytes
        self.caches: weakref.WeakSet[Cache] = weakref.WeakSet()

    def allows(self, wanted: int, with_spare: bool = False) -> bool:
        """Whether so many more bytes may be held; with_spare: and some room would be left."""
        return self.max_bytes is None or held_bytes(*self.caches) + wanted <= self.max_bytes * (1 - _SPARE * with_spare)

    def check(self, wanted: int = 0) -> None:
        """Raises CacheFull where so many more bytes would be too many."""
        if not self.allows(wanted):
            raise CacheFull(
                f"the cache holds {held_bytes(*self.caches):,} bytes and needs {wanted:,} more, and max_cache_bytes is {self.max_bytes:,}; it is as it "
                "was before: end some sequences (batch_select_indices, or drop a fork), evict more (evict_bias), or raise the bound"
            )


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
            add(layer.held_tensors() if hasattr(layer, "held_tensors") else vars(layer))
    storages.pop(0, None)
    return sum(storages.values())

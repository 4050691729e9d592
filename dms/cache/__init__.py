"""The compacted cache, whose evicted entries are freed and not read, and the masked reference."""

from dms.cache.cache import DMSCache, compact_layers, masked_cache
from dms.cache.layer import CompactedLayer, MaskedLayer
from dms.cache.page_pool import CacheBudget, CacheFull, held_bytes
from dms.cache.stats import CacheStats

__all__ = [
    "CacheBudget",
    "CacheFull",
    "CacheStats",
    "CompactedLayer",
    "DMSCache",
    "MaskedLayer",
    "compact_layers",
    "held_bytes",
    "masked_cache",
]

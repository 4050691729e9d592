"""The compacted cache: what is evicted is freed and not read."""

from dms.cache.budget import CacheFull, held_bytes
from dms.cache.cache import DMSCache
from dms.cache.convert import compact_layers
from dms.cache.layer import CompactedLayer
from dms.cache.stats import Report

__all__ = ["CacheFull", "CompactedLayer", "DMSCache", "Report", "compact_layers", "held_bytes"]

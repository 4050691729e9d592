"""The compacted cache: what is evicted is freed and not read."""

from dms.cache.cache import DMSCache, held_bytes
from dms.cache.layer import CompactedLayer
from dms.cache.pool import CacheFull
from dms.cache.report import Report

__all__ = ["CacheFull", "CompactedLayer", "DMSCache", "Report", "held_bytes"]

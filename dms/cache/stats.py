"""What a compacted cache holds: entries, pages, bytes, and their ratios."""

import warnings
from dataclasses import asdict, dataclass, field

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from dms.cache.budget import held_bytes
from dms.cache.layer import CompactedLayer

# Bytes over those of the entries alive: half a page a head, the ring's and tables' counts, what the pool grows ahead.
BYTES_BOUND = 1.15
# A text of so many windows in which nothing was evicted is no accident; of fewer pages a head, rounding rules the bytes.
_LONG_TEXT = 4
_MANY_PAGES = 8


@dataclass
class Report:
    """Counts are over the layers with gates, summed over sequences and KV heads, padding not counted.

    logical_tokens: what `generate` counts, padding included. seen, alive: entries. cr = seen / alive, window and sinks included;
    cr_decided: tokens decided over tokens kept by the gates; cr_model: as cr, over all attention layers. bytes: of all tensors
    held, pools, tables and layers without gates included; bytes_alive: of the entries alive; bytes_dense: of all entries seen.
    cr_LH: cr of each layer with gates and each head. memory: "compacted".
    """

    logical_tokens: int
    num_sequences: int
    seen: int
    alive: int
    cr: float
    cr_decided: float
    cr_model: float
    pages_used: int
    pages_held: int
    page_size: int
    bytes: int
    bytes_alive: int
    bytes_dense: int
    layer_indices: list[int] = field(default_factory=list)
    cr_LH: list[list[float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: str = "compacted"

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.alive:,} of {self.seen:,} KV entries in {self.bytes / 2**20:.1f} MiB (dense: {self.bytes_dense / 2**20:.1f} MiB); "
            f"cr {self.cr:.2f}, cr decided {self.cr_decided:.2f}, cr of the model {self.cr_model:.2f}; "
            f"{self.pages_used:,} of {self.pages_held:,} pages of {self.page_size} in use; compacted"
        )


def compacted_layers(cache: Cache) -> dict[int, CompactedLayer]:
    """Those that evict and hold something, by index."""
    return {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CompactedLayer) and layer.store is not None}


def make_report(cache: Cache, warn: bool) -> Report:
    """As `DMSCache.report`, of any cache with layers that evict."""
    layers = compacted_layers(cache)
    report = Report(cache.get_seq_length(), 0, 0, 0, 1.0, 1.0, 1.0, 0, 0, 0, held_bytes(cache), 0, 0)
    evicted = decided = seen_all = alive_all = expected_pages = 0
    for index, layer in enumerate(cache.layers):
        if index not in layers:
            seen, alive, size = _plain(layer)
            seen_all, alive_all = seen_all + seen, alive_all + alive
            report.bytes_alive, report.bytes_dense = report.bytes_alive + alive * size, report.bytes_dense + seen * size
            continue
        store, pool = layer.store, layer.store.pool
        store.check()
        B, H = store.num_kept.shape
        seen_B, alive_BH = layer.seen().long(), layer.entries_alive()
        seen, alive, size = int(seen_B.sum()) * H, int(alive_BH.sum()), 2 * pool.head_dim * store.ring_kv.element_size()
        kept = int(store.num_kept.sum())
        report.num_sequences, report.page_size = B, pool.page_size
        report.seen, report.alive = report.seen + seen, report.alive + alive
        report.pages_used, report.pages_held = report.pages_used + pool.num_used, report.pages_held + pool.num_pages
        report.bytes_alive += (alive - kept) * size + kept * pool.entry_bytes
        report.bytes_dense += seen * size
        report.layer_indices.append(index)
        report.cr_LH.append((seen_B.sum() / alive_BH.sum(0).clamp(min=1)).tolist())
        evicted, decided = evicted + int(store.evicted.sum()), decided + int(store.decided.sum()) * H
        expected_pages += _distinct_pages(store) if pool.num_holders == 1 else pool.num_used
    report.cr = report.seen / max(1, report.alive)
    report.cr_model = (report.seen + seen_all) / max(1, report.alive + alive_all)
    report.cr_decided = 1.0 / max(1e-9, 1.0 - evicted / max(1, decided))
    report.warnings = _warnings(report, layers, evicted, expected_pages)
    for message in report.warnings if warn else ():
        warnings.warn(message, stacklevel=3)
    return report


def _distinct_pages(store) -> int:
    return len(torch.unique(store.page_numbers()))


def _plain(layer) -> tuple[int, int, int]:
    """Entries seen and held by a layer of transformers', and the bytes of one; a layer without keys (linear attention) has none."""
    keys = getattr(layer, "keys", None)
    if isinstance(layer, CompactedLayer) or not isinstance(layer, CacheLayerMixin) or keys is None or keys.dim() != 4:
        return 0, 0, 0
    heads = keys.shape[0] * keys.shape[1]
    return layer.get_seq_length() * heads, keys.shape[2] * heads, 2 * keys.shape[3] * keys.element_size()


def _warnings(report: Report, layers: dict, evicted: int, expected_pages: int) -> list[str]:
    found = []
    if not layers:
        return found
    window = max(layer.dms.window for layer in layers.values())
    per_head = report.seen / sum(layer.store.num_kept.numel() for layer in layers.values())
    if evicted == 0 and per_head > _LONG_TEXT * (window + 1):
        found.append(
            f"nothing was evicted over {per_head:.0f} tokens a sequence: the gates keep everything; were they trained, and is evict_bias right?"
        )
    if report.pages_used != expected_pages:
        found.append(f"{report.pages_used} pages are in use and the tables list {expected_pages}: pages have leaked; please report this")
    pages_per_head = report.pages_used / sum(layer.store.num_kept.numel() for layer in layers.values())
    alone = all(layer.store.pool.num_holders == 1 for layer in layers.values())
    if alone and pages_per_head > _MANY_PAGES and report.bytes > BYTES_BOUND * report.bytes_alive:
        found.append(
            f"{report.bytes:,} bytes are held for {report.bytes_alive:,} bytes of entries, more than {BYTES_BOUND} times; "
            "smaller pages (page_size) waste less"
        )
    return found

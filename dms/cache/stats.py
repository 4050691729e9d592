"""What a cache holds: entries, pages, bytes, and their ratios."""

import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from dms import masks
from dms.cache.host_pages import HostPagePool
from dms.cache.layer import CompactedLayer, MaskedLayer
from dms.cache.offloading import Offloaded
from dms.cache.page_pool import held_bytes

# Bytes over those of the entries alive: half a page a head, the counts of ring and page table, what the pool grows ahead.
BYTES_BOUND = 1.15
# In a text of this many windows something should have been evicted.
_LONG_TEXT = 4
# With fewer pages a head, or list, rounding to whole pages dominates the bytes.
_MANY_PAGES = 8


@dataclass
class CacheStats:
    """Counts over the layers with gates, summed over sequences and KV heads, padding not counted."""

    logical_tokens: int
    """What `generate` counts, padding included."""
    num_sequences: int
    seen: int
    """Entries of all tokens read."""
    alive: int
    """Entries that the cache still holds."""
    cr: float
    """seen / alive, window and sinks included."""
    cr_decided: float
    """Tokens decided over tokens kept by the gates."""
    cr_model: float
    """As cr, over all attention layers."""
    pages_used: int
    pages_held: int
    page_size: int
    bytes: int
    """Of all tensors held on the device: pools, page tables and layers without gates included."""
    bytes_alive: int
    """Of the entries alive."""
    bytes_dense: int
    """Of all entries seen."""
    layer_indices: list[int] = field(default_factory=list)
    cr_LH: list[list[float]] = field(default_factory=list)
    """cr of each layer with gates and each head."""
    warnings: list[str] = field(default_factory=list)
    memory: str = "compacted"
    bytes_host: int = 0
    """In host memory: what `offload_to` moved there, and pages that rest there (`offload_layers`)."""
    bytes_disk: int = 0
    """In files that `offload_to` wrote."""
    bytes_ring: int = 0
    """Among `bytes`: of the rings, which are in the model's dtype whatever pages are in."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.alive:,} of {self.seen:,} KV entries in {self.bytes / 2**20:.1f} MiB (dense: {self.bytes_dense / 2**20:.1f} MiB); "
            f"cr {self.cr:.2f}, cr decided {self.cr_decided:.2f}, cr of the model {self.cr_model:.2f}; "
            f"{self.pages_used:,} of {self.pages_held:,} pages of {self.page_size} in use; compacted"
            + "".join(
                f"; {count / 2**20:.1f} MiB {where}"
                for count, where in ((self.bytes_host, "in host memory"), (self.bytes_disk, "on disk"))
                if count
            )
        )


def compacted_layers(cache: Cache) -> dict[int, CompactedLayer]:
    """The layers that evict and hold something, by index."""
    return {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CompactedLayer) and not layer.is_empty}


def offloaded_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes that a cache and its forks hold in host memory, and on disk, off their device."""
    away = _offloaded(cache)
    host, disk = (sum(one.num_bytes for one in away if one.on_disk == on_disk) for on_disk in (False, True))
    return host + sum(pool.resting_bytes for pool in _host_pools(cache)), disk


def bytes_to_return(cache: Cache) -> int:
    """What an offloaded cache takes of its device when it comes back."""
    pools = _host_pools(cache)
    files = [pool.offloaded.num_bytes for pool in pools if pool.offloaded is not None]
    returning = sum(one.num_bytes for one in _offloaded(cache)) - sum(files)
    return returning + sum(buffers.missing_bytes() for buffers in {pool.buffers for pool in pools})


def _offloaded(cache: Cache) -> list[Offloaded]:
    stores = [layer.store for layer in compacted_layers(cache).values()]
    away = [
        *(store.offloaded_ring for store in stores),
        *(store.pool.offloaded for store in stores),
        *getattr(cache, "_offloaded_dense", {}).values(),
    ]
    return [one for one in away if one is not None]


def _host_pools(cache: Cache) -> list[HostPagePool]:
    pools = (layer.store.pool for layer in compacted_layers(cache).values())
    return [pool for pool in pools if isinstance(pool, HostPagePool)]


def cache_stats(cache: Cache, warn: bool) -> CacheStats:
    """As `DMSCache.report`, of any cache with layers that evict."""
    compacted = compacted_layers(cache)
    stats = CacheStats(cache.get_seq_length(), 0, 0, 0, 1.0, 1.0, 1.0, 0, 0, 0, held_bytes(cache), 0, 0)
    evicted = decided = expected_pages = 0
    seen_without_gates = alive_without_gates = 0
    for index, layer in enumerate(cache.layers):
        if index not in compacted:
            seen, alive, size = _layer_without_gates(layer)
            seen_without_gates, alive_without_gates = seen_without_gates + seen, alive_without_gates + alive
            stats.bytes_alive, stats.bytes_dense = stats.bytes_alive + alive * size, stats.bytes_dense + seen * size
    for index, gated in compacted.items():
        store, pool = gated.store, gated.store.pool
        store.check()
        store.release_gone()
        B, H = store.evicted.shape
        seen_B, alive_BH = gated.row_lengths().long(), gated.entries_alive()
        seen, alive, size = int(seen_B.sum()) * H, int(alive_BH.sum()), 2 * pool.head_dim * store.ring_kv.element_size()
        in_pages = int(store.num_kept.sum() if store.lists_per_head == 1 else store.seen_by(store.seq_len - 1).sum())
        stats.num_sequences, stats.page_size = B, pool.page_size
        stats.seen, stats.alive = stats.seen + seen, stats.alive + alive
        stats.pages_used, stats.pages_held = stats.pages_used + pool.num_used, stats.pages_held + pool.num_pages
        stats.bytes_alive += (alive - in_pages) * size + in_pages * pool.entry_bytes
        stats.bytes_dense += seen * size
        stats.bytes_ring += store.ring_kv.nbytes + store.ring_state.nbytes
        stats.layer_indices.append(index)
        stats.cr_LH.append((seen_B.sum() / alive_BH.sum(0).clamp(min=1)).tolist())
        evicted, decided = evicted + int(store.evicted.sum()), decided + int(store.decided.sum()) * H
        # Forks share pages, and their tables are not looked at here.
        expected_pages += len(torch.unique(store.page_numbers())) if pool.num_holders == 1 else pool.num_used
    stats.bytes_host, stats.bytes_disk = offloaded_bytes(cache)
    stats.cr = stats.seen / max(1, stats.alive)
    stats.cr_model = (stats.seen + seen_without_gates) / max(1, stats.alive + alive_without_gates)
    stats.cr_decided = _decided_ratio(evicted, decided)
    stats.warnings = _warnings(stats, list(compacted.values()), evicted, expected_pages)
    for message in stats.warnings if warn else ():
        warnings.warn(message, stacklevel=3)
    return stats


def masked_ratios(cache: Cache) -> dict[str, float]:
    """Of a masked cache: `cr_decided`, `cr` (ratios of sums over layers with gates), and the entries behind them: `seen`, `alive`."""
    evicted = decided = seen = alive = 0
    for layer in cache.layers:
        if not isinstance(layer, MaskedLayer) or layer.decided is None:
            continue
        tokens, decisions = layer.decided.tokens, layer.evicted()
        evicted_BSH = decisions.any(-1) if len(layer.dms.windows) > 1 else decisions
        decided_BSH = masks.decided_tokens(tokens.segment_BT, layer.dms.alignment)[..., None].expand_as(evicted_BSH)
        evicted += int((evicted_BSH & decided_BSH).sum())
        decided += int(decided_BSH.sum())
        seen += int(tokens.real.sum()) * evicted_BSH.shape[-1]
        alive += int(masks.alive(tokens, decisions, window=layer.dms.window, sinks=layer.dms.sinks).sum())
    return {"cr_decided": _decided_ratio(evicted, decided), "cr": seen / max(1, alive), "seen": seen, "alive": alive}


def _decided_ratio(evicted: int, decided: int) -> float:
    return 1.0 / max(1e-9, 1.0 - evicted / max(1, decided))


def _layer_without_gates(layer) -> tuple[int, int, int]:
    """Entries seen and held by a layer of transformers', and the bytes of one; a layer without keys (linear attention) has none."""
    keys = getattr(layer, "keys", None)
    if isinstance(layer, CompactedLayer) or not isinstance(layer, CacheLayerMixin) or keys is None or keys.dim() != 4:
        return 0, 0, 0
    heads = keys.shape[0] * keys.shape[1]
    return layer.get_seq_length() * heads, keys.shape[2] * heads, 2 * keys.shape[3] * keys.element_size()


def _warnings(stats: CacheStats, layers: list[CompactedLayer], evicted: int, expected_pages: int) -> list[str]:
    messages: list[str] = []
    if not layers:
        return messages
    window = max(layer.dms.windows[-1] for layer in layers)
    per_head = stats.seen / sum(layer.store.evicted.numel() for layer in layers)
    num_lists = sum(layer.store.num_kept.numel() for layer in layers)
    if evicted == 0 and per_head > _LONG_TEXT * (window + 1):
        messages.append(
            f"nothing was evicted over {per_head:.0f} tokens a sequence: the gates keep everything; were they trained, and is evict_bias right?"
        )
    if stats.pages_used != expected_pages:
        messages.append(f"{stats.pages_used} pages are in use and the tables list {expected_pages}: pages have leaked; please report this")
    alone = all(layer.store.pool.num_holders == 1 for layer in layers)
    if alone and stats.pages_used / num_lists > _MANY_PAGES and stats.bytes > BYTES_BOUND * stats.bytes_alive:
        messages.append(
            f"{stats.bytes:,} bytes are held for {stats.bytes_alive:,} bytes of entries, more than {BYTES_BOUND} times; "
            "smaller pages (page_size) waste less"
        )
    return messages

"""Entries of the KV cache: how many a head has alive, how many pairs a prompt computes, and what bytes are held, read and written.

An eviction ratio is one of decided tokens, `cr_decided`: of the tokens that have left all windows, one in so many is alive. Of several windows
the others are assumed to leave by each alike (`dms.costs.lifetimes`). Letters: T tokens of the context, the query's own included, w window, P
entries of a page.
"""

from dataclasses import dataclass

from dms.costs.flops import visible_pairs
from dms.costs.lifetimes import Lifetimes, entries_of
from dms.costs.shapes import AttentionShape

# What dms/cache holds beside entries. A ring grows by so many slots; a place in a page table is an int32, and tables of a GPU are
# widened by so many places; a page has a reference count and a place on the free list.
RING_STEP, TABLE_STEP, PLACE_BYTES, PAGE_EXTRA = 64, 64, 4, 8
# num_kept (int32) of a list and evicted (int64) of a head, seq_len and decided of a sequence; with several windows an entry's position (int32).
LIST_COUNT, HEAD_COUNT, SEQUENCE_COUNTS, POSITION_BYTES = 4, 8, 12, 4
_NUMBER = 2
_SCALE = 4


@dataclass(frozen=True, kw_only=True)
class KV:
    """A KV cache."""

    cr: float | None = None
    """Of decided tokens; None: dense, everything is kept."""
    bits: int = 16
    """16, or 8: a byte a number and a float32 scale for each key and each value, of all that is in pages (of a dense cache: of all that
    layers with full attention hold)."""
    window: int | tuple[int, ...] = 256
    """Of several the rising ones."""
    page_size: int = 64

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.window,) if isinstance(self.window, int) else self.window

    @property
    def lifetimes(self) -> Lifetimes:
        return Lifetimes.alike(self.windows, 1 / self.ratio)

    @property
    def page_entry_extra(self) -> int:
        """Bytes of an entry in pages, beside its key and value."""
        return POSITION_BYTES if len(self.windows) > 1 else 0

    @property
    def ratio(self) -> float:
        return 1.0 if self.cr is None else self.cr

    @property
    def name(self) -> str:
        return "dense" if self.cr is None else f"CR {self.cr:g}"

    @property
    def label(self) -> str:
        return self.name + (", KV 8-bit" if self.bits == 8 else "")

    def evicts(self, layer: AttentionShape) -> bool:
        return self.cr is not None and layer.gated


def prompt_pairs(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """Of a whole prompt, for each query head."""
    if kv.evicts(layer):
        return kv.lifetimes.pairs(tokens)
    return visible_pairs(tokens, tokens if layer.window is None else layer.window - 1, 0.0, layer.causal)


def entries_seen(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """That the newest of T tokens attends to, for each KV head; of one window min(T, (T - w - 1) / CR + w + 1)."""
    if kv.evicts(layer):
        return _in_ring(kv, tokens) + _in_pages(kv, tokens)
    return tokens if layer.window is None else min(tokens, layer.window)


def _in_ring(kv: KV, tokens: int) -> int:
    return entries_of(tokens, kv.windows[0])


def _in_pages(kv: KV, tokens: int) -> float:
    return sum(kv.lifetimes.in_lists(tokens))


def _page_entry_bytes(layer: AttentionShape, kv: KV) -> int:
    return _entry_bytes(layer, kv.bits) + kv.page_entry_extra


def _entry_bytes(layer: AttentionShape, bits: int) -> int:
    numbers = layer.key_dim + layer.value_dim
    return numbers * _NUMBER if bits == 16 else numbers + 2 * _SCALE


def _plain_bits(layer: AttentionShape, kv: KV) -> int:
    """Of a layer that does not evict: bounded ones, and all that stand beside gates, are transformers' own and know no int8."""
    return kv.bits if kv.cr is None and layer.window is None else 16


def read_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """By the newest of T tokens, for each KV head."""
    if not kv.evicts(layer):
        return entries_seen(layer, kv, tokens) * _entry_bytes(layer, _plain_bits(layer, kv))
    kept = _in_pages(kv, tokens)
    places = kept / kv.page_size * PLACE_BYTES
    return _in_ring(kv, tokens) * _entry_bytes(layer, 16) + kept * _page_entry_bytes(layer, kv) + places


def written_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """By the newest of T tokens, for each KV head: it enters the ring, and what leaves it moves to a page if it is kept."""
    if not layer.holds:
        return 0.0
    if not kv.evicts(layer):
        return _entry_bytes(layer, _plain_bits(layer, kv))
    moved = _page_entry_bytes(layer, kv) * (1 - kv.lifetimes.leave[0]) if tokens > kv.windows[0] + 1 else 0.0
    return _entry_bytes(layer, 16) + moved


def held_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """After T tokens, for each KV head of a sequence; as `dms.cache.held_bytes` counts them after one prefill.

    Not in here: while decoding, pools grow ahead of need by up to an eighth on a GPU, and of a list that tokens leave half of the first page is
    gone on average; and between a prompt and the first step
    transformers' sliding layers hold the whole prompt, of which they show the end.
    """
    if not layer.holds:
        return 0.0
    if not kv.evicts(layer):
        # A sliding layer keeps one fewer than it sees: the query brings its own.
        num_held = tokens if layer.window is None else min(tokens, layer.window - 1)
        return num_held * _entry_bytes(layer, _plain_bits(layer, kv))
    slots = min(kv.windows[0] + 1, -(-tokens // RING_STEP) * RING_STEP)
    ring = slots * (_entry_bytes(layer, 16) + 1)
    # A last page is half full on average.
    lists = [kept / kv.page_size + (0.5 if kept else 0.0) for kept in kv.lifetimes.in_lists(tokens)]
    # All lists have rows of one table.
    places = len(lists) * -(-max(lists) // TABLE_STEP) * TABLE_STEP
    pages = sum(lists) * (kv.page_size * _page_entry_bytes(layer, kv) + PAGE_EXTRA)
    return ring + pages + places * PLACE_BYTES + len(lists) * LIST_COUNT + HEAD_COUNT


def prompt_written_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """By a whole prompt, for each KV head: what is held after it."""
    if not layer.holds:
        return 0.0
    if not kv.evicts(layer):
        return held_bytes(layer, kv, tokens)
    return _in_ring(kv, tokens) * _entry_bytes(layer, 16) + _in_pages(kv, tokens) * _page_entry_bytes(layer, kv)

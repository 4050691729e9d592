"""Entries of the KV cache: how many a head has alive, how many pairs a prompt computes, and what bytes are held, read and written.

An eviction ratio is one of decided tokens, `cr_decided`: of the tokens that have left all windows, one in so many is alive. Of several windows
the others are assumed to leave by each alike (`dms.costs.lifetimes`). Letters: T tokens of the context, the query's own included, w window, P
entries of a page.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dms.config import nearest
from dms.costs.flops import visible_pairs
from dms.costs.lifetimes import Lifetimes, entries_of
from dms.costs.shapes import AttentionShape
from dms_kernels.quantization import KV_DTYPES, scales_of_pages, stored_width

KVDtype = Literal["model", "int8", "fp8", "int4"]
DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)
"""From the widest on."""

# What dms/cache holds beside entries. A ring grows by so many slots; a place in a page table is an int32, and tables of a GPU are
# widened by so many places; a page has a reference count and a place on the free list.
RING_STEP, TABLE_STEP, PLACE_BYTES, PAGE_EXTRA = 64, 64, 4, 8
# num_kept (int32) of a list and evicted (int64) of a head, seq_len and decided of a sequence; with several windows an entry's position (int32).
LIST_COUNT, HEAD_COUNT, SEQUENCE_COUNTS, POSITION_BYTES = 4, 8, 12, 4
_NUMBER = 2


@dataclass(frozen=True, kw_only=True)
class KV:
    """A KV cache."""

    cr: float | None = None
    """Of decided tokens; None: dense, everything is kept."""
    dtype: KVDtype = "model"
    """Of all that is in pages; of a dense cache: of all that layers with full attention hold. model: the model's own, 16 bits. The others as
    `dms_kernels.quantization` stores them, with their scales."""
    window: int | tuple[int, ...] = 256
    """Of several the rising ones."""
    page_size: int = 64

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

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
        return f"{self.name} {'16-bit' if self.dtype == 'model' else self.dtype}"

    def evicts(self, layer: AttentionShape) -> bool:
        return self.cr is not None and layer.gated


def check_dtype(name: str) -> None:
    """Raises ValueError for a dtype that pages do not have."""
    if name not in DTYPES:
        raise ValueError(f"a KV dtype is {name!r}{nearest(name, DTYPES)}; there are {', '.join(DTYPES)} (model: the model's own, 16 bits)")


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
    return entry_bytes(layer, kv.dtype) + kv.page_entry_extra


def entry_bytes(layer: AttentionShape, dtype: KVDtype) -> int:
    """Of a key and a value, and of their scales.

    Raises:
        ValueError: heads of this size cannot be stored so.
    """
    return _row_bytes(layer.key_dim, dtype) + _row_bytes(layer.value_dim, dtype)


def _row_bytes(head_dim: int, dtype: KVDtype) -> int:
    if dtype == "model":
        return head_dim * _NUMBER
    stored = KV_DTYPES[dtype]
    scales = scales_of_pages((), head_dim, stored)
    assert scales is not None, "what is quantised has scales"
    shape, dtype_of_scales = scales
    return stored_width(head_dim, stored) * stored.itemsize + math.prod(shape) * dtype_of_scales.itemsize


def _plain_dtype(layer: AttentionShape, kv: KV) -> KVDtype:
    """Of a layer that does not evict: bounded ones, and all that stand beside gates, are transformers' own and are not quantised."""
    return kv.dtype if kv.cr is None and layer.window is None else "model"


def read_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """By the newest of T tokens, for each KV head."""
    if not kv.evicts(layer):
        return entries_seen(layer, kv, tokens) * entry_bytes(layer, _plain_dtype(layer, kv))
    kept = _in_pages(kv, tokens)
    places = kept / kv.page_size * PLACE_BYTES
    return _in_ring(kv, tokens) * entry_bytes(layer, "model") + kept * _page_entry_bytes(layer, kv) + places


def written_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """By the newest of T tokens, for each KV head: it enters the ring, and what leaves it moves to a page if it is kept."""
    if not layer.holds:
        return 0.0
    if not kv.evicts(layer):
        return entry_bytes(layer, _plain_dtype(layer, kv))
    moved = _page_entry_bytes(layer, kv) * (1 - kv.lifetimes.leave[0]) if tokens > kv.windows[0] + 1 else 0.0
    return entry_bytes(layer, "model") + moved


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
        return num_held * entry_bytes(layer, _plain_dtype(layer, kv))
    slots = min(kv.windows[0] + 1, -(-tokens // RING_STEP) * RING_STEP)
    ring = slots * (entry_bytes(layer, "model") + 1)
    lists = _pages_of_lists(kv, tokens)
    # All lists have rows of one table.
    places = len(lists) * -(-max(lists) // TABLE_STEP) * TABLE_STEP
    pages = paged_bytes(layer, kv, tokens) + sum(lists) * PAGE_EXTRA
    return ring + pages + places * PLACE_BYTES + len(lists) * LIST_COUNT + HEAD_COUNT


def paged_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """Of what may lie outside the device while a layer waits for its turn, for each KV head whose entries the layer reads: pages in whole; of a
    layer with full attention that does not evict, all of it. Rings, bounded layers, page tables and counts stay."""
    if not kv.evicts(layer):
        return tokens * entry_bytes(layer, _plain_dtype(layer, kv)) if layer.window is None else 0.0
    return sum(_pages_of_lists(kv, tokens)) * kv.page_size * _page_entry_bytes(layer, kv)


def _pages_of_lists(kv: KV, tokens: int) -> list[float]:
    """A last page is half full on average."""
    return [kept / kv.page_size + (0.5 if kept else 0.0) for kept in kv.lifetimes.in_lists(tokens)]


def prompt_written_bytes(layer: AttentionShape, kv: KV, tokens: int) -> float:
    """By a whole prompt, for each KV head: what is held after it."""
    if not layer.holds:
        return 0.0
    if not kv.evicts(layer):
        return held_bytes(layer, kv, tokens)
    return _in_ring(kv, tokens) * entry_bytes(layer, "model") + _in_pages(kv, tokens) * _page_entry_bytes(layer, kv)

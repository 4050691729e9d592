"""Sequences that join a batch and leave it: the same for the compacted layers and for those of transformers that grow.

transformers' layers hold every column of a batch, so that sequences of different lengths end at the same column and begin at different
ones, as after left padding. Shapes: B sequences, H KV heads, S columns, D head dim, K rows.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from dms import hf_compat
from dms.cache.layer import CompactedLayer


def check_layers(layers: Iterable[Any]) -> None:
    """Raises ValueError for layers whose sequences cannot join others, or leave them, by what is here."""
    for index, layer in enumerate(layers):
        # A DummyLayer holds the place of a layer that reads another one's keys and values.
        known = isinstance(layer, CompactedLayer) or type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
        if not known and type(layer).__name__ != "DummyLayer":
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__}, whose sequences cannot join a batch; those of compacted, dynamic, "
                "sliding-window and linear-attention layers can: call generate instead"
            )


def append_rows(cache: Cache, other: Cache, rows: torch.Tensor) -> None:
    """Put rows [K] int64 of another cache of the same model behind a cache's own; a row may occur several times.

    The cache then has as many columns as the longer of both, the other's sequences ending at the last one.

    Raises:
        ValueError: as `check_layers`, or caches of different models.
    """
    if len(cache.layers) != len(other.layers):
        raise ValueError(f"a cache of {len(other.layers)} layers was to join one of {len(cache.layers)}; both must be of one model")
    check_layers([*cache.layers, *other.layers])
    pairs: list[tuple[Any, Any]] = list(zip(cache.layers, other.layers, strict=True))
    for layer, joining in pairs:
        if type(layer) is not type(joining):
            raise ValueError(
                f"a {type(joining).__name__} cannot join a {type(layer).__name__}; both caches must be of one model, in one mode"
            )
    for layer, joining in pairs:
        if isinstance(layer, CompactedLayer):
            layer.append_rows(joining, rows)
        elif type(layer).__name__ != "DummyLayer":
            hf_compat.join_layer(layer, joining, rows)


def keep_rows(cache: Cache, rows: torch.Tensor, num_columns: int) -> None:
    """Let all sequences go but rows [K] int64, of which the longest has num_columns tokens: the columns before those are given up too."""
    # Layers of linear attention know no other change of rows.
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # a LongTensor, which no constructor returns
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, CompactedLayer):
            layer.columns = min(layer.columns, num_columns)
            layer.store.pool.trim()
        else:
            hf_compat.shorten_layer(layer, num_columns)

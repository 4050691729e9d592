"""Sequences that join a batch and leave it: the same for the compacted layers and for those of transformers that grow.

transformers' layers hold every column of a batch, so that sequences of different lengths end at the same column and begin at different
ones, as after left padding. Shapes: B sequences, H KV heads, S columns, D head dim, K rows.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

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
        elif isinstance(layer, LinearAttentionLayer):
            _append_states(layer.conv_states, joining.conv_states, rows)
            _append_states(layer.recurrent_states, joining.recurrent_states, rows)
        elif joining.keys is not None:
            _append_dense(layer, joining, rows)


def _append_dense(layer: Any, joining: Any, rows: torch.Tensor) -> None:
    width = max(layer.keys.shape[2], joining.keys.shape[2])
    for name in ("keys", "values"):
        parts = getattr(layer, name), getattr(joining, name).index_select(0, rows.to(joining.keys.device))
        setattr(layer, name, torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts]))
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = max(layer.cumulative_length, joining.cumulative_length)


def _append_states(states: dict[int, Any], joining: dict[int, Any], rows: torch.Tensor) -> None:
    for index, state in states.items():
        if state is not None:
            states[index] = torch.cat([state, joining[index].index_select(0, rows.to(state.device))])


def keep_rows(cache: Cache, rows: torch.Tensor, num_columns: int) -> None:
    """Let all sequences go but rows [K] int64, of which the longest has num_columns tokens: the columns before those are given up too."""
    # Layers of linear attention know no other change of rows.
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # a LongTensor, which no constructor returns
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, CompactedLayer):
            layer.columns = min(layer.columns, num_columns)
            layer.store.pool.trim()
        elif getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[:, :, -num_columns:], layer.values[:, :, -num_columns:]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = min(layer.cumulative_length, num_columns)

"""Make the layers of another cache evict."""

from transformers.cache_utils import Cache, DynamicLayer

from dms.cache.layer import CompactedLayer
from dms.cache.masked import MaskedLayer
from dms.modes import DMSState


def compact_layers(cache: Cache, state: DMSState) -> None:
    """Replace the layers with gates of an empty DynamicCache, which a user gave or the model made; those that evict stay.

    Raises:
        ValueError: a cache whose layers do not grow (static, quantised), or one that was filled without decisions.
    """
    layers = cache.layers
    for index in (layer.index for layer in state.layers):
        while len(layers) <= index:
            layers.append(DynamicLayer())
        layer = layers[index]
        if isinstance(layer, MaskedLayer | CompactedLayer):
            continue
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"evict mode needs a DMSCache (or an empty DynamicCache), and layer {index} of the given cache is a {type(layer).__name__}; "
                "leave out cache_implementation, or pass past_key_values=DMSCache(model)"
            )
        if layer.get_seq_length() > 0:
            raise ValueError(
                f"the given cache holds {layer.get_seq_length()} tokens that were read without eviction; start evict mode with an empty cache"
            )
        layers[index] = CompactedLayer(state.config, state.page_size, kv_dtype=state.kv_dtype)

"""What a model's attention layers do in one pass, found by running the same model on tensors without storage.

Shapes: [B batch, H KV heads, T tokens, D head dim].
"""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from dms import hf_compat

_PROBE = "dms_probe"


@dataclass(frozen=True)
class LayerCalls:
    """One attention layer in one pass. num_calls: of the attention interface; the other numbers are those of its first call.

    cached_heads: KV heads that it wrote to its own layer of the cache, None: it has none there.
    """

    num_calls: int
    num_query_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    cached_heads: int | None


def probe(model: nn.Module) -> dict[str, LayerCalls] | None:
    """Layers that called transformers' attention interface, by module name; None where such a model does not run without storage.

    Takes milliseconds for each layer, whatever the model's size.
    """
    calls: dict[nn.Module, tuple] = {}
    times: Counter[nn.Module] = Counter()

    def note(module: nn.Module, query, key, value, attention_mask, **kwargs):
        times[module] += 1
        calls.setdefault(module, (query.shape, key.shape, value.shape))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    hf_compat.register_attention(_PROBE, note)
    dtype = torch.get_default_dtype()
    try:
        # Products of experts run without storage in bfloat16 alone.
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.no_grad():
            twin = type(model)(copy.deepcopy(model.config)).eval()
            twin.set_attn_implementation(_PROBE)
            # Some models look for padding in what they read, and there is nothing to read.
            for module in twin.modules():
                module.warn_if_padding_and_no_attention_mask = lambda *_: None
            cache = hf_compat.output_cache(twin(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True))
    except Exception:  # noqa: BLE001 - modelling files fail in their own ways where they ask tensors for values
        return None
    finally:
        torch.set_default_dtype(dtype)
    names = {module: name for name, module in twin.named_modules()}
    return {names[m]: LayerCalls(times[m], q[1], k[1], k[3], v[3], _cached_heads(cache, m)) for m, (q, k, v) in calls.items()}


def _cached_heads(cache, module: nn.Module) -> int | None:
    layers = getattr(cache, "layers", ())
    index = getattr(module, "layer_idx", None)
    keys = getattr(layers[index], "keys", None) if index is not None and index < len(layers) else None
    return None if keys is None or keys.dim() != 4 else keys.shape[1]

"""Passes through a model on the meta device, in which attention notes what it is asked for and computes nothing, and products are counted.

Letters: B batch, N new tokens, Hq query heads, H KV heads, D head dim.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from dms import hf_compat
from dms.costs.operators import ProductCounter
from dms.io.base_models import auto_classes

_NOTING = "dms_shapes"


@dataclass(frozen=True)
class RecordedCall:
    """What one attention layer was asked for; shapes [B, heads, tokens, D]."""

    layer: int
    query: torch.Size
    key: torch.Size
    value: torch.Size
    causal: bool
    window: int | None
    source: int | None
    """The layer, called before, whose keys it was given; None: its own."""


@dataclass(frozen=True)
class MetaPass:
    """What was seen in one pass."""

    counted: ProductCounter
    calls: list[RecordedCall]
    modules: list[nn.Module]
    """Whose calls they are."""
    cache: Cache | None
    """What the pass left in it; None: nothing is causal, and nothing cached."""

    @property
    def is_encoder(self) -> bool:
        return not any(call.causal for call in self.calls)


def build(config: PreTrainedConfig, headless: bool = False) -> Any:
    """A bfloat16 model without storage. headless: without what stands behind its last hidden states.

    Raises:
        ValueError: values in the configuration that do not go together.
    """
    from transformers import AutoModel

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        # It says how the files hold weights; what is analysed computes with them whole.
        del config.quantization_config
    hf_compat.mend_text_outputs()
    maker = AutoModel if headless else next(iter(auto_classes(config)), AutoModel)
    try:
        # Products of experts run without storage in bfloat16 alone.
        with torch.device("meta"):
            model = maker.from_config(config, dtype=torch.bfloat16).eval()
    except Exception as error:
        # Each modelling file has errors of its own for values that do not go together.
        raise ValueError(f"no {config.model_type} model can be built from this configuration: {type(error).__name__}: {error}") from error
    # Some models look for padding in what they read, and there is nothing to read.
    model.config.pad_token_id = None
    return model


def run(model: Any, num_tokens: int, cache: Cache | None = None) -> MetaPass:
    """Pass tokens through a model, after those in the cache.

    Raises:
        ValueError: a model that does not run without storage.
    """
    calls: list[RecordedCall] = []
    modules: list[nn.Module] = []
    keys: list[torch.Tensor] = []

    def note(module: nn.Module, query, key, value, attention_mask, **kwargs):
        given = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if given is None else given)
        place = getattr(module, "layer_idx", None)
        window = kwargs.get("sliding_window") or None
        layer = len(calls) if place is None else int(place)
        source = next((call.layer for call, known in zip(calls, keys, strict=True) if known is key), None)
        calls.append(RecordedCall(layer, query.shape, key.shape, value.shape, causal, window, source))
        modules.append(module)
        keys.append(key)
        B, Hq, N, _ = query.shape
        return query.new_empty(B, N, Hq, value.shape[-1]), None

    hf_compat.register_attention(_NOTING, note)
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if cache is not None:
        options |= hf_compat.cache_argument(model, cache)
    counted = ProductCounter(model)
    try:
        model.set_attn_implementation(_NOTING)
        with torch.no_grad(), hf_compat.unchecked_distributions(), counted:
            out = model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device="meta"), use_cache=True, **options)
    except Exception as error:
        # Modelling files fail in their own ways where they ask tensors for values.
        raise ValueError(
            f"{type(model).__name__} does not run on tensors without storage ({type(error).__name__}: {error}), which is how shapes are measured"
        ) from error
    keeps = any(call.causal for call in calls)
    return MetaPass(counted, calls, modules, hf_compat.output_cache(out) if keeps else None)

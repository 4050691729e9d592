"""Gates that borrow a channel of the queries (`DMSConfig.gate`): where it is read, and how it is kept out of attention.

The last channel of the first query head of each KV group is the gate's, after the query norm where a model has one and before rotation. A
forward hook on what makes the queries reads it there, which is before `cache.update`, and sets it to 0. Rotation turns channels in
pairs: under `borrowed` it is set to 0 once more in the attention function, under `borrowed_once` it is not. All of this holds in
every mode: the dense model of a borrowed gate is the model without these channels, and not the one that it was made from.

[P] section 3.1 (arXiv 2506.05345); after rotation as NVIDIA's code has it.

Shapes: B batch, T query tokens, Hq query heads, H KV heads, G = Hq / H, D head dim.
"""

import functools
from typing import Any

import torch
from torch import nn

from dms import hf_compat
from dms.attention import OF_THIS_CODE, take_decision
from dms.layer_discovery import AttentionLayer
from dms.modes import AttentionFunction, DMSState

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types whose attention layers make queries in a way that is known here."""


def borrow(state: DMSState, layer: AttentionLayer) -> None:
    """Attach the hook that reads and zeroes a layer's channels. The layer has a BorrowedGate and is of a known family."""
    query_source(layer).register_forward_hook(functools.partial(_read, state, layer))


def query_source(layer: AttentionLayer) -> nn.Module:
    """What the gate reads the output of: the query norm, else the query projection."""
    projection, norm, _ = hf_compat.query_modules(layer.module)
    return projection if norm is None else norm


def check_family(layer: AttentionLayer) -> None:
    """Raises ValueError for a model of another family."""
    family = getattr(getattr(layer.module, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"{layer.name} ({type(layer.module).__name__}) cannot have a borrowed gate: how it makes its queries is known for {', '.join(FAMILIES)}, and "
            f"this is of type {family!r}; choose dms.gate: linear"
        )


def query_projection(layer: AttentionLayer) -> Any:
    """The linear layer whose outputs `channels` are borrowed."""
    return hf_compat.query_modules(layer.module)[0]


def channels(layer: AttentionLayer) -> slice:
    """Which outputs of the query projection are borrowed, one for each KV head."""
    return _channels(layer.num_query_heads, layer.num_heads, hf_compat.query_modules(layer.module)[2])


def _channels(num_query_heads: int, num_heads: int, head_dim: int) -> slice:
    return slice(head_dim - 1, num_query_heads * head_dim, num_query_heads // num_heads * head_dim)


def _read(state: DMSState, layer: AttentionLayer, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Let the gate decide by its channel where a pass waits for it, and hand the queries on without it.

    output: of a projection [B, T, Hq * D or more], of a norm [B, T, Hq, D].
    """
    attention: Any = layer.module
    channel, output = take_channel(output, layer.num_query_heads, layer.num_heads, hf_compat.query_modules(attention)[2])
    waiting, attention.dms_waiting = getattr(attention, "dms_waiting", None), None
    if waiting is not None:
        forward, cache = waiting
        pending = forward.decide(state, layer, layer.gate, channel, cache)
        attention.dms_pending = functools.partial(attend_without, pending) if state.config.gate == "borrowed" else pending
    return output


def take_channel(output: torch.Tensor, num_query_heads: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the borrowed channel out of what makes the queries.

    output: of a projection [B, T, Hq * D or more], queries first, or of a norm [B, T, Hq, D].

    Returns:
        The channel [B, T, H], and a copy of `output` where it is 0.
    """
    if output.dim() == 3:
        borrowed: tuple = (..., _channels(num_query_heads, num_heads, head_dim))
    else:
        borrowed = (..., slice(None, None, num_query_heads // num_heads), -1)
    without = output.clone()
    # On fake tensors, with which plans are made, a number cannot be assigned.
    without[borrowed].zero_()
    return output[borrowed], without


def without_channel(query_BqTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Queries after rotation, with the borrowed channels 0."""
    query_BqTD = query_BqTD.clone()
    query_BqTD[:, :: query_BqTD.shape[1] // num_heads, :, -1].zero_()
    return query_BqTD


def attend_without(pending: AttentionFunction, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The attention function of a layer with gate `borrowed`: `pending`, of queries without the channels."""
    return pending(without_channel(query, key.shape[1]), key, value, **kwargs)


def register_dense(original: str) -> str:
    """Register `original` ("eager", "sdpa", ...) after the second zeroing, for dense mode under `borrowed`, and return its name."""
    name = f"dms_without_borrowed_over_{original}{OF_THIS_CODE}"

    def attention(module: Any, query, key, value, attention_mask, **kwargs):
        assert take_decision(module) is None, "in dense mode no gate decides"
        function = hf_compat.eager_attention(module) if original == "eager" else hf_compat.attention_function(original)
        return function(module, without_channel(query, key.shape[1]), key, value, attention_mask, **kwargs)

    hf_compat.register_attention(name, attention, mask=original)
    return name

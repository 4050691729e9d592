"""Random models to measure, and gates that evict a given share of tokens, unevenly over heads as trained ones do.

Shapes: L layers, H KV heads, K windows.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

import dms
from dms import hf_compat
from dms.attention import evict_pass
from dms.gates import Gate
from dms.modes import set_mode, state_of

# Tokens that the gates' logits are sampled over; each sequence is no longer than the window, so that nothing is hidden yet.
_NUM_SAMPLES = 1024
# Log-normal: a few heads keep nearly everything, many keep little.
_SPREAD = 2.0
_MOST_KEPT = 0.97
LEAST_EVICTED, MOST_EVICTED = 0.5, 0.99


def keep_shares(num_layers: int, num_heads: int, evicted: float, seed: int) -> torch.Tensor:
    """Share of the tokens that each head keeps, [L, H]: 1 - evicted on average, nothing in one head of eight, nearly all in a few.

    Raises:
        ValueError: a share that such heads cannot have.
    """
    if not LEAST_EVICTED <= evicted <= MOST_EVICTED:
        raise ValueError(f"evicted is {evicted}; give a share from {LEAST_EVICTED} to {MOST_EVICTED}")
    total = num_layers * num_heads
    raw = torch.randn(total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(_SPREAD).exp()
    raw[raw.argsort()[: max(1, total // 8)]] = 0.0
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (raw * middle).clamp(max=_MOST_KEPT).mean() < 1 - evicted else (low, middle)
    return (raw * low).clamp(max=_MOST_KEPT).float().view(num_layers, num_heads)


def keep_by_window(keep_LH: torch.Tensor, num_windows: int) -> torch.Tensor:
    """What each decision keeps, [L, H, K], so that heads keep their shares for good: of the rest half as much goes by each window as by the
    one before. With windows of which each is four times the one before, about as many entries are alive as with the middle one alone."""
    goes = 0.5 ** torch.arange(num_windows, dtype=torch.float32)
    stays = 1 - goes.cumsum(0) / goes.sum()
    return keep_LH[..., None] + (1 - keep_LH[..., None]) * stays


@torch.no_grad()
def evict_shares(model: nn.Module, keep_LH: torch.Tensor, seed: int) -> None:
    """Set the gates of a retrofitted model so that each head keeps its share of random tokens. It is in evict mode after."""
    state, config = state_of(model), model.config
    assert isinstance(config, PreTrainedConfig)
    set_mode(model, "evict")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    K = len(state.config.windows)
    gates: dict[int, Gate] = {}
    for layer in state.layers:
        gate = layer.module.dms_gate
        assert isinstance(gate, Gate)
        H, M = gate.weight.shape[0] // K, gate.weight.shape[1]
        # The decisions of a token differ in their bias alone: what one evicts, those of later windows evict too.
        gate.weight.copy_(torch.randn(H, M, generator=generator).div(M**0.5).repeat_interleave(K, 0))
        gate.weight.requires_grad_(False)
        gates[layer.index] = gate
    length = min(state.config.windows[0], _NUM_SAMPLES)
    ids = torch.randint(config.get_text_config().vocab_size, (_NUM_SAMPLES // length, length), generator=generator).to(device)
    state.decoder(input_ids=ids, use_cache=False)
    passed = evict_pass(model)
    for layer, keep_HK in zip(state.layers, keep_by_window(keep_LH, K).to(device), strict=True):
        keep_H, logits = keep_HK.flatten(), passed.logits[layer.index].flatten(0, 1).flatten(1).sort(0).values
        least = logits.gather(0, (keep_H * len(logits)).long().clamp(max=len(logits) - 1)[None])[0]
        # A head that keeps nothing must not keep a token beyond the sample either.
        least = torch.where(keep_H > 0, least, logits[0] - 100 * state.config.scale)
        gates[layer.index].bias.copy_(-least / state.config.scale).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class RandomLlama:
    """By default of 0.5 billion parameters: the attention of a model of 1 billion, half as deep, so that it fits beside its caches."""

    hidden: int = 2048
    mlp: int = 5632
    layers: int = 8
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 32000
    page_size: int = 64

    def __str__(self) -> str:
        return (
            f"random Llama: hidden {self.hidden}, MLP {self.mlp}, {self.layers} layers, {self.query_heads} query and {self.kv_heads} KV heads "
            f"of {self.head_dim}, vocabulary {self.vocabulary}; pages of {self.page_size}"
        )


DEFAULT = RandomLlama()
# Small enough for a test.
QUICK = RandomLlama(hidden=64, mlp=96, layers=2, query_heads=4, kv_heads=2, head_dim=16, vocabulary=97, page_size=16)


def build_model(shape: RandomLlama, seed: int, device: torch.device) -> LlamaForCausalLM:
    """Random float32 weights, SDPA attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2**20,
    )
    hf_compat.set_attention(config, "sdpa")
    with device:
        return LlamaForCausalLM(config).eval().requires_grad_(False)


_M = TypeVar("_M", bound=nn.Module)


def share_weights(model: _M) -> _M:
    """A second model over the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_gates(model: LlamaForCausalLM, window: int | tuple[int, ...], keep_LH: torch.Tensor, seed: int) -> LlamaForCausalLM:
    """The model retrofitted, over the same weights, in evict mode: each head's gate keeps its share of random tokens."""
    gated = share_weights(model)
    dms.retrofit(gated, dms.DMSConfig(window=window))
    evict_shares(gated, keep_LH, seed)
    return gated


def evicting_model(shape: RandomLlama, window: int | tuple[int, ...], evicted: float, seed: int, device: torch.device) -> LlamaForCausalLM:
    """A random model in evict mode whose gates evict a given share of tokens."""
    model = with_gates(build_model(shape, seed, device), window, keep_shares(shape.layers, shape.kv_heads, evicted, seed), seed)
    state_of(model).page_size = shape.page_size
    return model


def qwen3_8b() -> dict[str, Any]:
    """Qwen3-8B's configuration, as it is published."""
    return json.loads(Path(__file__).with_name("Qwen3-8B.json").read_text(encoding="utf-8"))

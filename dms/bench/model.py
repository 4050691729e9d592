"""What is measured: a random Llama, plain and with gates that evict a given share of tokens, unevenly over its heads."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dms
from dms.bench.gating import evict_shares


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama of 0.5 billion parameters: the attention of a model of 1 billion, half as deep, so that it fits beside its caches."""

    hidden: int = 2048
    mlp: int = 5632
    layers: int = 8
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 32000
    window: int = 256
    page_size: int = 64

    def __str__(self) -> str:
        return (
            f"random Llama: hidden {self.hidden}, MLP {self.mlp}, {self.layers} layers, {self.query_heads} query and {self.kv_heads} KV heads "
            f"of {self.head_dim}, vocabulary {self.vocabulary}; window {self.window}, pages of {self.page_size}"
        )


DEFAULT = Shape()
# Small enough for a test.
QUICK = Shape(hidden=64, mlp=96, layers=2, query_heads=4, kv_heads=2, head_dim=16, vocabulary=97, window=32, page_size=16)


def build_model(shape: Shape, seed: int, device: torch.device) -> LlamaForCausalLM:
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
        attn_implementation="sdpa",
    )
    with device:
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def share_weights(model: nn.Module) -> nn.Module:
    """A second model over the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_gates(model: LlamaForCausalLM, shape: Shape, keep_LH: torch.Tensor, seed: int) -> LlamaForCausalLM:
    """The model retrofitted, over the same weights, in evict mode: each head's gate keeps its share of random tokens."""
    gated = dms.retrofit(share_weights(model), dms.DMSConfig(window=shape.window))
    evict_shares(gated, keep_LH, seed)
    return gated

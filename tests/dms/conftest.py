"""Tiny random models of many families, and gates that evict about half: what the tests of dms share, as fixtures."""

import os
from dataclasses import fields

# Where AMX is advertised but unusable, a bfloat16 matmul dies with SIGILL; read by oneDNN at its first use.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dms
from dms import hf_compat
from dms.retrofitting import gate_parameters

_METHOD = {f.name for f in fields(dms.DMSConfig)}
_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # A tied random head only repeats its input.
    "tie_word_embeddings": False,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Shorter than the tests' sequences, so that it matters.
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# The last two of four layers attend to the keys and values of the last ones before them of their kind.
_FOLLOWING = _GQA | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
_FAMILIES = {
    "llama": _GQA,
    "mistral": _GQA | {"sliding_window": None},
    "qwen2": _GQA,
    "qwen3": _GQA,
    "qwen3_moe": _GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma2": _GQA | _SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3_text": _GQA | _SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3n_text": _FOLLOWING
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "laurel_rank": 8}
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": _FOLLOWING | {"layer_types": ["full_attention"] * 4, "global_head_dim": 16},
    "phi3": _GQA,
    "olmo2": _GQA,
    "gpt_oss": _GQA | _SLIDING | _EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt_neox": {},
    "starcoder2": _GQA,
    "cohere": _GQA,
    "cohere2": _GQA | _SLIDING,
    "exaone4": _GQA | _SLIDING,
    "gpt2": {},
    "granite": _GQA,
    "lfm2": _GQA | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96},
    "minimax": _GQA | _EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "mixtral": _GQA | _EXPERTS | {"sliding_window": None},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": _GQA,
    "qwen3_next": _GQA
    | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "stablelm": _GQA,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build_model():
    """`build_model(family, **config)`: a random float32 model with its default attention, in eval mode; weights large enough to
    give logits of a few units."""

    def build(family: str, seed: int = 0, **overrides):
        config = AutoConfig.for_model(family, **(_COMMON | _FAMILIES[family] | overrides))
        model = AutoModelForCausalLM.from_config(config).eval()
        # As load_base does: 5.17 chooses sdpa for gemma2, which leaves its cap out.
        hf_compat.use_capped_attention(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.12, generator=generator)
        return model

    return build


@pytest.fixture(scope="session")
def open_gates():
    """`open_gates(model)`: random gates, so that about half of the tokens are evicted and heads differ."""

    def randomise(model, seed: int = 1, std: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in gate_parameters(model).items():
                parameter.normal_(0, std if name.endswith("weight") else 0.1, generator=generator)
        return model

    return randomise


@pytest.fixture(scope="session")
def build_gated(build_model, open_gates):
    """`build_gated(family, window=4, ...)`: a retrofitted model with open gates; what is no field of DMSConfig goes to the model's."""

    def build(family: str = "llama", **options):
        fields = {"window": 4, "scale": 1.0, "offset": 0.0}
        fields |= {name: options.pop(name) for name in list(options) if name in _METHOD}
        return open_gates(dms.retrofit(build_model(family, **options), dms.DMSConfig(**fields)))

    return build


@pytest.fixture(scope="session")
def make_batch():
    """`make_batch(3, 20, left=[0, 5, 2])`: random ids with padding; input_ids, attention_mask, position_ids [B, T]."""

    def make(batch: int, length: int, left=None, right=None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, 97, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(batch):
            mask[row, : (left or [0] * batch)[row]] = 0
            mask[row, length - (right or [0] * batch)[row] :] = 0
        position = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": position}

    return make

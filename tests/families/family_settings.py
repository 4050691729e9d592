"""What the general rule of `tiny_models` cannot know of a family, and the unusual settings of families that are swept as well."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A family in one setting."""

    model_type: str
    cls: str
    """The class of transformers that is built."""
    variant: str = "default"
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the text decoder's configuration."""

    @property
    def name(self) -> str:
        return f"{self.model_type}:{self.cls}:{self.variant}"


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = _ROPE | {"mrope_section": [2, 3, 3]}


def _each(settings: dict[str, Any], *model_types: str) -> dict[str, dict[str, Any]]:
    """The same settings for several families."""
    return dict.fromkeys(model_types, settings)


def _alternating(*kinds: str):
    """Kinds of layers by turns, for as many layers as there are."""
    return lambda num_layers: [kinds[i % len(kinds)] for i in range(num_layers)]


_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}

# Fields by the model type of the configuration that has them, wherever it is nested. A function is given the number of layers.
OVERRIDES: dict[str, dict[str, Any]] = {
    # Rotary sections of a head's width, and parameters that only checkpoints bring.
    **_each(
        {"rope_parameters": _MROPE},
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text"),
        *("cosmos3_edge_text", "cosmos3_omni_text", "paddleocr_vl_text", "qwen3_5_text", "qwen3_5_moe_text", "hunyuan_vl_text"),
    ),
    **_each({"rope_parameters": _MROPE, "head_dim": 16}, "glm4v_text", "glm_ocr_text", "glm46v_text"),
    "glm4v_moe_text": {"rope_parameters": _MROPE | {"partial_rotary_factor": 1.0}, "head_dim": 16},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE},
        "layer_types": _alternating("sliding_attention", "full_attention"),
    },
    "hy_v4_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}, "qk_rope_head_dim": 8},
    # No default for what their layers are.
    "lfm2": {"layer_types": _alternating("conv", "full_attention"), "block_auto_adjust_ff_dim": False},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": _alternating("linear_attention", "full_attention")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "laguna": {"layer_types": _alternating("sliding_attention", "full_attention")},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 2},
    "lfm2_moe": {"layer_types": _alternating("conv", "full_attention")},
    "deepseek_ocr2_text": {"mlp_layer_types": _alternating("dense", "sparse"), "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (16, 48)},
    "step3p5": {"sliding_window": 8},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101}},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, "<|visual token 000001|>": 102}},
    "kosmos_2_text_model": {"layers": 2},
    "kosmos_2_5_text_model": {"layers": 2},
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit", **_TOWER},
        "decoder": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    },
    # Its own vision tower is of the package timm.
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model", **_TOWER}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            **_TOWER,
            "num_key_value_heads": 2,
        }
    },
    "apertus1p5": {"image_token_offset": 32, "audio_token_offset": 64},
    # Numbers that must agree with each other.
    "wavtokenizer_encoder": {"codebook_dim": 64},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "radio": {"video_temporal_patch_size": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "nemotron_h": {"n_groups": 2},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "nemotron": {"partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
    "florence_vision": {"embed_dim": [16, 16, 32, 64], "num_heads": [1, 1, 2, 4], "num_groups": [1, 1, 2, 4], "depths": [1, 1, 1, 1]},
    "longcat_flash": {"zero_expert_num": 2},
}

_SLIDING_LATER = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3, "layer_types": None}
_NO_SLIDING = {"no sliding window": {"sliding_window": None}}
_SLIDING = {"sliding window everywhere": {"sliding_window": 8}}
_DECODER = {"as a decoder": {"is_decoder": True}, "with cross-attention": {"is_decoder": True, "add_cross_attention": True}}
_FULL = {"full attention everywhere": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}}
_EQUAL_WIDTHS = {"keys and values of one width": {"v_head_dim": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}}
_LONGROPE = {
    "long rope": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        },
    }
}
_SHARED_KV = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 4,
}

# Unusual settings, by model type: name -> fields of the text decoder's configuration.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    **_each(
        _DECODER,
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
        *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    ),
    "llama": {
        "3 heads, 1 KV head": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
        "a KV head for each head": {"num_key_value_heads": 4},
        "wide heads": {"head_dim": 24},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied embeddings": {"tie_word_embeddings": True},
        "dynamic rope": {"rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
        "yarn": {"rope_parameters": _ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    },
    "qwen3": {
        "5 heads, 1 KV head, no divisor of the width": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12},
        "sliding window in later layers": _SLIDING_LATER,
    },
    "qwen2": {
        "7 heads, 1 KV head": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56},
        "sliding window in later layers": _SLIDING_LATER,
    },
    "mistral": _NO_SLIDING | {"wide heads, no sliding window": {"sliding_window": None, "head_dim": 24}},
    "mistral3": _NO_SLIDING,
    "idefics2": _NO_SLIDING,
    "moshi": {"a long sliding window": {"sliding_window": 500}},
    "ministral": _FULL,
    "mixtral": _SLIDING,
    "starcoder2": _SLIDING,
    "phi3": _SLIDING | _LONGROPE,
    "phi": {"norms of queries and keys": {"qk_layernorm": True}, "rotary in full": {"partial_rotary_factor": 1.0}},
    "stablelm": {"parallel, with norms and biases": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}},
    "gemma2": {"low caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}}
    | {"sliding window everywhere": {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}},
    "gemma3_text": {"caps": {"attn_logit_softcapping": 2.0}, "both ways": {"use_bidirectional_attention": True}},
    "gemma3n_text": {"shared KV": _SHARED_KV},
    "gemma4_text": {
        "shared KV": _SHARED_KV,
        "shared KV, full attention everywhere": _SHARED_KV | {"layer_types": ["full_attention"] * 8},
        "keys are values, 1 wide KV head in full layers": {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "global_head_dim": 32,
        },
        "both ways": {"use_bidirectional_attention": "all"},
    },
    "gemma4": {"shared KV": _SHARED_KV},
    "gemma3n": {"shared KV": _SHARED_KV},
    "gpt_oss": _FULL,
    "exaone4": {"no sliding window": {"sliding_window": None, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}},
    "cohere2": _FULL,
    "falcon": {
        "new decoder, 2 KV heads": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "a KV head for each head": {"multi_query": False},
        "ALiBi": {"alibi": True},
    },
    "gpt_bigcode": {"a KV head for each head": {"multi_query": False}},
    "opt": {"norm after attention, narrow embeddings": {"do_layer_norm_before": False, "word_embed_proj_dim": 32}},
    "gpt_neox": {"one after the other": {"use_parallel_residual": False}, "no biases": {"attention_bias": False}},
    "gpt_neo": {"global attention everywhere": {"attention_types": [[["global"], 2]], "num_layers": 2}},
    "gpt2": {
        "scores by layer": {"scale_attn_by_inverse_layer_idx": True},
        "upcast": {"reorder_and_upcast_attn": True},
        "with cross-attention": {"add_cross_attention": True},
    },
    "olmo": {"clipped": {"clip_qkv": 0.5}},
    "olmoe": {"clipped": {"clip_qkv": 0.5}},
    "granite": {"multipliers": {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5}},
    **_each(_EQUAL_WIDTHS, "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3", "longcat_flash", "axk1", "mistral4"),
    "kimi_linear": _EQUAL_WIDTHS,
    "llama4_text": {
        "temperature of long texts": {"attn_temperature_tuning": True, "floor_scale": 8, "attn_scale": 0.5},
        "full attention everywhere": {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4},
    },
    "lfm2": _FULL,
    "qwen3_next": {"linear attention everywhere": {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}} | _FULL,
    "minimax": _FULL,
    "minimax_m3_vl_text": {"sparse layers": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "num_hidden_layers": 4}},
    "laguna": {
        "heads that differ by layer": {
            "num_hidden_layers": 2,
            "num_attention_heads_per_layer": [4, 8],
            "layer_types": ["full_attention"] * 2,
        },
        "sliding window": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    },
    "step3p7": {"sliding window": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}},
    "mistral_large4": {"shared KV": {"num_hidden_layers": 4, "kv_source_layers": [0, 0, 2, 2], "layer_types": ["full_attention"] * 4}},
    "dory": {"one loop": {"n_recurrent_loops": 1}, "last loop cached": {"recurrent_kv_cache_mode": "last_loop"}},
    "hrm_text": {"one cycle": {"H_cycles": 1, "L_cycles": 1}},
    "zamba2": {"two shared blocks with adapters": {"num_mem_blocks": 2, "use_shared_attention_adapter": True}},
    "mllama": {"cross-attention among the layers": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "doge": {"no window of its own": {"keep_window_size": 4096}},
    "smollm3": {"no rotary anywhere": {"no_rope_layers": [0, 0], "num_hidden_layers": 2}},
}


def cases(names: list[tuple[str, str]]) -> list[Case]:
    """Every family in its default setting and in those of the table."""
    found = []
    for model_type, cls in names:
        found.append(Case(model_type, cls))
        found += [Case(model_type, cls, variant, changes) for variant, changes in VARIANTS.get(model_type, {}).items()]
    return found

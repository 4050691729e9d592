"""A tiny random model of any family that transformers registers: its default configuration, shrunk by the names of its fields."""

import copy
import dataclasses
import re
from typing import Any

import torch
import transformers
from family_settings import OVERRIDES
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dms import hf_compat

VOCABULARY = 128
# Text is of the tokens from 2 to here; images and the like have numbers above.
LAST_TEXT_TOKEN = 96
WINDOW = 8
MAX_LAYERS = 8

_COUNT_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks")
KEEP = object()
# By the whole of a field's name; the first that fits, where the default is a number. KEEP: as it is.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"pad_token_id|padding_idx", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|forced_.*|(begin_)?suppress_tokens", None),
    (r"type_vocab_size", 2),
    (r".*vocab_size|.*_vocab|vocab_size_.*|decoder_vocab_size", VOCABULARY),
    (r"(.*_)?num_key_value_heads|num_kv_heads|multi_query_group_num|n_kv_heads|kv_n_heads|num_query_groups", 2),
    (r"(.*_)?num_attention_heads|(.*_)?attention_heads|(.*_)?num_heads|n_heads?|resampler_n_heads", 4),
    (r"(.*_)?head_dim|attention_head_(dim|size)|d_kv|d_head|dim_head|resampler_(dim_head|head_dim)|kv_channels", 16),
    (r"|".join(_COUNT_OF_LAYERS) + r"|encoder_layers|num_encoder_layers|(.*_)?depth|(.*_)num_hidden_layers", 2),
    (r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length|max_target_positions", 512),
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|local_attention|keep_window_size|window_size", WINDOW),
    (r"local_attention_window_len", 64),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim", 16),
    (r".*lora_rank|router_hidden_size|.*_rank|d_rel", 16),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(n|num|moe)_(routed_|local_|num_)?experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_groups", 1),
    (r"index_n_heads", 2),
    (r"index_topk", 16),
    (r"(mamba_d_state|ssm_state_size|state_size)", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"chunk_size|mamba_chunk_size|block_size|chunkwise_kernel_chunk", 16),
    (r"image_size|crop_size", 32),
    (r"patch_size", 16),
    (r"codebook_size", 32),
    (r"query_pre_attn_scalar", 16),
    (r"rel_extent", 64),
    (r"num_filters|base_channels|latent_channels", 32),
    (
        r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|projection_dim|emb_dim|embedding_dim|embedding_size|proj_dim|width"
        r"|output_dim|d_ssm|hidden_act_dim|model_dim)(_.*)?",
        64,
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|dff|dim_ff|mlp_dim|d_inner|n_inner|expert_dim|feed_forward_size|ffn_size|block_ff_dim)(_.*)?",
        96,
    ),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _RULES)
_TOKEN = re.compile(r".*token_(id|index)|.*_token|.*_(index|id)")


def names() -> list[tuple[str, str]]:
    """(model type, class) of every causal LM and every model of images and text that transformers registers."""
    found = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()) | set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())
    return sorted((model_type, cls if isinstance(cls, str) else cls[0]) for model_type, cls in found)


def make_config(kind: type, changes: dict[str, Any]) -> Any:
    """The family's configuration, small. changes: fields of the text decoder's configuration."""
    default = _instance(kind)
    text = _text_name(default)
    wanted = _kinds_of_layers(default if text is None else getattr(default, text))
    best = None
    for num_layers in [changes[name] for name in _COUNT_OF_LAYERS if name in changes] or range(2, MAX_LAYERS + 1):
        config = _small(default, num_layers, text, changes)
        found = _kinds_of_layers(config if text is None else getattr(config, text))
        if best is None or len(found) > best[0]:
            best = len(found), config
        if found >= wanted:
            break
    assert best is not None
    return best[1]


def _instance(kind: type) -> Any:
    """A family's default configuration. Some have none: then with our overrides."""
    try:
        return kind()
    except Exception:  # noqa: BLE001 - each family validates in its own way
        return kind(**copy.deepcopy(OVERRIDES.get(kind.model_type, {})))


def _text_name(config: Any) -> str | None:
    """The field of the text decoder's configuration; None: it is the configuration itself."""
    text = config.get_text_config(decoder=True)
    return None if text is config else next((name for name in config.sub_configs if getattr(config, name, None) is text), None)


def _kinds_of_layers(text: Any) -> set[Any]:
    """What the lists of a configuration say that some layer is."""
    count = next((getattr(text, name) for name in _COUNT_OF_LAYERS if isinstance(vars(text).get(name), int)), None)
    return {
        (name, value)
        for name, values in vars(text).items()
        if isinstance(values, list | tuple) and len(values) == count
        for value in values
        if isinstance(value, str | int)
    }


def _small(default: Any, num_layers: int, text: str | None, changes: dict[str, Any]) -> Any:
    kind = type(default)
    values: dict[str, Any] = {}
    special = iter(range(LAST_TEXT_TOKEN + 4, VOCABULARY))
    own_layers = num_layers if text is None else 2
    for field in dataclasses.fields(kind):
        name = field.name
        value = field.default if field.default is not dataclasses.MISSING else None
        if name in kind.sub_configs:
            inner = getattr(default, name, None)
            if inner is not None:
                values[name] = _small(inner, num_layers if name == text else 2, None, changes if name == text else {})
        elif name in _COUNT_OF_LAYERS and isinstance(value, int):
            values[name] = own_layers
        elif name == "head_dim" and value is None:
            values[name] = 16
        elif name == "tie_word_embeddings":
            # A tied random head only repeats its input.
            values[name] = False
        elif isinstance(value, bool) or not isinstance(value, int | list | tuple):
            continue
        elif (rule := next((v for pattern, v in _COMPILED if pattern.fullmatch(name)), KEEP)) is not KEEP:
            if isinstance(value, int) or rule is None:
                values[name] = rule
        elif _TOKEN.fullmatch(name) and isinstance(value, int) and value >= LAST_TEXT_TOKEN:
            values[name] = next(special)
    if "kv_lora_rank" in values:
        # Latent attention has a key of its own for each query head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    # Configurations take what they are given apart.
    own = copy.deepcopy(OVERRIDES.get(kind.model_type, {}))
    return kind(
        **{**values, **{k: v(own_layers) if callable(v) else v for k, v in own.items()}, **(copy.deepcopy(changes) if text is None else {})}
    )


def make_model(model_type: str, cls: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """A random float32 model in eval mode, with weights large enough to give logits of a few units."""
    own = getattr(transformers, cls)
    try:
        config = make_config(CONFIG_MAPPING[model_type], changes)
    except Exception:
        # The whole has no default configuration, but the decoder has.
        if own.config_class is CONFIG_MAPPING[model_type]:
            raise
        config = make_config(own.config_class, changes)
    # Some classes are the decoders alone of what their model type names.
    inner = next((getattr(config, name) for name in config.sub_configs if type(getattr(config, name, None)) is own.config_class), None)
    torch.manual_seed(seed)
    model = own._from_config(config if inner is None else inner, dtype=torch.float32).eval()
    # As load_base does: 5.17 chooses sdpa for gemma2, which leaves its cap out.
    hf_compat.use_capped_attention(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.12, generator=generator)
            elif name.endswith("bias") and parameter.dim() == 1:
                parameter.normal_(0, 0.05, generator=generator)
    return model

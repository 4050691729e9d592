"""Tiny random multimodal models, saved with the embedded model's tokenizer, as released ones lie in their folders."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

_COMMON = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "patch_size": 14}
_QWEN_TOKENS = {"image_token_id": 2040, "video_token_id": 2041, "vision_start_token_id": 2042, "vision_end_token_id": 2043}
# Of the 8 pairs of 16 dimensions, those that turn with time, height and width.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


class Wrapper(NamedTuple):
    """A class with a text decoder inside, and its configuration."""

    name: str
    text: dict[str, Any]
    """What its text decoder has of its own."""
    rest: dict[str, Any]
    layers: tuple[int, int]
    """How many have gates, of how many."""


WRAPPERS = {
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "sliding_window": None},
        {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 16}, "image_token_index": 2040},
        (2, 2),
    ),
    "qwen2_5_vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration",
        _MROPE,
        {"vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]}, **_QWEN_TOKENS},
        (2, 2),
    ),
    "qwen3_vl": Wrapper(
        "Qwen3VLForConditionalGeneration",
        {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_interleaved": True}},
        {"vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **_QWEN_TOKENS},
        (2, 2),
    ),
    "llava": Wrapper(
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        {"vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 2040, "vision_feature_layer": -1},
        (2, 2),
    ),
    "llama4": Wrapper(
        "Llama4ForConditionalGeneration",
        # Three layers attend within a chunk; the fourth, without positions, to everything.
        {"num_hidden_layers": 4, "attention_chunk_size": 16, "intermediate_size_mlp": 96, "num_local_experts": 2}
        | {"num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {
            "vision_config": VISION
            | {"intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32}
            | {"projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
            "image_token_index": 2040,
        },
        (1, 4),
    ),
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration",
        _HYBRID | {"query_pre_attn_scalar": 16},
        {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 2040} | {"boi_token_index": 2041, "eoi_token_index": 2042},
        (1, 2),
    ),
    "mllama": Wrapper(
        "MllamaForConditionalGeneration",
        # The middle layer attends to images; text alone passes it by.
        {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        {
            "vision_config": VISION | {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64},
            # Of the eight rows that its embeddings have more than its head.
            "image_token_index": 2048,
        },
        (2, 3),
    ),
}
# What processors are made from; their values are read by transformers' processors alone.
PROCESSOR = {"preprocessor_config.json": {"image_mean": [0.5] * 3}, "processor_config.json": {"processor_class": "Processor"}}


def wrapper_config(model_type: str) -> Any:
    """As a released model's folder has it."""
    from transformers import AutoConfig

    name, text, rest, _ = WRAPPERS[model_type]
    own = AutoConfig.for_model(model_type).get_text_config().model_type
    config = AutoConfig.for_model(model_type, text_config={"model_type": own} | _COMMON | text, **rest, architectures=[name])
    # A tied head only repeats its input.
    config.tie_word_embeddings = False
    return config


def build_wrapper(model_type: str, seed: int = 0) -> Any:
    """A random float32 model in eval mode; weights large enough to give logits of a few units."""
    import transformers

    model = getattr(transformers, WRAPPERS[model_type].name)(wrapper_config(model_type)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12, generator=generator)
            elif "cross_attn" in name and name.endswith("gate"):
                # New models are closed to images.
                parameter.fill_(1.0)
    return model


def write_wrapper(model_type: str, folder: str | Path) -> Path:
    """A model's folder, in float16, with tokenizer and processor files."""
    from dms.io import base_models

    folder = Path(folder)
    build_wrapper(model_type).half().save_pretrained(folder)
    base_models.load_tokenizer("builtin:tiny").save_pretrained(folder)
    for name, values in PROCESSOR.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def image_inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a processor makes of a text with one image of 28 x 28, for LLaVA, Llama 4, Gemma 3, Qwen2.5-VL and Mllama."""
    config = model.config
    generator = torch.Generator().manual_seed(5)
    num_tokens = {"llava": 4, "llama4": 1, "gemma3": 4, "qwen2_5_vl": 4, "mllama": 1}[config.model_type]
    image = [getattr(config, "image_token_id", None) or config.image_token_index] * num_tokens
    ids = torch.tensor([[7, 2042, *image, *range(8, 20)]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    marks = (ids == image[0]).long()
    if config.model_type == "gemma3":
        given["token_type_ids"] = marks
    if config.model_type == "qwen2_5_vl":
        # 4 x 4 patches, of which 2 x 2 are merged; each of two frames of 14 x 14 in three colours.
        given["pixel_values"] = torch.randn(16, 1176, generator=generator)
        given |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": marks}
    if config.model_type == "mllama":
        # One tile of the four that an image may have.
        given["pixel_values"] = torch.randn(1, 1, 4, 3, 28, 28, generator=generator)
        tiles = torch.tensor([[[1, 0, 0, 0]]])
        given |= {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": tiles}
        given["cross_attention_mask"] = tiles[:, None].expand(1, ids.shape[1], 1, 4).clone()
    return given

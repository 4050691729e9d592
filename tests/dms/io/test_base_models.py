"""Bases that cannot be retrofitted yet are named as such from their configuration, before their weights are read."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dms
from dms.io import base_models

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# As released models say it: (model_type, class, what stands for the text)
INSIDE = {
    "mistral3": ("Mistral3ForConditionalGeneration", {"model_type": "mistral"}, "such as one of type mistral"),
    "llava": ("LlavaForConditionalGeneration", {"model_type": "llama"}, "such as one of type llama"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {}, "a text-only model of its family"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {}, "a text-only model of its family"),
}


@pytest.fixture
def write_config(tmp_path):
    """`write_config(model_type=..., ...)`: a folder with that configuration and no weights."""

    def write(**values):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "config.json").write_text(json.dumps(values))
        return str(tmp_path / "base")

    return write


@pytest.mark.parametrize("family", INSIDE)
def test_a_text_decoder_inside_another_class(family, write_config):
    name, text, advice = INSIDE[family]
    folder = write_config(model_type=family, architectures=[name], text_config=TEXT | text, vision_config=VISION)
    for read in (base_models.load_config, base_models.load_base):
        with pytest.raises(ValueError) as caught:
            read(folder)
        said = str(caught.value)
        assert f"is not supported yet: its text decoder stands inside {name}" in said and advice in said and "\n" not in said


def test_other_models_that_do_not_continue_text(write_config):
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder; choose a decoder"):
        base_models.load_base(write_config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True))
    with pytest.raises(ValueError, match=r"a model of type vit is no model that continues text"):
        base_models.load_base(write_config(model_type="vit"))
    with pytest.raises(ValueError, match=r"model .* cannot be loaded: .*model type `nobody`"):
        base_models.load_base(write_config(model_type="nobody"))


def test_a_wrapper_that_transformers_loads_still_works(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3", text_config=TEXT | {"layer_types": ["sliding_attention", "full_attention"]}, vision_config=VISION, mm_tokens_per_image=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = base_models.load_base(str(tmp_path / "base"), device="cpu")
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert dms.retrofit(model, dms.DMSConfig(window=4)).dms.decoder_is_inside

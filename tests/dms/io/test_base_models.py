"""Bases that cannot be retrofitted yet are named as such from their configuration, before their weights are read."""

import json

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from wrappers import WRAPPERS, wrapper_config

import dms
from dms.io import base_models

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def write_config(tmp_path):
    """`write_config(model_type=..., ...)`: a folder with that configuration and no weights."""

    def write(**values):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "config.json").write_text(json.dumps(values))
        return str(tmp_path / "base")

    return write


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_text_decoder_inside_another_class_is_loaded_as_what_it_is(family, write_config):
    name = WRAPPERS[family].name
    config = base_models.load_config(write_config(**wrapper_config(family).to_dict()))
    classes = base_models.auto_classes(config)
    assert classes[base_models.auto_class(config)].__name__ == name
    assert base_models.auto_class(config) is (AutoModelForCausalLM if family == "gemma3" else AutoModelForMultimodalLM)
    assert [own.__name__ for own in classes.values()].count(name) == len(classes) - (family in ("llama4", "mllama"))


def test_the_class_that_a_configuration_names_is_loaded(write_config):
    # transformers would make a text model of each; without a name it does.
    for family, architectures, expected in (
        ("llama4", ["Llama4ForConditionalGeneration"], AutoModelForMultimodalLM),
        ("llama4", ["Llama4ForCausalLM"], AutoModelForCausalLM),
        ("llama4", None, AutoModelForCausalLM),
        ("llama4_text", ["Llama4ForCausalLM"], AutoModelForCausalLM),
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], AutoModelForMultimodalLM),
        ("qwen3", ["Qwen3ForCausalLM"], AutoModelForCausalLM),
    ):
        config = base_models.load_config(write_config(model_type=family, architectures=architectures))
        assert base_models.auto_class(config) is expected, (family, architectures)


def test_code_that_a_folder_brought_loads_that_folder_alone(write_config):
    class Remote(torch.nn.Module):
        __module__ = "transformers_modules.folder.modeling"

    config = base_models.load_config(write_config(model_type="qwen2_5_vl", architectures=["Remote"]))
    expected = base_models.auto_classes(config)
    # As transformers does where it runs a folder's code.
    AutoModelForCausalLM.register(type(config), Remote, exist_ok=True)
    try:
        assert base_models.auto_classes(config) == expected
    finally:
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(type(config), None)


def test_other_models_that_do_not_continue_text(write_config):
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder; choose a decoder"):
        base_models.load_base(write_config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True))
    for family in ("t5gemma2", "florence2"):
        with pytest.raises(ValueError, match=r"is not supported: a model of type \w+ is an encoder-decoder"):
            base_models.load_base(write_config(model_type=family))
    for family, own in (("clip", "CLIPModel"), ("vit", "ViTModel")):
        with pytest.raises(
            ValueError, match=rf"neither AutoModelForCausalLM nor AutoModelForMultimodalLM loads {own} \(model type '{family}'\)"
        ):
            base_models.load_base(write_config(model_type=family, architectures=[own]))
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

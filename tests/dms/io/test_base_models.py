"""Bases that cannot be retrofitted yet are named as such from their configuration, before their weights are read."""

import json

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from wrappers import WRAPPERS, wrapper_config

import dms
from dms.io import base_models
from dms.io.quantization import refuse_quantized

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}


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
    assert [own.__name__ for own in classes.values()].count(name) == len(classes) - (family == "llama4")


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
    with pytest.raises(ValueError, match=r"the text decoder of MllamaForConditionalGeneration reads images by cross attention"):
        base_models.load_base(write_config(model_type="mllama", architectures=["MllamaForConditionalGeneration"]))
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


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantised_configurations(method, write_config):
    folder = write_config(model_type="llama", quantization_config=QUANTIZED[method])
    with pytest.raises(ValueError, match=rf"the base is quantised \({method}\).*give the model that it was made from"):
        refuse_quantized(base_models.load_config(folder), "the base")


def test_a_quantised_model_gets_no_gates_and_is_not_saved(build_model, build_gated, tmp_path):
    base = build_model("llama")
    # A configuration is all that says it, whatever library holds the weights.
    base.config.quantization_config = QUANTIZED["bitsandbytes"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantised \(bitsandbytes\)"):
        dms.retrofit(base, dms.DMSConfig(window=4))
    assert not hasattr(base, "dms") and not any("dms_gate" in name for name, _ in base.named_modules())
    model = build_gated()
    model.config.quantization_config = QUANTIZED["fp8"]
    for save in (lambda: dms.save(model, tmp_path / "out", base_name="acme/base"), lambda: model.save_pretrained(tmp_path / "out")):
        with pytest.raises(ValueError, match=r"is quantised \(fp8\)"):
            save()
    assert not (tmp_path / "out").exists()

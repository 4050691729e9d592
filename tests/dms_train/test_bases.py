"""What a run cannot save at its end is refused before weights or data are read."""

import json
import shutil

import pytest
from dms_train import loop
from dms_train.recipe import RetrofitRecipe

METHODS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}


@pytest.fixture
def refusal(recipe_values, tiny_folder, tmp_path, monkeypatch):
    """`refusal(config)`: what a run says whose base has that configuration."""

    def refuse(config: dict) -> str:
        base = shutil.copytree(tiny_folder, tmp_path / "base")
        (base / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("dms.io.base_models.load_base", lambda *_, **__: pytest.fail("weights were read"))
        monkeypatch.setattr("dms_train.loop.open_data", lambda *_, **__: pytest.fail("data were read"))
        with pytest.raises(ValueError) as caught:
            loop.run(RetrofitRecipe.model_validate(recipe_values | {"model": str(base)}))
        assert f"model '{base}'" in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base(method, refusal, tiny_folder):
    said = refusal(json.loads((tiny_folder / "config.json").read_text()) | {"quantization_config": METHODS[method]})
    assert f"is quantised ({method})" in said and "give the model that it was made from" in said


def test_a_text_decoder_that_reads_images_by_cross_attention(refusal):
    said = refusal({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]})
    assert (
        "the text decoder of MllamaForConditionalGeneration reads images by cross attention" in said and "choose a text-only model" in said
    )

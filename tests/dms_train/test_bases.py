"""What a run cannot train on is refused before weights or data are read."""

import json
import shutil

import pytest
import torch
from dms_train import cache_teacher, loop
from dms_train.recipe import RetrofitRecipe
from safetensors.torch import load_file, save_file

METHODS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}


@pytest.fixture
def refusal(recipe_values, tiny_folder, tmp_path, monkeypatch):
    """`refusal(config)`: what a run says whose base has that configuration."""

    def refuse(config: dict, **changes) -> str:
        base = shutil.copytree(tiny_folder, tmp_path / "base", dirs_exist_ok=True)
        (base / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("dms.io.base_models.load_base", lambda *_, **__: pytest.fail("weights were read"))
        monkeypatch.setattr("dms_train.loop.open_data", lambda *_, **__: pytest.fail("data were read"))
        with pytest.raises(ValueError) as caught:
            loop.run(RetrofitRecipe.model_validate(recipe_values | {"model": str(base)} | changes))
        return str(caught.value)

    return refuse


@pytest.fixture
def installed(monkeypatch):
    """As if all packages that packed weights need were there."""
    monkeypatch.setattr("dms.io.quantization.find_spec", lambda name: object())


ALL = {"trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-4}}


@pytest.mark.parametrize("method", METHODS)
def test_packed_weights_do_not_train(method, refusal, tiny_folder, installed):
    said = refusal(json.loads((tiny_folder / "config.json").read_text()) | {"quantization_config": METHODS[method]}, **ALL)
    assert f"is quantised ({method}), and packed weights do not train: choose trainable=gates or gates+lora" in said


def test_packed_weights_are_not_packed_again(refusal, tiny_folder, installed):
    config = json.loads((tiny_folder / "config.json").read_text()) | {"quantization_config": METHODS["gptq"]}
    said = refusal(config, quantize="nf4")
    assert said.startswith("quantize is nf4, and the weights of ")
    assert said.endswith(" are quantised already (gptq); leave quantize out, and they stay as they are")


def test_a_package_that_is_missing(refusal, tiny_folder, monkeypatch):
    monkeypatch.setattr("dms.io.quantization.find_spec", lambda name: None if name == "bitsandbytes" else object())
    config = json.loads((tiny_folder / "config.json").read_text())
    assert "quantize: nf4 needs bitsandbytes, which is not installed; pip install 'dms-retrofit[quantized]'" in refusal(
        config, quantize="nf4"
    )
    said = refusal(config | {"quantization_config": METHODS["bitsandbytes"]})
    assert "a base in this format needs bitsandbytes" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU FP8 may stay packed")
def test_what_transformers_unpacks_here(recipe_values, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": METHODS["fp8"] | {"activation_scheme": "dynamic"}}
    (base / "config.json").write_text(json.dumps(config))
    cache = {"teacher_cache": {"path": str(tmp_path / "cache"), "top_k": 8}}
    for command, more in ((loop.run, {}), (cache_teacher.write, cache)):
        with pytest.raises(ValueError, match=r"is quantised \(fp8\), and transformers unpacks it on this machine.*save_pretrained"):
            command(RetrofitRecipe.model_validate(recipe_values | {"model": str(base)} | more))


@pytest.mark.parametrize("changes", [ALL, {"zero": {"stage": 2}}, {"zero": {"stage": 3}}])
def test_recipes_that_packed_weights_cannot_have(changes, recipe_values):
    with pytest.raises(ValueError, match=r"quantize is int8, and .*: choose (trainable=gates|zero.stage 0)"):
        RetrofitRecipe.model_validate(recipe_values | {"quantize": "int8"} | changes)

"""Packed weights: found, tried for gradients, loaded, written and loaded back; with bitsandbytes and torchao where they are installed."""

import json
import shutil

import packed_layers
import pytest
import torch
from packed_layers import pack

import dms
from dms.export.folder import export
from dms.io import base_models, checkpoint, quantization
from dms.io.quantization import check_gradients, load_options, packed_modules, packed_tensors, quant_method
from dms.io.weights import base_hash
from dms.modes import set_mode

CONFIGS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}
PACKAGE = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("method", CONFIGS)
def test_what_configurations_say(method, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": CONFIGS[method]}))
    config = base_models.load_config(str(tmp_path))
    assert quant_method(config) == method and quantization.is_packed(config) and not quantization.is_mxfp4(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = base_models.load_config(str(tmp_path))
    assert quant_method(config) is None and not quantization.is_packed(config) and load_options(config) == {}


def test_forms_that_cannot_be_had(build_model, monkeypatch):
    config = build_model("llama").config
    with pytest.raises(ValueError, match=r"quantize is 'nf5'; the forms are nf4, int8, torchao-int8, torchao-int4"):
        load_options(config, torch.float32, "nf5")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == "mslk" else object())
    with pytest.raises(ValueError, match=r"torchao-int4 needs a GPU and the package mslk \(.*\); or choose nf4"):
        load_options(config, torch.float32, "torchao-int4")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantize: torchao-int8 needs torchao and accelerate, which are not installed"):
        load_options(config, torch.float32, "torchao-int8")


def test_packed_modules_are_found(build_model):
    model = build_model("qwen2")
    assert packed_modules(model) == {} and packed_tensors(model) == {}
    model = pack(model)
    # Four projections and three of the MLP, in two layers; their biases are ordinary, and so are norms, embeddings and the head.
    assert len(packed_modules(model)) == 14 and not any("lm_head" in name for name in packed_modules(model))
    assert {name.rpartition(".")[2] for name in packed_tensors(model)} == {"codes", "scale"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["PackedLinear", "RoundsActivations"])
def test_layers_with_gradients_pass(kind, dtype, build_model):
    model = pack(build_model("llama").to(dtype), getattr(packed_layers, kind))
    check_gradients(model, "the base")
    assert all(p.grad is None for p in model.parameters())


REFUSED = {
    "WithoutGradient": r"its packed layers have no gradient \(RuntimeError: element 0 of tensors does not require grad",
    "WrongGradient": r"the gradient of its packed layers is not that of what they compute \(a rise of .* where it says",
    "NoKernel": r"its packed layers have no gradient \(RuntimeError: no kernel for this device\)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_without_gradients_are_refused(kind, build_model):
    model = pack(build_model("llama"), getattr(packed_layers, kind))
    with pytest.raises(ValueError) as caught:
        check_gradients(model, "model 'x'")
    said = str(caught.value)
    assert caught.match(rf"model 'x' cannot be retrofitted as it is packed \(stand-in\): {REFUSED[kind]}") and "\n" not in said
    assert f"({kind}, such as model.layers.0.self_attn.q_proj)" in said and "quantize=nf4" in said


def test_a_packed_head_is_refused(build_model):
    model = pack(build_model("llama"))
    model.lm_head = packed_layers.PackedLinear(model.lm_head)
    with pytest.raises(ValueError, match=r"the head of the base is packed too \(lm_head\)"):
        check_gradients(model, "the base")


def test_the_rest_is_held_in_the_wanted_dtype(build_model):
    model = pack(build_model("llama").half())
    model.model.norm.float()
    quantization.hold_unpacked(model, torch.bfloat16)
    held = {name: p.dtype for name, p in model.named_parameters()}
    assert held["model.embed_tokens.weight"] == torch.bfloat16 and held["model.norm.weight"] == torch.float32
    assert held["model.layers.0.mlp.up_proj.codes"] == torch.int8


def test_collecting_leaves_packed_weights(build_gated):
    model = pack(build_gated())
    weights = checkpoint.collect(model, torch.float16)
    found = {name.rpartition(".")[2]: tensor.dtype for name, tensor in weights.base.items() if "layers.0.mlp.up_proj" in name}
    assert found == {"codes": torch.int8, "scale": torch.float32}
    assert weights.base["model.norm.weight"].dtype == torch.float16


def load(form: str, dtype: str = "float32"):
    pytest.importorskip(PACKAGE[form])
    return base_models.load_base("builtin:tiny", dtype, "cpu", quantize=form)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, open_gates):
    """folders(form): a retrofitted model of that form, its logits in dense and evict mode, and a folder that it was saved to."""
    made = {}

    def of(form):
        if form not in made:
            model = open_gates(dms.retrofit(load(form), dms.DMSConfig(window=4, scale=1.0, offset=0.0)))
            folder = tmp_path_factory.mktemp(form)
            checkpoint.save(model, folder, base_name="builtin:tiny", target_cr=2.0, dtype=torch.float16)
            made[form] = folder, *logits(model)
        return made[form]

    return of


@torch.no_grad()
def logits(model):
    found = []
    for mode in ("dense", "evict"):
        set_mode(model, mode)
        found.append(model(IDS, use_cache=False).logits)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", PACKAGE)
def test_a_form_has_gradients(form, dtype):
    model = load(form, dtype)
    assert len(packed_modules(model)) == 28 and model.lm_head.weight.dtype == getattr(torch, dtype)
    check_gradients(model, "the base")


@pytest.mark.parametrize("form", PACKAGE)
def test_a_form_loads_back_bit_for_bit(form, folders, tmp_path):
    folder, dense, evicted = folders(form)
    assert not torch.equal(dense, evicted)
    loaded = dms.load(folder, dtype="float32", device="cpu")
    for found, expected in zip(logits(loaded), (dense, evicted), strict=True):
        assert torch.equal(found, expected)
    # From memory again, now that it came from packed files; and by copying the files, as of formats that are not written from memory.
    loaded.save_pretrained(tmp_path / "again")
    checkpoint.save(loaded, tmp_path / "copied", base_name="x", packed_files=folder)
    assert base_hash(tmp_path / "copied") == base_hash(folder)
    for written in ("again", "copied"):
        assert torch.equal(logits(dms.load(tmp_path / written, dtype="float32", device="cpu"))[1], evicted)


@pytest.mark.parametrize("form", PACKAGE)
def test_a_form_generates_and_is_an_eighth_to_a_half_of_its_size(form, folders):
    folder, _, _ = folders(form)
    loaded = dms.load(folder, dtype="float32", device="cpu")
    expected = IDS
    for _ in range(6):
        with torch.no_grad():
            expected = torch.cat([expected, loaded(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=6, do_sample=False), expected)
    held = sum(t.numel() * t.element_size() for t in packed_tensors(loaded).values())
    # Of 786,432 weights; the table of 256 that decodes nf4's scales is a large part of so small a model.
    assert 786_432 * {"nf4": 0.5}.get(form, 1) < held < 786_432 * {"nf4": 0.6}.get(form, 1.1)


@pytest.mark.parametrize("form", PACKAGE)
def test_an_export_of_a_form(form, folders, tmp_path):
    folder, _, _ = folders(form)
    # In several files, whose headers say how their tensors are packed.
    export(folder, tmp_path / "out", format="merged", max_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    found = dms.load(tmp_path / "out", dtype="float32", device="cpu")
    assert torch.equal(logits(found)[1], folders(form)[2])


@pytest.mark.parametrize("form", PACKAGE)
def test_inference_leaves_the_weights_as_they_are(form, folders):
    """bitsandbytes would round 4-bit weights' scales for faster products on some CPUs."""
    model = dms.load(folders(form)[0], device="cpu")
    before = {name: tensor.clone() for name, tensor in packed_tensors(model).items()}
    with torch.no_grad():
        model(IDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed_tensors(model).items())
    check_gradients(model, "the base")


def test_a_folder_that_needs_what_is_not_installed(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders("nf4")[0], tmp_path / "model")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a base in this format needs bitsandbytes and accelerate.*dms-retrofit\[quantized,train\]"):
        dms.load(folder)

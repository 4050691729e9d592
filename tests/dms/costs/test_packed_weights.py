"""Quantised bases: bytes of each kind, against really packed models, and what plans and analyses make of them."""

import pytest
import torch
from dms_train import models as students
from training_steps import SMALL, make_batch, make_recipe, plan_step, take_step
from transformers import AutoConfig, AutoModelForCausalLM

from dms.costs.operators import LiveBytes
from dms.costs.packed_weights import FORMS, UnknownPacking, packed_linears, packing_of
from dms.io import quantization
from dms.io.base_models import load_base

TINY = ("llama", SMALL | {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2000})
TIED = ("qwen3", SMALL | {"intermediate_size": 768, "num_hidden_layers": 3, "vocab_size": 2000, "tie_word_embeddings": True})
TRANSPOSED = ("gpt2", {"n_embd": 256, "n_head": 8, "n_layer": 3, "vocab_size": 2000})


def random_model(kind, device="cpu"):
    family, values = kind
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))


def load_packed(kind, form, folder):
    """A random model, packed."""
    pytest.importorskip("torchao" if form.startswith("torchao") else "bitsandbytes")
    pytest.importorskip("accelerate")
    random_model(kind).save_pretrained(folder)
    return load_base(str(folder), "float32", "cpu", quantize=form)


def tensors_of(model):
    """All that a model holds, a quantisation's scales and tables too."""
    found = list(model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            found += [value for value in vars(part).values() if isinstance(value, torch.Tensor)] if part is not None else []
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        found += [scales] if scales is not None else []
    return found


@pytest.mark.parametrize("kind", [TINY, TIED, TRANSPOSED], ids=["llama", "tied", "transposed"])
@pytest.mark.parametrize("form", ["nf4", "int8", "torchao-int8"])
def test_bytes_are_those_of_a_packed_model(kind, form, tmp_path):
    packed = load_packed(kind, form, tmp_path)
    _, shape = plan_step(random_model(kind, "meta"), make_recipe(128), FORMS[form])
    assert (shape.num_packed > 0) == (kind != TRANSPOSED or form != "torchao-int8")
    assert shape.weight_bytes(4) == LiveBytes(*tensors_of(packed)).now


def test_every_form_of_a_recipe_has_its_bytes():
    assert set(FORMS) == set(quantization.FORMS)


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}}
GROUPED = {"bits": 4, "group_size": 128}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*down_proj"]}


@pytest.mark.parametrize(
    ("settings", "name", "bytes_"),
    [
        # Of a matrix of 256 rows and 512 columns: codes, then scales.
        (BITSANDBYTES, "bitsandbytes nf4", 65536 + 2048 * 4 + 64),
        (BITSANDBYTES | {"bnb_4bit_use_double_quant": True}, "bitsandbytes nf4", 65536 + 2048 + 8 * 4 + 64 + 1028),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8", 131072 + 256 * 4),
        (TORCHAO, "torchao int8", 131072 + 256 * 5),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 131072 + 2 * 4 * 4),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8", 131072 + 4),
        # GPTQ: a 16-bit scale and a 4-bit zero for each group of a row, and each column's group.
        (GROUPED | {"quant_method": "gptq"}, "gptq 4-bit", 65536 + 1024 * 2.5 + 512 * 4),
        (GROUPED | {"quant_method": "gptq", "group_size": -1}, "gptq 4-bit", 65536 + 256 * 2.5 + 512 * 4),
        (GROUPED | {"quant_method": "awq"}, "awq 4-bit", 65536 + 1024 * 2.5),
        (COMPRESSED | {"config_groups": {"group_0": {"weights": WEIGHTS}}}, "compressed-tensors 4-bit", 65536 + 1024 * 2),
    ],
)
def test_bytes_of_a_checkpoint_s_kind(settings, name, bytes_):
    packing = packing_of(AutoConfig.for_model("llama", quantization_config=settings))
    assert packing.name == name
    assert packing.bytes_of(256, 512) == bytes_


def test_weights_that_loading_unpacks_are_whole():
    assert packing_of(AutoConfig.for_model("llama")) is None
    assert packing_of(AutoConfig.for_model("llama", quantization_config={"quant_method": "mxfp4"})) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quantised by 'hqq', whose bytes are not known here; known are bitsandbytes, torchao, fp8, gptq, awq"),
        ({"quant_method": "gptq", "bits": 7}, "of kind 'gptq' has bits 7, whose bytes are not known here"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Other"}}}, "has quant_type 'Other'"),
        (COMPRESSED | {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS}}}, r"has config_groups \['a', 'b'\]"),
    ],
)
def test_other_kinds_are_named(settings, message):
    with pytest.raises(UnknownPacking, match=message):
        packing_of(AutoConfig.for_model("llama", quantization_config=settings))


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (BITSANDBYTES, {"lm_head"}),
        (BITSANDBYTES | {"llm_int8_skip_modules": ["lm_head", "model.layers.1", "up_proj"]}, {"lm_head", "layers.1", "up_proj"}),
        # A list of its own stands instead of the usual one.
        (BITSANDBYTES | {"llm_int8_skip_modules": ["up_proj"]}, {"up_proj"}),
        (GROUPED | {"quant_method": "awq", "modules_to_not_convert": ["model.layers.0"]}, {"lm_head", "layers.0."}),
        (GROUPED | {"quant_method": "gptq", "lm_head": True}, set()),
        (COMPRESSED | {"config_groups": {"group_0": {"weights": WEIGHTS}}}, {"lm_head", "down_proj"}),
    ],
)
def test_what_stays_whole_is_what_the_kind_skips(settings, left):
    values = SMALL | {"num_hidden_layers": 12, "intermediate_size": 64, "vocab_size": 64}
    model = random_model(("llama", values), "meta")
    packed = packed_linears(model, packing_of(AutoConfig.for_model("llama", quantization_config=settings)))
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # model.layers.1 is not model.layers.10.
    skipped = {name for name in names if any(part.rstrip(".") in name.split(".") or f"{part.rstrip('.')}." in name for part in left)}
    assert names - set(packed) == skipped


STEPS = {
    "gates": {"loss_chunk": 128, "length": 512},
    "checkpointed": {"loss_chunk": 128, "length": 512, "activation_checkpointing": True},
    "bf16": {"loss_chunk": 128, "length": 512, "precision": "bf16"},
    "lora": {"loss_chunk": 128, "length": 512, "trainable": "gates+lora", "base_lr": 1e-4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("form", ["nf4", "int8", "torchao-int8"])
def test_peak_bytes_of_a_step_on_a_packed_base(form, name, tmp_path, capsys):
    recipe = make_recipe(**STEPS[name])
    model = load_packed(TINY, form, tmp_path)
    gates, base = students.equip(model, recipe)
    optimizer, batch = torch.optim.AdamW([*gates.values(), *base.values()], lr=1e-3), make_batch(recipe)
    with LiveBytes(*tensors_of(model), *model.buffers(), *batch.values()) as live:
        take_step(model, None, batch, recipe)
        optimizer.step()
    expected = plan_step(random_model(TINY, "meta"), recipe, FORMS[form])[0].peak
    with capsys.disabled():
        print(f"\n{form}, {name}: planned {expected / 1e6:.1f} MB, measured {live.peak / 1e6:.1f} MB, {expected / live.peak - 1:+.1%}")
    assert expected == pytest.approx(live.peak, rel=0.15)

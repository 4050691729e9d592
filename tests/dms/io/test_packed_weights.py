"""gpt-oss is published in MXFP4: it is unpacked when loaded, and saved again as what it then is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import dms
from dms.io import base_models, checkpoint
from dms.io.quantization import is_mxfp4

# The sixteen values of four bits (OCP Microscaling Formats, E2M1), low nibble first.
HALVES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = torch.tensor(HALVES + [-value for value in HALVES])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small gpt_oss folder whose experts are packed, and what one of them holds, unpacked by hand."""
    torch.manual_seed(0)
    shape = dict(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(head_dim=32, num_local_experts=2, num_experts_per_tok=1, sliding_window=8, max_position_embeddings=128)
    config = AutoConfig.for_model("gpt_oss", layer_types=["sliding_attention", "full_attention"], pad_token_id=1, eos_token_id=2, **shape)
    tensors = {name: tensor.bfloat16() for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 128, (experts, outputs, inputs // 32), dtype=torch.uint8)
    folder = tmp_path_factory.mktemp("gpt_oss") / "base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    values.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(values))
    blocks, scales = (tensors[f"model.layers.0.mlp.experts.down_proj_{kind}"].long() for kind in ("blocks", "scales"))
    numbers = torch.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], -1).flatten(-2) * 2.0 ** (scales - 127)[..., None]
    return folder, numbers.flatten(2).transpose(1, 2)


def test_loaded_as_numbers_and_saved_as_numbers(packed, tmp_path):
    folder, expected = packed
    model = base_models.load_base(str(folder), "bfloat16", "cpu")
    torch.testing.assert_close(model.model.layers[0].mlp.experts.down_proj.float(), expected, atol=0, rtol=0)
    dms.retrofit(model, dms.DMSConfig(window=4))
    out = checkpoint.save(model, tmp_path / "out", base_name=str(folder), target_cr=2.0, dtype=torch.bfloat16)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(out / "model.safetensors")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    again = dms.load(out)
    torch.testing.assert_close(again.model.layers[0].mlp.experts.down_proj.float(), expected, atol=0, rtol=0)


def test_it_counts_as_bfloat16(packed):
    from dms_train.artifacts import saved_dtype

    config = AutoConfig.from_pretrained(packed[0])
    assert is_mxfp4(config) and base_models.is_saved_bfloat16(config) and saved_dtype(str(packed[0])) == torch.bfloat16

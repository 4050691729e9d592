"""Folders written for other projects' code: read by their rules in plain code, imported again, and what is refused with what to retrain."""

import json

import pytest
import torch
from foreign_folders import adapter_logits, channel_logits, plain_forward, random_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dms
from dms.attention import evict_pass
from dms.export.folder import export
from dms.formats.importing import import_checkpoint, read_foreign
from dms.io import checkpoint
from dms.io.weights import sha256
from dms.report.card_text import Card
from dms.retrofitting import gate_parameters

T = 400
W = 300


@pytest.fixture
def ids():
    return torch.randint(2, 97, (T,), generator=torch.Generator().manual_seed(3))


def saved(folder, family="qwen3", bias=0.02, target_cr=8.0, model_config=None, **config):
    """A retrofitted folder with gates that evict about half, and its model."""
    model = dms.retrofit(random_model(family, **(model_config or {})), dms.DMSConfig(**{"window": W, "alignment": "next", **config}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gate_parameters(model).items():
            parameter.normal_(0, 0.05 if name.endswith("weight") else bias or 1e-9, generator=generator)
            if not bias and name.endswith("bias"):
                parameter.zero_()
    model.dms.trained_length = 512
    return dms.save(model, folder, base_name="acme/base", target_cr=target_cr), dms.set_mode(model, "evict") or model


@torch.no_grad()
def assert_read_the_same(folder, model, ids, logits_of, **rule):
    """What plain transformers finds in a folder, run by the other project's rule, is what our model computes."""
    # As their classes would: they are named in auto_map alone.
    plain, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    expected = model(ids[None], use_cache=False).logits[0]
    ours_LTH = torch.stack([evicted[0] for _, evicted in sorted(evict_pass(model).evicted.items())])
    logits, decided_LTH, _ = plain_forward(plain.eval(), ids, logits_of(plain), window=W, **rule)
    assert decided_LTH.numel() >= 2500 and 0.15 < decided_LTH.float().mean() < 0.85
    assert int((ours_LTH != decided_LTH).sum()) == 0
    assert (logits - expected).abs().max() < 1e-5


@torch.no_grad()
def assert_comes_back(folder, out, model, ids):
    import_checkpoint(str(folder), out)
    again = dms.load(out, dtype="float32", device="cpu")
    assert again.dms.config == model.dms.config and again.dms_origin["target_cr"] == 8.0
    assert (again(ids[None], use_cache=False).logits - model(ids[None], use_cache=False).logits).abs().max() < 1e-5
    ours, theirs = (evict_pass(one).evicted for one in (model, again))
    assert all(torch.equal(ours[index], theirs[index]) for index in ours)


@pytest.mark.parametrize(
    ("bias", "attention_bias", "granularity"),
    [
        (0.02, False, "head"),
        pytest.param(0.0, False, "head", marks=pytest.mark.slow),
        pytest.param(0.02, True, "layer", marks=pytest.mark.slow),
    ],
)
def test_linear_gates_become_nvidias_adapter(bias, attention_bias, granularity, ids, tmp_path):
    folder, model = saved(tmp_path / "ours", bias=bias, granularity=granularity, model_config={"attention_bias": attention_bias})
    export(folder, tmp_path / "theirs", format="nvidia")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert "architectures" not in config and "dms" not in config and config["attention_bias"] is bool(bias or attention_bias)
    assert (config["dms_separate_alpha"], config["dms_alpha_per"], config["dms_window_size"], config["dms_cr"]) == (True, granularity, W, 8)
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_qwen3_dms.Qwen3ForCausalLMDMS"
    assert not (tmp_path / "theirs/gates.safetensors").exists() and not list((tmp_path / "theirs").glob("*.py"))
    tensors = load_file(tmp_path / "theirs/model.safetensors")
    assert tensors["model.layers.3.self_attn.dms_proj_alpha.weight"].shape == (2, 64)
    assert ("model.layers.0.self_attn.dms_proj_alpha.bias" in tensors) is config["attention_bias"]
    assert_read_the_same(
        tmp_path / "theirs", model, ids, lambda plain: adapter_logits(plain, tensors, per_layer=granularity == "layer"), alignment="next"
    )
    assert_comes_back(tmp_path / "theirs", tmp_path / "back", model, ids)
    card = Card.read(tmp_path / "theirs/README.md").body
    assert "experimental/dms/models/qwen3" in card and "without dms-retrofit" in card and "dms import" in card


@pytest.mark.slow
def test_borrowed_gates_become_nvidias(ids, tmp_path):
    folder, model = saved(tmp_path / "ours", gate="borrowed")
    export(folder, tmp_path / "theirs", format="nvidia")
    assert json.loads((tmp_path / "theirs/config.json").read_text())["dms_separate_alpha"] is False
    assert (tmp_path / "theirs/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert_read_the_same(tmp_path / "theirs", model, ids, lambda plain: channel_logits(), alignment="next", zeroed="both")
    assert_comes_back(tmp_path / "theirs", tmp_path / "back", model, ids)


@pytest.mark.parametrize("family", ["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_borrowed_gates_become_fastdms(family, ids, tmp_path):
    folder, model = saved(tmp_path / "ours", family, gate="borrowed_once", alignment="own", scale=50.0, offset=2.5)
    export(folder, tmp_path / "theirs", format="fastdms")
    metadata = json.loads((tmp_path / "theirs/dms_metadata.json").read_text())
    assert metadata == {"window_size": W, "alpha_scale": 50.0, "alpha_offset": 2.5, "target_cr": 8, "context_len": 512}
    # Its loader reads every file and knows the base's tensors alone.
    files = list((tmp_path / "theirs").glob("*.safetensors"))
    with safe_open(files[0], framework="pt") as f:
        assert len(files) == 1 and not [name for name in f.keys() if "gate." in name]  # noqa: SIM118
    assert_read_the_same(
        tmp_path / "theirs",
        model,
        ids,
        lambda plain: channel_logits(metadata["alpha_scale"], metadata["alpha_offset"]),
        alignment="own",
        zeroed="before",
    )
    assert_comes_back(tmp_path / "theirs", tmp_path / "back", model, ids)


@pytest.mark.slow
def test_linear_gates_become_hipengines_sidecar(tmp_path):
    pytest.importorskip("gguf")
    import gguf_writing

    from dms.io import base_models

    base = gguf_writing.write(
        tmp_path / "base.gguf", base_models.load_base("builtin:tiny", "float32", "cpu"), base_models.load_tokenizer("builtin:tiny")
    )
    model = dms.retrofit(base_models.load_base(str(base), device="cpu"), dms.DMSConfig(window=32))
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_()
    digest = sha256(base)
    checkpoint.save_gates(model, tmp_path / "gates", base_name=str(base), base_digest=digest[:32], target_cr=4.0)
    export(tmp_path / "gates", tmp_path / "theirs", format="hipengine", base=str(base))
    metadata = json.loads((tmp_path / "theirs/dms_metadata.json").read_text())
    assert (metadata["artifact_fingerprint"], metadata["schema_version"]) == (digest, 2)
    assert (metadata["num_q_heads"], metadata["num_kv_heads"], metadata["head_dim"], metadata["hidden_size"]) == (4, 2, 32, 128)
    assert metadata["training"] == {"method": "dms-retrofit"}, "not what another trainer made"
    found = read_foreign(tmp_path / "theirs", {})
    assert found.config == model.dms.config and found.base_hash == digest[:32] and found.target_cr == 4
    for name, parameter in gate_parameters(model).items():
        assert torch.equal(found.gates[name], parameter.detach().bfloat16().float())
    (tmp_path / "other.gguf").write_bytes(base.read_bytes() + b" ")
    for other, message in ((None, "binds gates to one GGUF file"), (str(tmp_path / "other.gguf"), "is another file")):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "gates", tmp_path / "no", format="hipengine", base=other)


@pytest.mark.parametrize(
    ("format", "family", "config", "messages"),
    [
        (
            "nvidia",
            "llama",
            {"alignment": "own", "sinks": 2, "window": 64},
            ["model_type is 'llama'", "retrain with dms.sinks=0", "retrain with dms.alignment=next", "retrain with dms.window=512"],
        ),
        ("nvidia", "qwen3", {"window": [64, 300]}, ["retrain with one, such as 300"]),
        ("nvidia", "qwen3", {"gate": "borrowed_once"}, ["retrain with dms.gate=borrowed"]),
        ("fastdms", "llama", {}, ["retrain with dms.alignment=own", "dms.gate is 'linear'", "dms.gate=borrowed_once and trainable=all"]),
        ("fastdms", "mistral", {"gate": "borrowed", "alignment": "own"}, ["model_type is 'mistral'", "dms.gate is 'borrowed'"]),
        ("hipengine", "llama", {"granularity": "layer"}, ["retrain with dms.alignment=own", "retrain with dms.granularity=head"]),
        ("hipengine", "llama", {"gate": "borrowed", "alignment": "own"}, ["retrain with dms.gate=linear"]),
    ],
)
def test_what_is_refused(format, family, config, messages, tmp_path):
    model_config = {"num_hidden_layers": 1, **({"sliding_window": None} if family == "mistral" else {})}
    folder, _ = saved(tmp_path / "ours", family, model_config=model_config, **config)
    with pytest.raises(ValueError) as error:
        export(folder, tmp_path / "theirs", format=format)
    assert str(error.value).startswith(f"--format {format} cannot hold this model: ")
    assert not [message for message in messages if message not in str(error.value)]
    with pytest.raises(ValueError, match="leave out --max-shard-size"):
        export(folder, tmp_path / "theirs", format=format, max_shard_size="1GB")
    assert not (tmp_path / "theirs").exists()


def test_borrowed_gates_are_not_written_alone(tmp_path):
    folder, _ = saved(tmp_path / "ours", "llama", gate="borrowed", model_config={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="are channels of its weights"):
        export(folder, tmp_path / "gates", format="gates")

"""However a retrofitted model is saved, its folder is one that dms, transformers and servers read."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from serving import files_read
from torch import nn
from transformers import AutoModelForCausalLM

import dms
from dms.io import checkpoint
from dms.io.gates_file import read_gates
from dms.retrofitting import gate_parameters


def weights_in(folder):
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def gates_of(model):
    return {name: parameter.detach().clone() for name, parameter in gate_parameters(model).items()}


def loaded_silently(folder, capfd):
    """The dense model as transformers alone loads it; nothing was missing, left over or said."""
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not [line for line in capfd.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    return plain


@pytest.mark.parametrize("mode", ["dense", "train", "evict"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_save_pretrained_and_dms_save_write_the_same_folder(family, mode, build_gated, make_batch, tmp_path, capfd):
    model = build_gated(family)
    model.config._name_or_path = "acme/base"
    model.dms.trained_length = 64
    dms.set_mode(model, mode)
    before = gates_of(model)
    model.save_pretrained(tmp_path / "theirs")
    assert model.dms.mode == mode
    dms.save(model, tmp_path / "ours", base_name="acme/base")
    assert model.dms.mode == mode and same(gates_of(model), before)
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == names
    for name in names - {"model.safetensors", "gates.safetensors"}:
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name
    assert same(weights_in(tmp_path / "theirs"), weights_in(tmp_path / "ours"))
    assert not [name for name in weights_in(tmp_path / "theirs") if "dms_gate" in name]
    (one, about), (other, about_other) = read_gates(tmp_path / "theirs"), read_gates(tmp_path / "ours")
    assert same(one, before) and same(other, before) and about == about_other
    assert (about["base_name"], about["trained_length"]) == ("acme/base", "64")
    assert "dms_over" not in (tmp_path / "theirs" / "config.json").read_text()

    plain, again = loaded_silently(tmp_path / "theirs", capfd), dms.load(tmp_path / "theirs", device="cpu", mode="dense")
    batch = make_batch(2, 12)
    dms.set_mode(model, "dense")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(plain(**batch).logits, expected) and torch.equal(again(**batch).logits, expected)
    assert same(gates_of(again), before) and again.dms.trained_length == 64
    # Loaded and saved once more, it still is what it was trained on and for.
    again.dms_origin["target_cr"] = 4.0
    again.save_pretrained(tmp_path / "again")
    assert read_gates(tmp_path / "again")[1] == about | {"target_cr": "4.0"}


def test_servers_read_the_weights_alone(build_gated, tmp_path):
    model = build_gated()
    for folder, options in ((tmp_path / "one", {}), (tmp_path / "several", {"max_shard_size": "50KB"})):
        model.save_pretrained(folder, **options)
        assert files_read(folder) == {path.name for path in folder.glob("model*.safetensors")}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(weights_in(folder))
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_in(folder).values())
    # Saved anew into the same folder, with other files.
    model.save_pretrained(tmp_path / "several")
    assert files_read(tmp_path / "several") == {"model.safetensors"}
    assert files_read(dms.save(model, tmp_path / "ours", base_name="acme/base")) == {"model.safetensors"}
    # As folders of before were: without an index they load all the same.
    (tmp_path / "one" / "model.safetensors.index.json").unlink()
    assert "gates.safetensors" in files_read(tmp_path / "one")
    assert same(gates_of(dms.load(tmp_path / "one", device="cpu")), gates_of(model))


def test_what_training_frameworks_give(build_gated, tmp_path):
    model = build_gated()
    before = gates_of(model)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    assert same(read_gates(tmp_path / "given")[0], {name: tensor + 1 for name, tensor in before.items()})
    assert torch.equal(weights_in(tmp_path / "given")["model.norm.weight"], model.model.norm.weight + 1)
    assert "model.layers.0.self_attn.dms_gate.weight" in state
    # Without gates among them, they are the model's; in half precision they are written in float32.
    model.save_pretrained(tmp_path / "base", state_dict={name: tensor for name, tensor in state.items() if "dms_gate" not in name})
    assert same(read_gates(tmp_path / "base")[0], before)
    model.save_pretrained(tmp_path / "half", state_dict={name: tensor.bfloat16() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in read_gates(tmp_path / "half")[0].values()} == {torch.float32}
    model.save_pretrained(tmp_path / "other process", is_main_process=False, state_dict=state)
    assert not list((tmp_path / "other process").iterdir())


def test_what_cannot_be_saved_is_refused(build_gated, tmp_path):
    model = build_gated()
    for option, message in (
        ({"push_to_hub": True}, r"call model\.push_to_hub"),
        ({"variant": "fp16"}, r"variant='fp16'.*leave it out"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True"),
        # As ZeRO-3 leaves parameters between uses.
        (
            {"state_dict": {name: tensor.new_empty(0) for name, tensor in model.state_dict().items()}},
            r"state_dict=accelerator\.get_state_dict",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "out", **option)
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match=r"carries adapters.*merge them first"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists() and model.dms.mode == "dense"


def test_transformers_trainer(build_gated, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 97, (4, 24), generator=torch.Generator().manual_seed(0))]

    def train(model, **options):
        model.config.use_cache = False
        model.requires_grad_(False)
        for parameter in gate_parameters(model).values():
            parameter.requires_grad_(True)
        dms.set_mode(model, "train")
        settings = {"per_device_train_batch_size": 2, "max_steps": 1, "save_steps": 1, "learning_rate": 0.1, "report_to": []}
        arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **settings)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(**options)
        return trainer

    model = build_gated()
    before = gates_of(model)
    trainer = train(model)
    trainer.save_model(str(tmp_path / "final"))
    learned = gates_of(model)
    assert not same(learned, before) and model.dms.mode == "train"
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-1"):
        again = dms.load(folder, device="cpu")
        assert same(gates_of(again), learned) and again.dms.mode == "evict"
        assert not [name for name in weights_in(folder) if "dms_gate" in name]
    # Trainer goes on from weights alone; the gates are given by whoever goes on.
    other = build_gated()
    checkpoint.load_gates(other, tmp_path / "run" / "checkpoint-1")
    assert same(gates_of(other), learned)
    train(other, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(gates_of(other), learned)
    with pytest.raises(ValueError, match="gates of another configuration"):
        checkpoint.load_gates(build_gated(window=5), tmp_path / "final")


@pytest.mark.parametrize("away", ["layers", "all", "after"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_that_are_offloaded(away, dtype, build_model, open_gates, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = build_model("llama", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    if away == "after":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    else:
        place = "cpu" if away == "layers" else "disk"
        places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], place)
        places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk")
    gates = gates_of(open_gates(dms.retrofit(model, dms.DMSConfig(window=4))))
    if away == "after":
        accelerate.disk_offload(model, str(tmp_path / "disk"))
    assert any(tensor.is_meta for tensor in model.state_dict().values())
    checkpoint.save(model, tmp_path / "ours", base_name="acme/base", dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert same(weights_in(folder), weights_in(tmp_path / "base")) and same(read_gates(folder)[0], gates)


def test_weights_that_are_nowhere_are_named(build_model, tmp_path):
    with torch.device("meta"):
        model = dms.retrofit(build_model("llama"), dms.DMSConfig(window=4))
    model.model.layers[0].self_attn.dms_gate.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"\.weight has no values here \(it is on the meta device\)"):
        dms.save(model, tmp_path / "out", base_name="acme/base")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_generate(build_model, open_gates, tmp_path):
    """The decoder alone is saved by dms.save."""
    model = open_gates(dms.retrofit(build_model("llama").model, dms.DMSConfig(window=4)))
    assert not hasattr(model, "generate") and isinstance(model, nn.Module)
    dms.save(model, tmp_path / "out", base_name="acme/base")
    assert not [name for name in weights_in(tmp_path / "out") if "dms_gate" in name]
    assert same(read_gates(tmp_path / "out")[0], gates_of(model))

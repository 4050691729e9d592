"""A run whose base is a GGUF file: an ordinary folder comes of it, and other commands take the file's name too."""

import hashlib
import json
import shutil

import pytest
import torch
from dms_train import cache_teacher, generate_data, loop, preflight
from dms_train.recipe import GenerateRecipe, RetrofitRecipe
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dms
from dms.io import base_models
from dms.io.gates_file import read_gates
from dms.io.weights import GATES_FILE, save_tensors

pytest.importorskip("gguf")

import gguf_writing


@pytest.fixture(scope="module")
def file(tiny_folder, tmp_path_factory):
    model, tokenizer = base_models.load_base(str(tiny_folder), "float32", "cpu"), base_models.load_tokenizer(str(tiny_folder))
    return gguf_writing.write(tmp_path_factory.mktemp("gguf") / "tiny.Q4.gguf", model, tokenizer)


@pytest.fixture(scope="module")
def run(file, make_values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    values = make_values(folder, model=str(file), steps=2, evaluation={"num_documents": 2, "num_items": 2})
    loop.run(RetrofitRecipe.model_validate(values))
    return folder


def test_the_run_writes_an_ordinary_folder(run, file):
    names = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "gates.safetensors", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith(".gguf")]
    config = json.loads((run / "model" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    saved = load_file(run / "model" / "model.safetensors")
    base = base_models.load_base(str(file), device="cpu")
    for name, parameter in base.named_parameters():
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], parameter), name
    dense, gated = AutoModelForCausalLM.from_pretrained(run / "model"), dms.load(run / "model", device="cpu", mode="dense")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == gguf_writing.CHAT
    ids = tokenizer("def read(path):\n    return 1", return_tensors="pt")["input_ids"]
    assert ids.tolist() == base_models.load_tokenizer(str(file))("def read(path):\n    return 1", return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(dense(ids).logits, base(ids).logits) and torch.equal(gated(ids).logits, base(ids).logits)


def test_card_and_gates_name_the_file(run, file):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = (run / "model" / "README.md").read_text()
    assert f"dequantised from the GGUF file `tiny.Q4.gguf` (SHA-256 `{digest}`)" in card
    assert "license: apache-2.0" in card and str(file.parent) not in card
    with safe_open(run / "gates" / "gates.safetensors", framework="pt") as f:
        assert f.metadata()["base_hash"] == digest[:32]
    assert dms.load(run / "gates", base=str(file), device="cpu").dms.mode == "evict"


def test_data_and_teacher_caches_are_made_of_it(file, make_values, tmp_path):
    values = {"model": str(file), "output": str(tmp_path / "out.jsonl"), "num_prompts": 2, "max_new_tokens": 4, "precision": "fp32"}
    values["prompts"] = {"source": "builtin", "tokens": 96, "items": [1, 2]}
    generate_data.run(GenerateRecipe.model_validate(values))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    values = make_values(tmp_path / "run", model=str(file), steps=1, teacher_cache={"path": str(tmp_path / "cache"), "top_k": 8})
    assert cache_teacher.write(RetrofitRecipe.model_validate(values), console=Console(quiet=True))["written"] > 0
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:32] in "".join(p.read_text() for p in (tmp_path / "cache").glob("*.json"))


def test_plan_and_analysis_read_the_header_alone(file, make_values, tmp_path, monkeypatch):
    import gguf
    from dms_train import analyze_command, plan_command

    monkeypatch.setattr(gguf, "dequantize", lambda *_, **__: pytest.fail("weights were read"))
    recipe = RetrofitRecipe.model_validate(make_values(tmp_path / "out", model=str(file)))
    config = plan_command.read_config(recipe.model)
    assert (config.num_hidden_layers, config.vocab_size) == (2, 1024)
    assert sum(p.numel() for p in plan_command.build_on_meta(recipe, config).parameters()) > 0
    values, gates = analyze_command.find(str(file), None)
    assert values.hidden_size == 64 and gates == dms.DMSConfig()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"damaged.gguf is truncated: it ends after 3,000 bytes"):
        analyze_command.find(str(damaged), None)


def test_weights_are_not_divided_while_a_file_is_read(file, make_values, tmp_path):
    recipe = RetrofitRecipe.model_validate(make_values(tmp_path / "out", model=str(file), zero={"stage": 3}))
    with pytest.raises(ValueError, match=r"zero.stage 3 divides weights .* choose zero.stage=2, or write it as a folder first"):
        preflight.check_context(recipe)
    values = make_values(tmp_path / "out", model=str(file), zero={"stage": 2})
    assert preflight.check_context(RetrofitRecipe.model_validate(values)).model_type == "llama"


def test_a_base_within_the_folder_that_would_be_emptied(run, file, make_values, tmp_path):
    inside = shutil.copytree(run, tmp_path / "out") / "base.gguf"
    inside.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"base\.gguf' lies within output_dir"):
        loop.run(RetrofitRecipe.model_validate(make_values(tmp_path / "out", model=str(inside), overwrite=True, resume="never")))
    assert inside.is_file()


def test_gates_of_a_packed_base_are_of_another_form(run, file, tmp_path):
    """A GGUF file is not packed again, so nothing is said of that."""
    tensors, metadata = read_gates(run / "gates")
    save_tensors(tensors, tmp_path / GATES_FILE, {**metadata, "base_form": "nf4"})
    with pytest.raises(ValueError, match=r"packed as nf4 when it was loaded\), and the given one is \S+ \(hash \w+\); give the base"):
        dms.load(tmp_path, base=str(file), device="cpu")

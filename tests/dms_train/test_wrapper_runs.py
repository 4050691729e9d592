"""Runs of text decoders inside other classes: the decoder gets gates and adapters, everything else stays as it was."""

import json
import re
import sys

import pytest
import torch
import yaml
from dms_train import cli, loop
from dms_train.recipe import RetrofitRecipe
from safetensors.torch import load_file
from wrappers import PROCESSOR, WRAPPERS, write_wrapper

import dms
from dms.io import base_models
from dms.modes import set_mode


def _weights(folder):
    return load_file(folder / "model.safetensors")


def _reads_images(model_type: str, name: str) -> bool:
    # Of mllama, the layer of the decoder that attends to images too.
    return re.search("vision|visual|projector" + (r"|language_model\..*layers\.1\." if model_type == "mllama" else ""), name) is not None


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        # Its output is that of a whole model, with a head; some layers attend within chunks.
        pytest.param("llama4", {}, marks=pytest.mark.slow),
        # Text passes by one of its layers.
        pytest.param("mllama", {"trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-3, "warmup_steps": 1}}, marks=pytest.mark.slow),
        # Positions of three kinds, beside documents that share sequences.
        ("qwen2_5_vl", {"trainable": "gates+lora", "optimizer": {"lr": 2e-3, "base_lr": 1e-3, "warmup_steps": 1}}),
    ],
)
def test_a_run(model_type, changes, make_values, tmp_path):
    base = write_wrapper(model_type, tmp_path / "base")
    values = make_values(tmp_path / "run", model=str(base), target_cr=2, steps=4, **changes)
    if "trainable" in changes:
        lines = (json.dumps({"text": f"import os, sys\nx{number} = {number}\n" * (1 + number % 7)}) for number in range(64))
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        values["data"] = {"source": "jsonl", "path": str(tmp_path / "data.jsonl"), "field": "text", "length": 128}
    result = loop.run(RetrofitRecipe.model_validate(values))
    assert result["policies"]["dms"]["cr_decided"] > 1.05

    model = tmp_path / "run" / "model"
    assert {name: json.loads((model / name).read_text()) for name in PROCESSOR} == PROCESSOR
    assert json.loads((model / "config.json").read_text())["architectures"] == [WRAPPERS[model_type].name]
    before, after = _weights(base), _weights(model)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert bool(changed) == ("trainable" in changes) and not any(_reads_images(model_type, name) for name in changed)
    assert type(dms.load(model, device="cpu")).__name__ == WRAPPERS[model_type].name


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `dms ARGS` in this process -> what it prints."""

    def run(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["dms", *map(str, args)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err
        return "".join(capsys.readouterr())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_every_command(model_type, call, make_values, tmp_path):
    base = write_wrapper(model_type, tmp_path / "base")
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(make_values(run, model=str(base), target_cr=2, steps=10)))
    name, (num_gated, num_layers) = WRAPPERS[model_type].name, WRAPPERS[model_type].layers
    assert "recommended" in call("plan", recipe)
    said = call("retrofit", recipe)
    assert f"gates on {num_gated} layers" in " ".join(said.split())
    assert "KV entries" in call("generate", run / "model", "--prompt", "import os\nimport sys\n", "--max-new-tokens", "8")
    call("analyze", run / "model", "--json", tmp_path / "analysis.json")
    assert json.loads((tmp_path / "analysis.json").read_text())["model"] == name
    if model_type == "qwen3_vl":
        call("evaluate", run / "model", "--quick")
    call("report", run)
    call("export", run, tmp_path / "hf")
    call("export", run, tmp_path / "merged", "--format", "merged")
    call("export", run, tmp_path / "gates", "--format", "gates")
    for folder in ("hf", "merged"):
        assert all((tmp_path / folder / file).is_file() for file in PROCESSOR)

    ids = base_models.load_tokenizer(str(base))("import os\nimport sys\n" * 6, return_tensors="pt").input_ids
    given = {"dtype": "float32", "device": "cpu"}
    loaded = [dms.load(folder, **given) for folder in (run / "model", tmp_path / "hf", tmp_path / "merged")]
    loaded.append(dms.load(tmp_path / "gates", base=str(base), **given))
    with torch.no_grad():
        first, *others = [model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False) for model in loaded]
        assert all(torch.equal(tokens, first) for tokens in others)
        set_mode(loaded[0], "dense")
        plain = base_models.load_base(str(base), **given)
        assert torch.equal(loaded[0](input_ids=ids).logits, plain(input_ids=ids).logits)
    assert type(plain).__name__ == name and all(type(model).__name__ == name for model in loaded)
    assert num_layers == base_models.load_config(str(base)).get_text_config().num_hidden_layers

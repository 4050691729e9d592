"""Runs whose gates are borrowed channels: what trains, what is measured, what is saved, and which recipes are refused."""

import pytest
import torch
from dms_train import artifacts, loop, models, plan_command
from dms_train.recipe import RetrofitRecipe

import dms
from dms.borrowed import channels, query_projection
from dms.io import base_models
from dms.io.gates_file import read_gates

LR = {"lr": 2e-3, "base_lr": 2e-3, "warmup_steps": 1}
BORROWED = {"dms": {"window": 8, "gate": "borrowed_once"}, "trainable": "all", "optimizer": LR}


def load(values):
    return RetrofitRecipe.model_validate(values)


class Cut(Exception):
    pass


@pytest.mark.slow
def test_a_run_trains_rows_of_the_base(make_values, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
    recipe = load(make_values(tmp_path / "run", steps=12, save={"every": 4}, **BORROWED))
    step, starts = loop.Engine.step, []

    def stepping(engine):
        layers = engine.module.student.dms.layers if hasattr(engine.module, "student") else []
        starts.append([query_projection(layer).weight[channels(layer)].abs().max().item() for layer in layers])
        if len(starts) == 7:
            raise Cut
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Engine, "step", stepping)
        with pytest.raises(Cut):
            loop.run(recipe)
    assert starts[0] == [0.0, 0.0] and min(starts[6]) > 0, "gates start as linear ones do"
    result = loop.run(recipe)
    assert result["steps"] == 12 and result["policies"]["dms"]["cr_decided"] > 1.5
    base = base_models.load_base(str(tiny_folder), "float32", "cpu")
    model = dms.load(tmp_path / "run/model", dtype="float32", device="cpu")
    assert model.dms.config.gate == "borrowed_once" and not read_gates(tmp_path / "run/model")[0]
    layer = model.dms.layers[0]
    rows = query_projection(layer).weight[channels(layer)]
    assert rows.shape == (2, 64) and bool((rows != 0).all())
    assert not torch.allclose(rows, base.model.layers[0].self_attn.q_proj.weight[channels(layer)], atol=0.05)
    assert not (tmp_path / "run/gates").exists(), "no gates go without these weights"
    with pytest.raises(ValueError, match="are channels of its weights, without which it is another model"):
        models.build(load(make_values(tmp_path / "again", model=str(tmp_path / "run/model"))), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "gates", "optimizer": {"lr": 1e-3}}, "with trainable: gates choose all"),
        ({"trainable": "gates+lora"}, r"with trainable: gates\+lora choose all"),
        ({"optimizer": LR | {"base_lr": 1e-4}}, "train with base_lr, 0.0001, and lr, 0.002, would have no effect"),
        ({"teacher_cache": {"path": "cache"}}, "teacher_cache is for gates with weights of their own"),
        ({"dms": {"window": 8, "gate": "borrow"}}, "gate: Input should be 'linear' or 'borrowed' or 'borrowed_once'"),
    ],
)
def test_recipes_that_are_refused(changes, message, make_values, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(make_values(tmp_path, **BORROWED | changes))


@pytest.mark.slow
def test_a_plan_counts_their_layers(make_values, tmp_path):
    made = plan_command.plan(load(make_values(tmp_path, **BORROWED)), gpu="h100-80", num_gpus=1).as_dict()
    assert "'gated_layers': 2" in str(made)

"""Runs that start from gates that exist: from where, to which ratio, and what is refused."""

import pytest
import torch
from dms_train import artifacts, loop, models
from dms_train.recipe import RetrofitRecipe
from dms_train.warm_start import plan_step

import dms
from dms.io import base_models, checkpoint
from dms.io.gates_file import gate_tensors
from dms.io.weights import base_hash
from dms.retrofitting import gate_parameters


def load(values):
    return RetrofitRecipe.model_validate(values)


@pytest.fixture(scope="module")
def gates(tiny_folder, tmp_path_factory):
    """A folder of random gates of the tiny model, and their values."""
    model = dms.retrofit(base_models.load_base(str(tiny_folder), "float32", "cpu"), dms.DMSConfig(window=8))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 0.01, generator=generator)
    folder = tmp_path_factory.mktemp("gates")
    checkpoint.save_gates(model, folder, base_name=str(tiny_folder), base_digest=base_hash(tiny_folder), target_cr=2.0)
    return folder, gate_tensors(model)


@pytest.mark.slow
def test_a_run_starts_where_the_gates_are(make_values, gates, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
    folder, values = gates
    recipe = load(make_values(tmp_path / "run", steps=4, dms={"window": 16, "tau": 0.5}, gates={"path": str(folder), "start_cr": 2.0}))
    assert [round(plan_step(recipe, step).target_cr, 2) for step in (1, 4)] == [2.62, 4.0]
    seen = []
    step = loop.Engine.step

    def stepping(engine):
        seen.append({name: tensor.clone() for name, tensor in gate_tensors(engine.module.student).items()})
        return step(engine)

    monkeypatch.setattr(loop.Engine, "step", stepping)
    result = loop.run(recipe)
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in values.items())
    assert not torch.equal(seen[1]["layers.0.gate.weight"], values["layers.0.gate.weight"])
    assert result["steps"] == 4 and dms.load(tmp_path / "run/model", device="cpu").dms.config.window == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dms": {"window": 8, "alignment": "next"}}, "alignment 'own', and dms.alignment is 'next'"),
        ({"dms": {"window": [8, 16]}, "budget": "end"}, r"window 8, and dms.window is \(8, 16\)"),
    ],
)
def test_gates_that_decide_otherwise_are_refused(changes, message, make_values, gates, tmp_path):
    recipe = load(make_values(tmp_path, gates={"path": str(gates[0])}, **changes))
    with pytest.raises(ValueError, match=message):
        models.build(recipe, torch.float32, "cpu")


def test_gates_of_another_form_of_the_model_are_said(make_values, gates, tiny_folder, tmp_path):
    half = base_models.load_base(str(tiny_folder), "bfloat16", "cpu")
    half.save_pretrained(tmp_path / "half")
    with pytest.warns(UserWarning, match="gates trained on .* used on"):
        parts = models.build(load(make_values(tmp_path, model=str(tmp_path / "half"), gates={"path": str(gates[0])})), torch.float32, "cpu")
    assert torch.equal(parts.gates["layers.1.gate.bias"], gates[1]["layers.1.gate.bias"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": {"path": "x", "start_cr": 5}}, "gates.start_cr is 5, and the ratio rises from it to target_cr 4"),
        ({"warm_start": {"steps": 2}}, "warm_start trains gates from 0"),
        ({"dms": {"window": 8, "gate": "borrowed"}}, "which has no weights of its own; remove gates"),
    ],
)
def test_recipes_that_are_refused(changes, message, make_values, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(make_values(tmp_path, **{"gates": {"path": "x"}} | changes))

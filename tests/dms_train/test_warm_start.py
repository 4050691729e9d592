"""Warm-up steps: gates learn labels of the dense model's future attention, and the run goes on from there."""

import json
from pathlib import Path

import pytest
import torch
from dms_train import artifacts, loop
from dms_train.recipe import RetrofitRecipe
from dms_train.step import Normalizer, target_at
from dms_train.warm_start import StepPlan, plan_step, warm_up_step
from safetensors.torch import load_file

import dms
from dms.io import base_models
from dms.lm_head import hidden_states
from dms.modes import Noise, set_mode
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import train_pass


def make_recipe(values, /, **warm):
    return RetrofitRecipe.model_validate({**values, "trial": {**values.get("trial", {}), "warm_start": {"steps": 4, **warm}}})


def make_batch(num_sequences, num_tokens=96, pad_last=0):
    segment = torch.ones(num_sequences, num_tokens, dtype=torch.long)
    if pad_last:
        segment[-1, -pad_last:] = 0
    return {
        "input_ids": torch.randint(2, 500, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(2)),
        "segment_ids": segment,
        "position_ids": torch.arange(num_tokens).repeat(num_sequences, 1),
        "number": torch.arange(num_sequences),
    }


def make_student(folder, **options):
    model = base_models.load_base(str(folder), "float32")
    return dms.retrofit(model, dms.DMSConfig(**options)).train()


@pytest.mark.parametrize(
    ("options", "warm", "budget"),
    [
        ({"window": 8}, {}, "decided"),
        ({"window": 8, "alignment": "next", "sinks": 2}, {"scope": "model", "label": "sum", "values": True}, "end"),
        ({"window": 8, "granularity": "layer"}, {"heads": "mean", "label": "mean"}, "mean"),
        ({"window": [8, 24]}, {}, "end"),
        ({"window": 8, "gate_input": "hidden+key+key_rotated", "gate_hidden": 16}, {}, "decided"),
    ],
)
def test_gates_learn_to_save_about_what_is_asked(options, warm, budget, recipe_values, tiny_folder):
    recipe = make_recipe({**recipe_values, "dms": options, "budget": budget}, keep=0.4, **warm)
    student, batch = make_student(tiny_folder, **options), make_batch(4, pad_last=20)
    student.dms.budget = budget
    optimizer = torch.optim.AdamW(gate_parameters(student).values(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = warm_up_step(student, batch, recipe, 0.6, Normalizer(1, 4))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    # What noisy decisions of the next training pass save, counted there.
    set_mode(student, "train", Noise(0, batch["number"]))
    hidden_states(student, {"input_ids": batch["input_ids"], "attention_mask": batch["segment_ids"]})
    forward = train_pass(student)
    saved = sum(count.sum() for count in forward.evicted_count.values()) / sum(count.sum() for count in forward.decided_count.values())
    assert float(saved) == pytest.approx(0.6, abs=0.12)
    assert float(saved) == pytest.approx(float(output.evicted / output.decided), abs=0.05)


def test_micro_batches_add_up_to_the_same_step(recipe_values, tiny_folder):
    recipe, student, batch = make_recipe(recipe_values), make_student(tiny_folder, window=8), make_batch(4, pad_last=20)
    found = []
    for size in (4, 1):
        parts = [{name: x[first : first + size] for name, x in batch.items()} for first in range(0, 4, size)]
        outputs = [warm_up_step(student, part, recipe, 0.6, Normalizer(1, 4)) for part in parts]
        sum(output.loss for output in outputs).backward()
        sums = [sum(getattr(output, name) for output in outputs) for name in ("kl", "evicted", "decided")]
        found.append([*sums, *(p.grad.clone() for p in gate_parameters(student).values())])
        student.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert all((gradient != 0).any() for gradient in found[0][3:])


def test_each_phase_has_its_own_schedule(recipe_values):
    optimizer = {"lr": 2e-3, "warmup_steps": 2, "final_lr": 0.1}
    recipe = make_recipe({**recipe_values, "optimizer": optimizer, "ramp": 0.5}, lr=1e-2, keep=0.2, start_cr=2)
    plans = [plan_step(recipe, step) for step in range(1, 9)]
    assert [plan.warms_up for plan in plans] == [True] * 4 + [False] * 4
    assert [plan.target_cr for plan in plans] == pytest.approx([5.0] * 4 + [3.0, 4.0, 4.0, 4.0])
    assert [plan.lr_factor for plan in plans] == pytest.approx([2.5, 5.0, 2.75, 0.5, 0.5, 1.0, 0.55, 0.1])


def test_without_it_the_schedule_is_as_it_was(recipe_values):
    recipe = RetrofitRecipe.model_validate(recipe_values)
    for step in range(1, 9):
        target_cr, target = target_at(step, steps=8, ramp=0.8, target_cr=4.0)
        assert plan_step(recipe, step) == StepPlan(False, target_cr, target, 1.0)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
        yield


def test_a_run_cut_off_in_its_warm_up_goes_on_as_if_it_had_not_been(make_values, tmp_path, monkeypatch):
    def make(name):
        values = make_values(tmp_path / name, steps=6, save={"every": 2}, evaluation={"num_documents": 2, "num_items": 2})
        return make_recipe(values, start_cr=2.0)

    loop.run(make("whole"))
    original, taken = loop.Engine.step, []

    def cut(engine):
        taken.append(1)
        if len(taken) == 4:
            raise InterruptedError
        return original(engine)

    monkeypatch.setattr(loop.Engine, "step", cut)
    with pytest.raises(InterruptedError):
        loop.run(make("cut"))
    monkeypatch.setattr(loop.Engine, "step", original)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_000002"]
    loop.run(make("cut"))

    lines = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "cut")}
    for name in ("step", "loss", "kl", "target_cr", "cr_decided", "lr", "tokens"):
        assert [line[name] for line in lines["cut"]] == [line[name] for line in lines["whole"]], name
    assert [line["kl"] is None for line in lines["whole"]] == [True] * 4 + [False] * 2
    gates = [load_file(tmp_path / name / "model" / "gates.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, gates[1][name]) for name, tensor in gates[0].items())
    assert Path(tmp_path / "whole" / "model" / "gates.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("changes", "warm", "message"),
    [
        ({}, {"steps": 8}, "trial.warm_start.steps is 8 of 8 steps"),
        ({}, {"start_cr": 5}, "start_cr is 5, and the ratio rises to target_cr 4"),
        ({"save": {"at_cr": [2]}}, {}, r"save.at_cr is \[2.0\], which does not go with trial.warm_start"),
        ({"sequence_parallel": 2}, {}, "sequence_parallel is 2, which does not go with trial.warm_start; set sequence_parallel=1"),
        ({"trial": {"kl_ceiling": 0.1}}, {}, "trial.kl_ceiling is 0.1, which does not go with trial.warm_start; set trial.kl_ceiling=null"),
        ({"target_cr": 1}, {}, "target_cr is 1, so that labels would evict nothing"),
        ({"budget": "end", "dms": {"window": 100}}, {}, r"keep 25.0% of the entries .* the window alone holds 52.6% of data.length 192"),
        ({"budget": "mean"}, {"keep": 0.09}, r"keep 9.0% of the entries .* the window alone holds 9.1% of data.length 192"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, warm, message, recipe_values):
    with pytest.raises(ValueError, match=message):
        make_recipe({**recipe_values, **changes}, **warm)

"""Warm-up steps: gates learn labels of the dense model's future attention, and the run goes on from there."""

import io

import pytest
import torch
from dms_train import artifacts, loop, models
from dms_train.bench_gates_rows import training_figures
from dms_train.progress import StepLine
from dms_train.recipe import RetrofitRecipe
from dms_train.step import Normalizer, target_at
from dms_train.step_metrics import StepMetrics
from dms_train.warm_start import StepPlan, plan_step, warm_up_step
from jobs import Job, read_metrics
from rich.console import Console
from safetensors.torch import load_file

import dms
from dms.io import base_models
from dms.lm_head import hidden_states
from dms.modes import Noise, set_mode
from dms.retrofitting import gate_parameters
from dms.training.packed_attention import PackedAttention
from dms.training.soft_decisions import train_pass

LORA = {"trainable": "gates+lora", "optimizer": {"lr": 2e-3, "base_lr": 1e-2, "weight_decay": 0.1}, "lora": {"rank": 4}}
ALL = {"trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-3, "weight_decay": 0.1}}


def make_recipe(values, /, **warm):
    return RetrofitRecipe.model_validate({**values, "warm_start": {"steps": 4, **warm}})


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


def make_student(folder, budget="decided", **options):
    model = dms.retrofit(base_models.load_base(str(folder), "float32"), dms.DMSConfig(**options))
    model.dms.budget = budget
    return model.train()


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"window": 8}, "decided"),
        ({"window": 8, "alignment": "next", "sinks": 2}, "end"),
        ({"window": 8, "granularity": "layer"}, "mean"),
        ({"window": [8, 24]}, "end"),
    ],
)
def test_gates_learn_to_save_about_what_is_asked(options, budget, tiny_folder):
    student, batch = make_student(tiny_folder, budget, **options), make_batch(4, pad_last=20)
    optimizer = torch.optim.AdamW(gate_parameters(student).values(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = warm_up_step(student, batch, target=0.6, normalizer=Normalizer(1, 4))
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
    saved = float(saved.detach())
    assert saved == pytest.approx(0.6, abs=0.12)
    assert saved == pytest.approx(float(output.evicted / output.decided), abs=0.05)


def test_micro_batches_and_rows_give_the_same_step(tiny_folder):
    student, batch = make_student(tiny_folder, window=8), make_batch(4, pad_last=20)
    found = []
    for size, attention in ((4, None), (1, None), (4, PackedAttention())):
        parts = [{name: x[first : first + size] for name, x in batch.items()} for first in range(0, 4, size)]
        parts = parts if attention is None else [attention.divide(part) for part in parts]
        outputs = [warm_up_step(student, part, target=0.6, normalizer=Normalizer(1, 4), attention=attention) for part in parts]
        sum(output.loss for output in outputs).backward()
        sums = [sum(getattr(output, name) for output in outputs) for name in ("kl", "evicted", "decided")]
        found.append([*sums, *(p.grad.clone() for p in gate_parameters(student).values())])
        student.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-6)
    assert all((gradient != 0).any() for gradient in found[0][3:])


@pytest.mark.parametrize("changes", [LORA, {**ALL, "activation_checkpointing": True}], ids=["lora", "all"])
def test_gates_alone_train_on_the_labels_of_the_dense_model(changes, recipe_values, tiny_folder):
    if changes["trainable"] == "gates+lora":
        pytest.importorskip("peft")
    parts = models.build(make_recipe({**recipe_values, **changes}), torch.float32, "cpu")
    for name, parameter in parts.base.items():
        if "lora_B" in name:
            # Adapters that do something are off all the same.
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    batch, plain = make_batch(2), make_student(tiny_folder, window=8)
    ours, expected = (warm_up_step(model, batch, target=0.6, normalizer=Normalizer(1, 2)) for model in (parts.student, plain))
    torch.testing.assert_close(ours.loss, expected.loss)
    for output in (ours, expected):
        output.loss.backward()
    for name, parameter in gate_parameters(plain).items():
        torch.testing.assert_close(parts.gates[name].grad, parameter.grad)
    assert parts.base and all(parameter.grad is None for parameter in parts.base.values())


def test_each_phase_has_its_own_schedule(recipe_values):
    optimizer = {"lr": 2e-3, "warmup_steps": 2, "final_lr": 0.1}
    values = {**recipe_values, "optimizer": optimizer, "ramp": 0.5, "target_cr": 5}
    plans = [plan_step(make_recipe(values, lr=1e-2, start_cr=2), step) for step in range(1, 9)]
    assert [plan.warms_up for plan in plans] == [True] * 4 + [False] * 4
    assert [plan.target_cr for plan in plans] == pytest.approx([5.0] * 4 + [3.5, 5.0, 5.0, 5.0])
    assert all(plan.target == pytest.approx(1 - 1 / plan.target_cr) for plan in plans)
    assert [plan.lr_factor for plan in plans] == pytest.approx([2.5, 5.0, 2.75, 0.5, 0.5, 1.0, 0.55, 0.1])
    # By default the same learning rate, and from half of the target on.
    plans = [plan_step(make_recipe(values), step) for step in (2, 5)]
    assert [plan.lr_factor for plan in plans] == pytest.approx([1.0, 0.5]) and plans[1].target_cr == pytest.approx(3.75)
    assert make_recipe({**values, "target_cr": 1.5}).start_cr == 1.0


def test_the_first_ratio_that_is_saved_is_that_of_the_labels(recipe_values):
    recipe = make_recipe({**recipe_values, "ramp": 1.0, "target_cr": 8, "save": {"at_cr": [4]}})
    plans = [plan_step(recipe, step) for step in range(1, 9)]
    assert [plan.target_cr for plan in plans] == pytest.approx([4.0] * 4 + [3.5, 5.0, 6.5, 8.0])
    assert [plan.target for plan in plans[:4]] == [0.75] * 4
    reached = [step for step in range(1, 9) if loop._has_reached(4.0, recipe, step)]
    assert reached == [6, 7, 8] and loop._has_reached(8.0, recipe, 8)


def test_without_it_the_schedule_is_that_of_the_paper(recipe_values):
    recipe = RetrofitRecipe.model_validate(recipe_values)
    for step in range(1, 9):
        cr = 1 + 3 * min(1, step / 6.4)
        assert target_at(step, steps=8, ramp=0.8, target_cr=4.0) == (cr, 1 - 1 / cr)
        assert plan_step(recipe, step) == StepPlan(False, cr, 1 - 1 / cr, 1.0)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
        yield


def _gates(folder):
    return load_file(folder / "model" / "gates.safetensors")


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_cut_off_in_its_warm_up_goes_on_as_if_it_had_not_been(make_values, tmp_path, monkeypatch):
    def make(name):
        return make_recipe(make_values(tmp_path / name, steps=6, save={"every": 2}, evaluation={"num_documents": 2, "num_items": 2}))

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

    whole, cut_off = (read_metrics(tmp_path / name) for name in ("whole", "cut"))
    for name in ("step", "loss", "kl", "target_cr", "cr_decided", "lr", "tokens"):
        assert [line[name] for line in cut_off] == [line[name] for line in whole], name
    assert [line["kl"] is None for line in whole] == [True] * 4 + [False] * 2
    assert _same(_gates(tmp_path / "whole"), _gates(tmp_path / "cut"))
    # What reads a run's figures knows that the first steps have no KL.
    assert training_figures(tmp_path / "whole")["training_kl"] == pytest.approx(whole[-1]["kl"])


def test_null_is_the_same_run_as_without_the_key_and_another_than_a_warm_start(make_values, tmp_path):
    def run(name, **changes):
        values = make_values(tmp_path / name, steps=2, evaluation={"num_documents": 2, "num_items": 2}, **changes)
        loop.run(RetrofitRecipe.model_validate(values))
        return _gates(tmp_path / name)

    without = run("without")
    assert _same(run("null", warm_start=None), without)
    assert not _same(run("warm", warm_start={"steps": 1}), without)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA, ALL], ids=["gates", "lora", "all"])
def test_two_processes_take_the_same_course_as_one(changes, make_values, tmp_path):
    values = {"steps": 6, "warm_start": {"steps": 3}, "evaluation": {"num_documents": 2, "num_items": 2}, **changes}
    loop.run(RetrofitRecipe.model_validate(make_values(tmp_path / "one", **values)))
    job = Job(make_values(tmp_path / "two", **{**values, "micro_batch_size": 1}), 2)
    assert job.wait() == 0, job.output
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02) and (ours["kl"] is None) == (theirs["kl"] is None)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_the_line_of_a_warm_up_step_says_what_its_loss_is_of():
    out = io.StringIO()
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 1.0)
    with StepLine(Console(file=out, width=120), 2) as line:
        line.update(StepMetrics(**{**values, "step": 1, "kl": None, "loss": 0.25}))
        line.update(StepMetrics(**{**values, "step": 2, "kl": 0.5}))
    first, second = out.getvalue().splitlines()
    assert "labels 0.2500" in first and "kl" not in first and "kl 0.5000" in second


@pytest.mark.parametrize(
    ("changes", "warm", "message"),
    [
        ({}, {"steps": 8}, "warm_start.steps is 8 of 8 steps"),
        ({}, {"start_cr": 5}, "warm_start.start_cr is 5, and the ratio rises from it to target_cr 4"),
        (
            {"save": {"at_cr": [2]}},
            {"start_cr": 2},
            r"save.at_cr has \[2.0\]; the ratio rises from 2 to target_cr 4",
        ),
        ({"sequence_parallel": 2}, {}, "sequence_parallel is 2, which does not go with warm_start .*set sequence_parallel=1"),
        ({"zero": {"stage": 2}}, {}, "zero.stage is 2, which does not go with warm_start .*set zero.stage=0"),
        ({"target_cr": 1}, {}, "target_cr is 1, with which the labels of warm_start evict nothing"),
        ({"budget": "end", "dms": {"window": 100}}, {}, r"keep 1 / target_cr = 25.0% of what budget=end .* hold 52.6% in data.length 192"),
        ({"budget": "mean", "target_cr": 12}, {}, r"keep 1 / target_cr = 8.3% of what budget=mean .* hold 9.1% in data.length 192"),
        ({}, {"scope": "model"}, "scope"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, warm, message, recipe_values):
    with pytest.raises(ValueError, match=message):
        make_recipe({**recipe_values, **changes}, **warm)

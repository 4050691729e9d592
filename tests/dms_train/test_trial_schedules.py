"""Schedules under trial: a target that waits for the KL, a temperature that falls, and runs that are cut off with both."""

import json
from itertools import pairwise

import pytest
from dms_train import loop
from dms_train.recipe import RetrofitRecipe
from dms_train.step import target_at
from dms_train.trial_schedules import WaitingRamp, tau_at
from jobs import read_metrics, trajectory


def ratios(kls, steps=100, ramp=0.8, ceiling=0.1):
    """The target ratios of a run to CR 5 whose steps have these KLs."""
    state, found = WaitingRamp(), []
    for step, kl in zip(range(1, steps + 1), kls, strict=True):
        state = state.advance(step, steps=steps, ramp=ramp, kl_ceiling=ceiling)
        found.append(state.target(5.0)[0])
        state = state.after(kl)
    return found


def test_where_nothing_is_lost_the_target_rises_at_twice_the_pace():
    found = ratios([0.0] * 100)
    assert found[19] == pytest.approx(target_at(40, steps=100, ramp=0.8, target_cr=5.0)[0])
    assert found[39:] == pytest.approx([5.0] * 61)


def test_where_much_is_lost_the_target_waits_for_the_second_half():
    found = ratios([1.0] * 100)
    assert found[:40] == pytest.approx([found[0]] * 40)
    # The floor: a straight line from 1 at half the ramp to the target at its end.
    assert found[59] == pytest.approx(3.0) and found[79:] == pytest.approx([5.0] * 21)


def test_the_target_goes_on_when_the_running_mean_is_below_the_ceiling_again():
    found = ratios([0.0] * 9 + [0.4] + [0.0] * 90)
    rises = [later > earlier for earlier, later in pairwise(found)]
    # The mean is 0.08 after the tenth step: one step alone does not hold it.
    assert all(rises[:38])
    found = ratios([0.0] * 9 + [0.8] + [0.0] * 90)
    # 0.16, 0.128, 0.102, 0.082.
    assert [b > a for a, b in pairwise(found[8:16])] == [True, False, False, False, True, True, True]


def test_the_temperature_falls_by_the_same_factor_each_step():
    taus = [tau_at(step, steps=100, ramp=0.8, start=1.0, end=0.1) for step in range(1, 101)]
    assert taus[39] == pytest.approx(0.1**0.5)
    assert [later / earlier for earlier, later in pairwise(taus[:80])] == pytest.approx([0.1 ** (1 / 80)] * 79)
    assert taus[79:] == [0.1] * 21
    assert tau_at(1, steps=100, ramp=0.8, start=None, end=0.1) is None


class Cut(Exception):
    pass


def test_a_run_that_is_continued_has_the_same_schedules(make_values, tmp_path, monkeypatch):
    """Cut in step 4, after the checkpoint of step 3: what the target waited for is in it."""
    trial = {"kl_ceiling": 1e-5, "tau_start": 1.0, "hidden_weight": 0.5, "hard_token_power": 0.5, "budget_scope": "head"}
    changes = {"trial": trial, "save": {"every": 3}, "steps": 6, "evaluation": {"num_documents": 1, "num_items": 1}}
    recipes = [RetrofitRecipe.model_validate(make_values(tmp_path / name, **changes)) for name in ("whole", "cut")]
    # A run so short evicts next to nothing.
    monkeypatch.setattr(loop, "_NEXT_TO_NOTHING", -1.0)
    loop.run(recipes[0])
    step = loop.Engine.step

    def cutting(engine):
        if len(trajectory(tmp_path / "cut")) == 3:
            raise Cut
        return step(engine)

    monkeypatch.setattr(loop.Engine, "step", cutting)
    with pytest.raises(Cut):
        loop.run(recipes[1])
    monkeypatch.setattr(loop.Engine, "step", step)
    ramp = json.loads((tmp_path / "cut/checkpoints/step_000003/manifest.json").read_text())["position"]["ramp"]
    assert 0 < ramp["done"] < 1 and ramp["kl"] > 1e-5
    loop.run(recipes[1])
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")
    whole, cut = ([m["target_cr"] for m in read_metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == cut and whole[-1] == 4.0
    assert whole != [target_at(number, steps=6, ramp=0.8, target_cr=4.0)[0] for number in range(1, 7)]

"""Comparisons of gates: what is refused before the first run, which runs are started, what is counted and what is shown."""

import fcntl
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from dms_train import bench_gates, bench_gates_rows, bench_gates_runs, bench_gates_table
from dms_train.bench_gates import GateComparison
from dms_train.bench_gates_reading import Entries, bias_at, budget_of_mean, entries_of_budget, read_masked, scaled_windows
from dms_train.bench_gates_rows import RowFile
from dms_train.recipe_file import load_recipe, packaged_recipes
from dms_train.stopping import Stopped
from rich.console import Console
from said import says

import dms
from dms import masks
from dms.evaluation.engine.one_pass import read_in_one_pass
from dms.evaluation.engine.run_end import make_documents
from dms.io import base_models
from dms.lm_head import hidden_states
from dms.retrofitting import gate_parameters

# A run at its smallest: what the recipe says of the rest is the packaged one's.
SHORT = {
    "dms.window": 8,
    "data.length": 128,
    "data.items": [1, 2],
    "steps": 3,
    "batch_size": 2,
    "micro_batch_size": 2,
    "evaluation.num_documents": 2,
    "evaluation.num_items": 2,
    "tracking.wandb": "off",
}


def values_of(folder, **changes):
    return {
        "recipe": "tiny/retrofit",
        "overrides": SHORT,
        "variants": {"near": {"dms.window": 8}, "far": {"dms": {"window": 24}}},
        "target_cr": [4],
        "seeds": [0],
        "output_dir": str(folder),
        "evaluation": {"lengths": [128], "num_documents": 4, "num_items": 2},
        **changes,
    }


def read(folder, **changes) -> GateComparison:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values_of(folder, **changes), sort_keys=False))
    return load_recipe(str(path), [], GateComparison)


def test_the_packaged_comparison_is_valid():
    (name,) = [name for name in packaged_recipes() if "compare" in name]
    runs = bench_gates.make_runs(load_recipe(name, [], GateComparison))
    assert len({run.digest for run in runs}) == len({run.folder for run in runs}) == len(runs) == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"overides": {}, "evaluation": {"lenghts": [64]}},
            ["'overides' (did you mean 'overrides'?)", "'lenghts' (did you mean 'lengths'?)", "key 'lengths' is missing"],
        ),
        (
            {"variants": {"a/b": {"seed": 1}}, "target_cr": [4, 4]},
            ["'a/b' is no name", "variants.a/b: seed is not for here", "4.0 is given 2 times"],
        ),
        ({"baselines": ["slidng_window"], "evaluation": {"lengths": [8]}}, ["did you mean 'sliding_window'?", "8 is too short"]),
        ({"variants": {}}, ["variants"]),
    ],
)
def test_a_damaged_file_is_refused_with_all_that_is_wrong(tmp_path, changes, words):
    with pytest.raises(ValueError) as refused:
        read(tmp_path / "out", **changes)
    assert all(part in str(refused.value) for part in words), refused.value


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        (
            {"fine": {}, "one": {"dms.windw": 8}, "two": {"stps": 3}},
            ["variant one: ", "'windw' (did you mean 'window'?)", "variant two: ", "'stps'"],
        ),
        ({"long": {"data.length": 4096}}, ["variant long: data.length is 4096 and the context"]),
        ({"one": {"steps": 4}, "two": {"steps": 4, "save.every": 2}}, ["one and two are the same recipe"]),
        ({"one": {}, "all": {"trainable": "all", "optimizer.base_lr": 1e-4}}, ["variant all: trainable is 'all'"]),
    ],
)
def test_a_variant_whose_recipe_is_refused_is_named_before_any_run(tmp_path, variants, words):
    with pytest.raises(ValueError, match="no run was started") as refused:
        bench_gates.run(read(tmp_path / "out", variants=variants))
    assert all(part in str(refused.value) for part in words), refused.value
    assert "fine" not in str(refused.value) and not (tmp_path / "out").exists()


def test_sections_of_a_variant_are_added_and_a_digest_counts_what_makes_another_run(tmp_path):
    near, far = bench_gates.make_runs(read(tmp_path / "out"))
    assert far.recipe.dms.window == 24 and far.recipe.data.length == 128 and near.digest != far.digest
    assert near.folder == tmp_path / "out" / "near" / "cr4-seed0"
    same, _ = bench_gates.make_runs(read(tmp_path / "elsewhere", overrides={**SHORT, "save.every": 1, "dms.sinks": 0}))
    assert same.digest == near.digest
    other, _ = bench_gates.make_runs(read(tmp_path / "out", seeds=[1]))
    assert other.digest != near.digest


# In the place of `dms retrofit`: it fails where the window is 24, and lasts until it is told to stop where steps are 99.
_STUB = """
import json, pathlib, shutil, signal, sys, time, yaml
recipe = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(recipe["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(sys.argv[1], folder / "recipe.yaml")
(folder / "metrics.jsonl").touch()
with (folder / "starts").open("a") as file: file.write("x")
if recipe["dms"]["window"] == 24: sys.exit("dms: error: no such luck")
if recipe["steps"] == 99:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waits").touch()
    time.sleep(60)
(folder / "result.json").write_text("{}")
"""


class Evaluator:
    """In the place of the real one: notes what it is asked for."""

    asked: list[str]

    def __init__(self, comparison, recipe, between):
        Evaluator.asked = []

    def evaluate(self, run):
        Evaluator.asked.append(run.name)

    def evaluate_baselines(self, runs):
        Evaluator.asked.append(f"baselines of {len(runs)}")


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """stubbed(**changes) -> (the comparison, its runs, a function that makes them and returns what was said)."""
    script = tmp_path / "stub.py"
    script.write_text(_STUB)
    monkeypatch.setattr(bench_gates_runs, "RETROFIT", (sys.executable, str(script)))
    monkeypatch.setattr(bench_gates_rows, "Evaluator", Evaluator)

    def make(**changes):
        comparison = read(tmp_path / "out", **changes)
        runs = bench_gates.make_runs(comparison)

        def go() -> str:
            console = Console(record=True, width=200, quiet=False)
            bench_gates_runs.make_all(comparison, runs, console)
            return console.export_text()

        return comparison, runs, go

    return make


def test_a_run_that_fails_is_named_and_the_others_go_on(stubbed, tmp_path):
    comparison, (far, near), go = stubbed(variants={"far": {"dms.window": 24}, "near": {"dms.window": 8}})
    said = go()
    assert says(said, "far/cr4-seed0 failed: error: no such luck (exit code 1")
    assert Evaluator.asked == ["near/cr4-seed0", "baselines of 1"]
    assert near.is_finished and not far.is_finished
    # The same command tries what failed once more, and nothing else.
    go()
    assert (near.folder / "starts").read_text() == "x" and (far.folder / "starts").read_text() == "xx"
    console = Console(record=True, width=200)
    assert not bench_gates_table.show(comparison, [near, far], console)
    assert says(console.export_text(), "far/cr4-seed0 failed: error: no such luck")
    assert "no such luck" in (tmp_path / "out" / "table.md").read_text()


def test_a_folder_of_another_recipe_is_refused_and_one_made_elsewhere_is_taken(stubbed, tmp_path):
    _, (near,), go = stubbed(variants={"near": {"dms.window": 8}})
    go()
    near.beside(".yaml").unlink()
    near.beside(".lock").unlink()
    go()
    assert (near.folder / "starts").read_text() == "x" and Evaluator.asked[0] == near.name
    # Keys that came since have their defaults there.
    stored = yaml.safe_load((near.folder / "recipe.yaml").read_text())
    del stored["beta"]
    (near.folder / "recipe.yaml").write_text(yaml.safe_dump(stored))
    bench_gates.check_folders([near])
    _, changed, _ = stubbed(variants={"near": {"dms.window": 9}})
    with pytest.raises(ValueError, match=r"cr4-seed0 holds another run: dms.window is 8 there and 9 here"):
        bench_gates.check_folders(changed)


def test_a_signal_stops_the_runs_and_the_same_command_goes_on(stubbed, monkeypatch):
    _, runs, go = stubbed(variants={"near": {"steps": 99}, "next": {"steps": 99, "dms.window": 9}, "third": {}}, processes=2)
    naps = time.sleep

    def nap(seconds):
        naps(0.02)
        if all((run.folder / "waits").exists() for run in runs[:2]):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(bench_gates_runs.time, "sleep", nap)
    with pytest.raises(Stopped, match="stopped by SIGTERM with 0 of 3 runs finished") as stopped:
        go()
    assert stopped.value.code == 75 and not runs[2].folder.exists()
    # They have ended, or their locks would still be held.
    for run in runs:
        held = bench_gates_runs.lock(run)
        assert held is not None
        held.close()


def test_two_benches_do_not_start_one_run_and_a_lock_lasts_as_long_as_its_process(stubbed):
    _, (near,), go = stubbed(variants={"near": {"dms.window": 8}})
    held = bench_gates_runs.lock(near)
    assert says(go(), "other processes make near/cr4-seed0") and not near.folder.exists()
    orphan = subprocess.Popen(["sleep", "60"], pass_fds=(held.fileno(),))
    held.close()
    try:
        assert bench_gates_runs.lock(near) is None
    finally:
        orphan.kill()
        orphan.wait()
    # A run that was started without the bench.
    near.folder.mkdir()
    with (near.folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert bench_gates_runs.lock(near) is None
    bench_gates_runs.lock(near).close()


@pytest.fixture(scope="module")
def gated():
    return _gated(8)


def _gated(window):
    """The embedded model with gates that decide at random, and documents for it."""
    model = base_models.load_base("builtin:tiny", "float32", "cpu")
    dms.retrofit(model, dms.DMSConfig(window=window, sinks=2, scale=1.0, offset=0.0, alignment="next"))
    generator = torch.Generator().manual_seed(1)
    for parameter in gate_parameters(model).values():
        parameter.data.normal_(0, 0.3, generator=generator)
    documents = make_documents(base_models.load_tokenizer("builtin:tiny"), num_documents=3, length=160, num_items=3)
    dms.set_mode(model, "dense")
    with torch.no_grad():
        dense = [hidden_states(model, {"input_ids": torch.tensor([d.input_ids for d in documents[i : i + 2]])}) for i in (0, 2)]
    return model, documents, dense


def _assert_same_metrics(found, expected):
    assert found.keys() - {("text", "kl")} == expected.keys()
    for name, sums in expected.items():
        assert found[name].numerators == pytest.approx(sums.numerators, rel=1e-3), name
        assert found[name].denominators == sums.denominators


@pytest.mark.parametrize("window", [8, (4, 20, 60)])
def test_without_a_cache_the_figures_are_those_of_the_cache(window, gated):
    model, documents, dense = gated if window == 8 else _gated(window)
    metrics, entries = read_masked(model, documents, dense, batch_size=2)
    cached = read_in_one_pass(model, documents, "dms", budget=None, batch_size=2, chunk=64, seed=0)
    _assert_same_metrics(metrics, cached.metrics)
    figures = entries.figures()
    assert (entries.seen, entries.alive) == (cached.seen, cached.alive) and figures["cr"] == cached.seen / cached.alive > 1.5
    assert (entries.evicted, entries.decided) == (cached.evicted, cached.decided)
    if window == 8:
        # Of several windows a share for each, where the cache counts tokens that any of them evicts.
        torch.testing.assert_close(torch.tensor(list(figures["evicted_share"].values())), torch.tensor(cached.evicted_share_LH))
    assert figures["entries_end"] == pytest.approx(sum(cached.entries) / 3)
    assert sum(metrics["text", "kl"].numerators) > 1 and metrics["text", "kl"].denominators == [159] * 3


def test_a_sliding_window_without_a_cache_is_the_policys(gated, monkeypatch):
    model, documents, dense = gated
    cached = read_in_one_pass(model, documents, "sliding_window", budget=40, batch_size=2, chunk=64, seed=0)
    written = []
    evaluator = object.__new__(bench_gates_rows.Evaluator)
    settings = bench_gates.GateEvaluation(lengths=[160], num_documents=3, num_items=3, batch_size=2)
    evaluator.comparison = type("Some", (), {"evaluation": settings})
    evaluator.documents, evaluator._hidden, evaluator._dense = {160: documents}, {160: dense}, {160: cached.metrics}
    evaluator._plain, evaluator.between = model, lambda: None
    seen = []
    original = bench_gates_rows.read_masked
    monkeypatch.setattr(bench_gates_rows, "read_masked", lambda *given, **named: seen.append(original(*given, **named)) or seen[-1])
    evaluator._write = lambda name, figures, seconds: written.append(figures)
    before = model.dms.config
    model.dms.config = dms.DMSConfig(window=8, alignment="own")
    try:
        evaluator._read_policy({}, "sliding_window", 40, 160)
    finally:
        model.dms.config = before
    assert model.dms.evict_bias == 0.0
    ((metrics, entries),), (figures,) = seen, written
    _assert_same_metrics(metrics, cached.metrics)
    assert entries.alive == cached.alive
    assert (figures["entries_end"], figures["entries_mean"]) == pytest.approx(entries_of_budget(40, 160))


def test_budgets_equal_the_entries_in_the_mean():
    rng = Random(0)
    for length in (64, 128, 513):
        for _ in range(20):
            budget = rng.randint(1, length)
            end, mean = entries_of_budget(budget, length)
            assert mean == pytest.approx(sum(min(q + 1, budget) for q in range(length)) / length) and end == budget
            assert budget_of_mean(mean, length) == budget


def test_entries_of_gates_that_keep_all_and_of_none():
    ids = torch.zeros(2, 10, dtype=torch.long)
    whole, nothing = Entries(), Entries()
    whole.add(dms.DMSConfig(window=0), {1: torch.zeros(2, 10, 3, dtype=torch.bool)}, ids)
    nothing.add(dms.DMSConfig(window=1, alignment="own"), {1: torch.ones(2, 10, 3, dtype=torch.bool)}, ids)
    assert whole.figures() | {"evicted_share": 0} == {
        "cr": 1.0,
        "cr_mean": 1.0,
        "cr_decided": 1.0,
        "entries_end": 10.0,
        "entries_mean": 5.5,
        "evicted_share": 0,
    }
    found = nothing.figures()
    assert (found["entries_end"], found["cr"], found["evicted_share"]) == (2.0, 5.0, {"1": [1.0] * 3})
    assert found["entries_mean"] == pytest.approx(1.9) and found["cr_mean"] == pytest.approx(5.5 / 1.9)


def test_entries_of_gates_that_choose_among_lifetimes():
    """Counted as queries see them: one token of four stays, one goes after 1 more, one after 3, one after 1 whatever decision 2 says."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    evicted = torch.zeros(1, 8, 1, 2, dtype=torch.bool)
    evicted[0, 1::4, 0, 0] = evicted[0, 2::4, 0, 1] = evicted[0, 3::4, 0] = True
    entries = Entries()
    entries.add(dms.DMSConfig(window=[1, 3], alignment="own"), {0: evicted}, ids)
    tokens = masks.locate_tokens(1, 8, torch.device("cpu"), None, None, None)
    see = masks.visible(tokens, tokens, evicted, window=(1, 3), sinks=0)
    found = entries.figures()
    assert (found["entries_end"], found["entries_mean"]) == (see[0, 0, -1].sum(), pytest.approx(see.sum() / 8))
    # 0, 4 stay; 6 and 7 are near.
    assert found["entries_end"] == 4 and found["cr_decided"] == 4.0 and found["evicted_share"] == {"0": [[0.5, 0.5]]}


def test_torn_rows_are_left_out(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.add({"a": 1})
    with rows.path.open("a") as file:
        file.write('{"a": 2, "b"')
    rows.add({"a": 3, "b": 4})
    rows.add({"a": 3, "b": 5})
    assert [row["a"] for row in rows.read()] == [1, 3, 3] and rows.find(a=3) == {"a": 3, "b": 5} and rows.find(a=2) is None


def _row(name, **figures):
    return {**name, "kl": 0.1, "bits_per_byte": 1.5, "recall": 0.9, "cr": 4.0, "cr_mean": 3.0, **figures}


def test_the_table_shows_means_and_half_ranges_beside_policies_of_equal_memory(tmp_path):
    comparison = read(tmp_path / "out", variants={"near": {}}, seeds=[0, 1], target_cr=[4, 8])
    runs = bench_gates.make_runs(comparison)
    rows = RowFile(tmp_path / "out" / "rows.jsonl")
    for run in runs[:2]:
        (run.folder / "gates").mkdir(parents=True)
        (run.folder / "gates" / "gates.safetensors").write_bytes(b"")
        (run.folder / "result.json").touch()
        name = bench_gates_rows.name_of_run(run, 128, "at_target", comparison)
        rows.add(_row(name, kl=0.1 + 0.1 * run.recipe.seed, entries_end=31.0 + run.recipe.seed * 2, entries_mean=20.0))
    policy = bench_gates_rows.name_of_policy
    rows.add(_row(policy("dense", None, 128, comparison, "builtin:tiny"), bits_per_byte=1.25, entries_end=128.0, entries_mean=64.5))
    rows.add(_row(policy("sliding_window", 32, 128, comparison, "builtin:tiny"), bits_per_byte=1.75, entries_end=32.0, entries_mean=28.0))
    console = Console(record=True, width=110)
    assert not bench_gates.run(comparison, table_only=True, console=console)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| near | 2 | 4.00 ±0.00 | 3.00 ±0.00 | 0.1500 ±0.0500 | 1.5000 ±0.0000 | 0.2500 ±0.0000 | 0.900 ±0.000 | - |" in table
    assert "| sliding_window of 32: end of near |  | 4.00 | 3.00 | 0.1000 | 1.7500 | 0.5000 |" in table
    assert "near/cr8-seed0 is not finished" in table and says(console.export_text(), "near/cr8-seed1 is not finished")
    picture = (tmp_path / "out" / "pareto.svg").read_bytes()
    assert picture.startswith(b"<?xml") and picture.count(b"<image") == 0
    bench_gates.run(comparison, table_only=True, console=Console(quiet=True))
    assert (tmp_path / "out" / "pareto.svg").read_bytes() == picture


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_and_names_what_failed(tmp_path):
    """The command itself, from the embedded model to the table."""
    folder, path = tmp_path / "out", tmp_path / "compare.yaml"
    # Refused where processes are counted, which no recipe says.
    broken = {"sequence_parallel": 2}
    values = values_of(folder, variants={"near": {"dms.window": 8, "steps": 30}, "broken": broken, "far": {"dms.window": 24}})
    values["evaluation"]["lengths"] = [128, 192]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, "-m", "dms_train.cli", "bench", "gates", str(path)]
    metrics = folder / "near" / "cr4-seed0" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        while not (metrics.exists() and metrics.stat().st_size):
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 75, (tmp_path / "log").read_text()
    assert not (folder / "near" / "cr4-seed0" / "result.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and says(again.stdout, "broken/cr4-seed0 failed: "), again.stdout + again.stderr
    assert "continuing after step" in (folder / "near" / "cr4-seed0.log").read_text()
    rows = RowFile(folder / "rows.jsonl").read()
    ours = [row for row in rows if row["policy"] == "dms"]
    assert [(row["variant"], row["length"]) for row in ours] == [("near", 128), ("near", 192), ("far", 128), ("far", 192)]
    for row in ours:
        assert row["kl"] > 0 and row["cr_mean"] >= 1 and math.isfinite(row["training_kl"]) and row["tokens"] == row["steps"] * 256
        low, high = row["intervals"]["bits_per_byte"]
        assert low <= row["bits_per_byte"] <= high and row["bits_per_byte_vs_dense"]["verdict"]
    # Its own evaluation at the run's end, with a cache, says the same of the dense model.
    assert {row["budget"] for row in rows if row["policy"] == "sliding_window"} and sum(row["policy"] == "dense" for row in rows) == 2
    before = (folder / "rows.jsonl").read_text()
    third = subprocess.run([*command, "variants.broken={}", "--table-only"], capture_output=True, text=True, timeout=120)
    assert third.returncode == 0 and "far" in third.stdout, third.stderr
    assert (folder / "rows.jsonl").read_text() == before and json.loads(before.splitlines()[0])["policy"] == "dense"
    assert Path(folder / "pareto.svg").stat().st_size > 10_000


@pytest.mark.parametrize("target", [2.0, 3.7, 8.0, 30.0])
def test_the_bias_of_a_target_is_found_from_both_sides(target):
    assert bias_at(lambda bias: 8.0 * 1.1**bias, target) == pytest.approx(math.log(target / 8.0, 1.1), abs=0.15)


def test_a_target_that_is_out_of_reach_gets_the_nearest_bias():
    asked = []

    def ratio(bias):
        asked.append(bias)
        return 4.0 if bias < 3.0 else 5.0

    assert ratio(bias_at(ratio, 8.0)) == 5.0
    assert len(asked) < 20


def test_windows_are_scaled_in_proportion():
    assert scaled_windows(dms.DMSConfig(window=[8, 32, 128]), 4.0).windows == (32, 128, 512)
    assert scaled_windows(dms.DMSConfig(window=32), 0.5).window == 16
    with pytest.raises(ValueError, match="rising"):
        scaled_windows(dms.DMSConfig(window=[1, 2]), 0.25)

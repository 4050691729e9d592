"""Runs that are cut off go on as if nothing had been; what cannot go on is refused with the reason."""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from dms_train import artifacts, checkpoints, loop, models
from dms_train.engine import Engine, make_accelerator
from dms_train.recipe import RetrofitRecipe
from jobs import Job, read_metrics, trajectory
from rich.console import Console
from safetensors.torch import load_file, save_file
from said import says

import dms
from dms.io.weights import base_hash

SAVE = {"every": 3}


class Cut(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take as long as the steps, and nothing here looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
        yield


@pytest.fixture
def cut_at(monkeypatch):
    """cut_at(step): the next run ends there as by a power cut, after that step's forward and before its optimizer."""
    original = loop.Engine.step

    def arm(step):
        taken = []

        def stepping(engine):
            taken.append(1)
            if len(taken) == step:
                monkeypatch.setattr(loop.Engine, "step", original)
                raise Cut
            return original(engine)

        monkeypatch.setattr(loop.Engine, "step", stepping)

    return arm


def run(values, **changes):
    return loop.run(RetrofitRecipe.model_validate({**values, **changes}))


@pytest.fixture(scope="module")
def uninterrupted(make_values, tmp_path_factory):
    """The same run, never cut: trajectory and result by what trains."""
    done = {}

    def of(trainable):
        if trainable not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            values = {**make_values(folder), **TRAINABLE[trainable], "save": SAVE}
            done[trainable] = trajectory(folder) if run(values) else None, load_file(folder / "model" / "gates.safetensors")
        return done[trainable]

    return of


TRAINABLE = {
    "gates": {},
    "gates+lora": {"trainable": "gates+lora", "optimizer": {"lr": 2e-3, "base_lr": 1e-3, "warmup_steps": 1}, "lora": {"rank": 4}},
    "all": {"trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-4, "warmup_steps": 1}},
}


@pytest.mark.parametrize(
    "trainable", ["gates", pytest.param("gates+lora", marks=pytest.mark.slow), pytest.param("all", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_one(recipe_values, cut_at, uninterrupted, trainable):
    expected, gates = uninterrupted(trainable)
    values = {**recipe_values, **TRAINABLE[trainable], "save": SAVE}
    cut_at(6)
    with pytest.raises(Cut):
        run(values)
    folder = Path(values["output_dir"])
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000003"]
    run(values)
    assert trajectory(folder) == expected
    resumed = load_file(folder / "model" / "gates.safetensors")
    assert all(torch.equal(gates[name], resumed[name]) for name in gates)


def test_only_what_trains_is_written_and_nothing_is_pickled(recipe_values, tiny_folder):
    for trainable, changes in TRAINABLE.items():
        values = {**recipe_values, **changes, "output_dir": f"{recipe_values['output_dir']}-{trainable}", "save": SAVE}
        run(values)
        (folder,) = sorted(Path(values["output_dir"]).glob("checkpoints/step_000008"))
        assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
        base = sum(t.numel() for t in load_file(tiny_folder / "model.safetensors").values())
        held = {path.name: sum(t.numel() for t in load_file(path).values()) for path in folder.glob("*.safetensors")}
        assert held["gates.safetensors"] == 2 * 2 * (64 + 1)
        if trainable == "gates":
            assert set(held) == {"gates.safetensors", "optimizer.safetensors"}
        elif trainable == "gates+lora":
            # q, k, v, o, gate, up, down of both layers, rank 4.
            assert held["weights.safetensors"] == 2 * 4 * ((64 + 64) + (64 + 32) * 2 + (64 + 64) + (64 + 96) * 3)
        else:
            assert held["weights.safetensors"] == base
        manifest = json.loads((folder / "manifest.json").read_text())
        assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert manifest["base"]["hash"] == base_hash(tiny_folder)


def test_checkpoints_kept_and_dropped(recipe_values, tiny_folder):
    values = {**recipe_values, "save": {"every": 2, "keep_last": 1, "at_cr": [1.5, 3.0]}}
    run(values)
    folder = Path(values["output_dir"])
    kept = {path.name: json.loads((path / "manifest.json").read_text())["at_cr"] for path in (folder / "checkpoints").iterdir()}
    # CR rises by 3 / 6.4 a step: 1.5 at step 2, 3.0 at step 5.
    assert kept == {"step_000002": 1.5, "step_000005": 3.0, "step_000008": None}
    assert dms.load(folder / "checkpoints" / "step_000005", base=str(tiny_folder)).dms.mode == "evict"


def test_a_run_that_is_continued_may_be_followed_and_kept_otherwise(recipe_values, cut_at, uninterrupted, capsys):
    cut_at(6)
    with pytest.raises(Cut):
        run(recipe_values, save=SAVE)
    run(recipe_values, save={"every": 2}, evaluation={"num_documents": 4, "num_items": 2}, micro_batch_size=1)
    assert says(capsys.readouterr().out, "continued with micro_batch_size 1 instead of 2: the same sums in another order")
    expected, _ = uninterrupted("gates")
    for ours, theirs in zip(trajectory(recipe_values["output_dir"]), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_run_without_a_checkpoint_begins_anew(recipe_values, cut_at, uninterrupted, capsys):
    cut_at(2)
    with pytest.raises(Cut):
        run(recipe_values, save=SAVE)
    run(recipe_values, save=SAVE)
    assert says(capsys.readouterr().out, "without a checkpoint: it starts over")
    assert trajectory(recipe_values["output_dir"]) == uninterrupted("gates")[0]


@pytest.fixture
def unfinished(recipe_values, cut_at):
    """The values of a run that was cut after its checkpoints of steps 2 and 4."""
    values = {**recipe_values, "save": {"every": 2, "keep_last": 5}}
    cut_at(6)
    with pytest.raises(Cut):
        run(values)
    return values


def damage_truncate(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def damage_flip(folder):
    path = folder / "gates.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage_missing(folder):
    (folder / "optimizer.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"format_version": 1')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(damage_truncate, "optimizer.safetensors is not what was written", marks=pytest.mark.slow),
        (damage_flip, "gates.safetensors is not what was written"),
        pytest.param(damage_missing, "optimizer.json is missing", marks=pytest.mark.slow),
        (damage_manifest, "its manifest cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(unfinished, uninterrupted, capsys, damage, message):
    folder = Path(unfinished["output_dir"])
    damage(folder / "checkpoints" / "step_000004")
    # What a kill during a save leaves.
    (folder / "checkpoints" / ".step_000006.new").mkdir()
    run(unfinished)
    out = capsys.readouterr().out
    assert all(says(out, words) for words in ("passing over", message, "continuing after step 2")), out
    assert trajectory(folder) == uninterrupted("gates")[0]
    assert not (folder / "checkpoints" / ".step_000006.new").exists()


def test_another_recipe_is_refused_with_the_keys_that_differ(unfinished):
    folder = Path(unfinished["output_dir"])
    with pytest.raises(ValueError, match=r"another run, unfinished.*steps is 8 there and 9 here; seed is 0 there and 1 here"):
        run(unfinished, steps=9, seed=1)
    with pytest.raises(ValueError, match=r"dms\.window is 8 there and 7 here"):
        run(unfinished, dms={"window": 7})
    with pytest.raises(ValueError, match=r"zero\.stage is 0 there and 3 here"):
        run(unfinished, zero={"stage": 3})
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_checkpoint_from_another_run_is_refused(unfinished, recipe_values, tmp_path):
    other = {**unfinished, "output_dir": str(tmp_path / "other"), "seed": 5}
    run(other)
    folder = Path(unfinished["output_dir"])
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_000008", folder / "checkpoints" / "step_000007")
    with pytest.raises(ValueError, match="seed is 5 there and 0 here"):
        run(unfinished)


def test_another_base_is_refused(unfinished, tiny_folder, tmp_path):
    moved = tmp_path / "base"
    shutil.copytree(tiny_folder, moved)
    values = {**unfinished, "output_dir": str(tmp_path / "second"), "model": str(moved)}
    shutil.copytree(unfinished["output_dir"], values["output_dir"])
    recipe = Path(values["output_dir"]) / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "model": str(moved)}))
    for path in Path(values["output_dir"]).glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["recipe"]["model"] = str(moved)
        path.write_text(json.dumps(manifest))
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1.0
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="give the base that the run began with"):
        run(values)


def test_resume_never_and_overwrite(unfinished):
    with pytest.raises(ValueError, match="holds an unfinished run; resume=auto continues it"):
        run(unfinished, resume="never")
    # A replaced run must not eat its own model.
    inside = Path(unfinished["output_dir"]) / "base"
    shutil.copytree(unfinished["model"], inside)
    with pytest.raises(ValueError, match="lies within output_dir"):
        run(unfinished, resume="never", overwrite=True, model=str(inside))
    assert inside.exists()
    run(unfinished, resume="never", overwrite=True, steps=2, save={"every": 0}, target_cr=1.0)
    assert [m["step"] for m in read_metrics(unfinished["output_dir"])] == [1, 2]
    assert not (Path(unfinished["output_dir"]) / "checkpoints").exists()


def test_a_folder_in_use_is_refused(unfinished, monkeypatch):
    running = {**unfinished, "tracking": {"wandb": "off"}}
    original, seen = loop._train, []

    def meanwhile(setup, stop):
        with pytest.raises(ValueError, match=r"is in use by process \d+ on "):
            run(running)
        seen.append(1)
        return original(setup, stop)

    monkeypatch.setattr(loop, "_train", meanwhile)
    run(running)
    assert seen


def test_a_full_disk_names_the_last_good_checkpoint_and_the_run_goes_on(recipe_values, uninterrupted, monkeypatch, capsys):
    original = checkpoints._write_state
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(folder, *args):
        # Real write errors (EFBIG) rather than pretended ones, for the checkpoint of step 4 only.
        full = "000004" in folder.name
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return original(folder, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoints, "_write_state", on_a_full_disk)
    run(recipe_values, save={"every": 2, "keep_last": 9})
    out = capsys.readouterr().out
    assert says(out, "the checkpoint of step 4 could not be written") and says(out, "step_000002")
    folder = Path(recipe_values["output_dir"])
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000002", "step_000006", "step_000008"]
    assert trajectory(folder) == uninterrupted("gates")[0]


def test_a_run_that_fails_names_the_checkpoint_to_continue_from(unfinished, cut_at, capsys):
    cut_at(1)
    with pytest.raises(Cut):
        run(unfinished)
    assert says(capsys.readouterr().out, "the run can be continued from")


LONG = {"steps": 40}


@pytest.fixture(scope="module")
def long_run(make_values, tmp_path_factory):
    """The trajectory of a run that is long enough to be hit, on one thread as a `Job` is."""
    folder, threads = tmp_path_factory.mktemp("long") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    run(make_values(folder, **LONG))
    torch.set_num_threads(threads)
    return trajectory(folder)


def stop(values, name, code) -> Job:
    """A run that got a signal after some steps, saved and ended."""
    job = Job(values)
    job.wait_for_step(2)
    assert job.send(signal.Signals[name]).wait() == code, job.output
    assert ("dms: saving after this step; Ctrl-C again ends the run at once" in job.output) == (name == "SIGINT")
    stopped = len(read_metrics(job.folder))
    assert says(job.output, f"stopped by {name} after step {stopped}; the same command continues")
    assert (job.folder / "checkpoints" / f"step_{stopped:06d}").is_dir()
    return job


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), pytest.param("SIGUSR1", 75, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(make_values, tmp_path, name, code):
    stop(make_values(tmp_path / "run", **LONG), name, code)


@pytest.mark.slow
def test_after_a_signal_that_saves_and_one_that_kills_the_same_command_goes_on(make_values, tmp_path, long_run):
    """Killed in steps that each end in a save."""
    values = make_values(tmp_path / "run", save={"every": 1}, **LONG)
    job = stop(values, "SIGTERM", 75)
    stopped = len(read_metrics(job.folder))
    killed = Job(values)
    killed.wait_for_step(stopped + 1)
    time.sleep(random.uniform(0.0, 0.2))
    assert killed.send(signal.SIGKILL).wait() == -9, killed.output
    again = Job(values)
    assert again.wait() == 0, again.output
    assert trajectory(job.folder) == long_run


@pytest.mark.slow
def test_ctrl_c_under_the_launcher_saves_and_stops_all(make_values, tmp_path):
    """A terminal sends it to the launcher alone, whose processes have sessions of their own."""
    job = Job(make_values(tmp_path / "run", **LONG), 2)
    job.wait_for_step(2)
    assert job.send(signal.SIGINT).wait() == 130, job.output
    stopped = len(read_metrics(job.folder))
    assert "received SIGINT, forwarded to 2 processes; Ctrl-C again kills them" in job.output
    assert f"after step {stopped}; the same command continues from {job.folder / 'checkpoints' / f'step_{stopped:06d}'}" in job.output
    assert (job.folder / "checkpoints" / f"step_{stopped:06d}" / "manifest.json").is_file()
    assert "killing" not in job.output and "Traceback" not in job.output, job.output


@pytest.mark.slow
def test_kill_9_at_random_moments(make_values, tmp_path, long_run):
    """At any moment of steps that each end in a save; a run that got to its end starts over."""
    values, draw = make_values(tmp_path / "run", save={"every": 1}, **LONG), random.Random(20)
    kills = 0
    while kills < 20:
        before = len(read_metrics(tmp_path / "run"))
        job = Job(values)
        job.wait_for_step(min(before + 1, LONG["steps"]))
        try:
            job.process.wait(draw.uniform(0.0, 1.0))
        except subprocess.TimeoutExpired:
            job.send(signal.SIGKILL).wait()
            kills += 1
        if (tmp_path / "run" / "result.json").exists():
            assert trajectory(tmp_path / "run") == long_run
            shutil.rmtree(tmp_path / "run")
    job = Job(values)
    assert job.wait() == 0, job.output
    assert trajectory(tmp_path / "run") == long_run


def test_a_kill_before_the_report_is_written_leaves_the_run_unfinished(recipe_values, monkeypatch, uninterrupted):
    def failing(*_, **__):
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "write_run_card", failing)
        with pytest.raises(Cut):
            run(recipe_values, save=SAVE)
    folder = Path(recipe_values["output_dir"])
    assert not (folder / "result.json").exists()
    run(recipe_values, save=SAVE)
    assert (folder / "result.json").exists() and trajectory(folder) == uninterrupted("gates")[0]


def test_other_data_under_the_same_name_is_refused(recipe_values, cut_at, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"def f{n}(x): return x + {n}\n" * 9}) for n in range(20)))
    values = {**recipe_values, "data": {"source": "jsonl", "path": str(text), "length": 96}, "save": SAVE}
    cut_at(5)
    with pytest.raises(Cut):
        run(values)
    text.write_text(text.read_text().replace("return", "yield"))
    with pytest.raises(ValueError, match="trained on other data than this recipe now gives"):
        run(values)


def test_without_a_good_checkpoint_nothing_is_deleted(unfinished):
    folder = Path(unfinished["output_dir"])
    for number in (2, 4):
        damage_flip(folder / "checkpoints" / f"step_{number:06d}")
    with pytest.raises(ValueError, match=r"no checkpoint of this run is good.*step_000004: gates.safetensors.*step_000002"):
        run(unfinished)
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_what_was_passed_over_does_not_crowd_out_the_new(unfinished):
    folder = Path(unfinished["output_dir"]) / "checkpoints"
    damage_flip(folder / "step_000004")
    (folder / "step_000009.bak").mkdir()
    run(unfinished, save={"every": 3, "keep_last": 1})
    assert sorted(path.name for path in folder.iterdir()) == ["step_000008", "step_000009.bak"]


OLD = Path(__file__).parent / "checkpoint_format_2"


def test_a_checkpoint_of_an_earlier_version_is_restored(make_values, tmp_path):
    """`OLD` is step 3 of a run with adapters on a model of the same shape, written before gates and base were fields of their own."""
    pytest.importorskip("peft")
    shutil.copytree(OLD, tmp_path / "checkpoints" / "step_000003")
    saved = checkpoints.newest(tmp_path, Console())
    assert saved.position.step == 3 and saved.position.tokens == 3 * 4 * 192 and saved.manifest.num_processes == 1
    recipe = RetrofitRecipe.model_validate(
        make_values(tmp_path / "run", trainable="gates+lora", optimizer={"lr": 2e-3, "base_lr": 1e-3}, lora={"rank": 4})
    )
    parts = models.build(recipe, torch.float16, "cpu")
    groups = [{"params": list(part.values()), "peak_lr": 1.0} for part in (parts.gates, parts.base)]
    made = Engine(make_accelerator(recipe), parts.student, groups, recipe, None)
    checkpoints.restore(saved, made, parts, recipe, 0)
    for stored, part in (("gates", parts.gates), ("weights", parts.base)):
        tensors = load_file(OLD / f"{stored}.safetensors")
        assert tensors.keys() == part.keys() and all(torch.equal(tensors[name], part[name]) for name in part)
    first, second = made.optimizer.param_groups
    assert (first["peak_lr"], second["peak_lr"]) == (2e-3, 1e-3)
    assert {int(made.optimizer.state[parameter]["step"]) for group in (first, second) for parameter in group["params"]} == {3}

"""Whole runs on mixtures of files and streams: cut off, killed and shared by processes, they train on the same rows."""

import json
import os
import signal
from pathlib import Path

import pytest
from dms_train import loop
from dms_train.recipe import RetrofitRecipe
from jobs import Job, read_metrics, trajectory
from packed import texts
from said import says

STEPS = 24


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A file and a stream; the one's weight falls to 0 where the other's begins, at step 12."""
    import datasets

    folder = tmp_path_factory.mktemp("mixture")
    (folder / "hub").mkdir()
    for part in range(2):
        rows = [{"text": text} for text in texts(200, part, 3, 30)]
        datasets.Dataset.from_list(rows).to_parquet(folder / "hub" / f"train-{part}.parquet")
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, 9, 3, 80)))
    sources = [
        {"source": "jsonl", "path": str(folder / "lines.jsonl"), "weight": [[11, 1.0], [12, 0.0]]},
        {"source": "dataset", "path": str(folder / "hub"), "streaming": True, "weight": [[11, 0.2], [12, 1.0]]},
    ]
    return {"length": 96, "sources": sources}


@pytest.fixture
def values(make_values, mixture, tmp_path):
    return make_values(tmp_path / "run", data=mixture, steps=STEPS, batch_size=8, save={"every": 5})


class Cut(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_is_cut_goes_on_with_the_next_row(values, tmp_path, monkeypatch):
    whole = {**values, "output_dir": str(tmp_path / "whole")}
    loop.run(RetrofitRecipe.model_validate(whole))
    taken, original = [], loop.Engine.step

    def stepping(engine):
        taken.append(1)
        if len(taken) == 13:
            raise Cut
        return original(engine)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Engine, "step", stepping)
        with pytest.raises(Cut):
            loop.run(RetrofitRecipe.model_validate(values))
    manifest = json.loads((Path(values["output_dir"]) / "checkpoints" / "step_000010" / "manifest.json").read_text())
    assert manifest["position"]["data"]["step"] == 10 and len(json.dumps(manifest["position"]["data"])) < 1024
    # Read otherwise, it reads the same.
    loop.run(RetrofitRecipe.model_validate({**values, "data": {**values["data"], "workers": 3, "prefetch": 0}}))
    assert trajectory(values["output_dir"]) == trajectory(whole["output_dir"])
    metrics = read_metrics(values["output_dir"])
    assert all(m["data_wait_ms"] >= 0 and m["cost_balance"] == 1.0 and 0 <= m["padding"] < 0.05 for m in metrics)
    assert metrics[-1]["documents"]["documents"] > 200 and metrics[-1]["tokens"] <= STEPS * 8 * 96


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 11, 17])
def test_a_killed_run_goes_on_with_the_next_row(values, tmp_path, at):
    """In the middle of an epoch, around the change of the schedule, and in the stream."""
    whole = Job({**values, "output_dir": str(tmp_path / "whole")})
    job = Job({**values, "save": {"every": 1}})
    job.wait_for_step(at)
    assert job.send(signal.SIGKILL).wait() == -9
    assert at <= len(read_metrics(job.folder)) < STEPS
    again = Job({**values, "save": {"every": 1}, "data": {**values["data"], "workers": 2, "prefetch": 4}})
    assert again.wait() == 0, again.output
    assert says(again.output, "continuing after step")
    assert whole.wait() == 0, whole.output
    assert trajectory(job.folder) == trajectory(whole.folder)


@pytest.mark.slow
def test_processes_of_a_node_share_one_reader(values, tmp_path):
    """Two processes train on the rows of one, and go on so after one of them is killed."""
    values = {**values, "data": {**values["data"], "balance_rows": 4}}
    alone = Job({**values, "output_dir": str(tmp_path / "alone")})
    assert alone.wait() == 0, alone.output
    job = Job(values, 2)
    job.wait_for_step(7)
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.wait(60) == 137
    again = Job(values, 2)
    assert again.wait() == 0, again.output
    metrics = read_metrics(again.folder)
    assert all(1.0 <= m["cost_balance"] < 1.05 for m in metrics)
    for ours, theirs in zip(trajectory(again.folder)[:12], trajectory(alone.folder), strict=False):
        assert ours[4] == theirs[4] and ours[1] == pytest.approx(theirs[1], rel=1e-3)


@pytest.mark.slow
def test_what_is_wrong_with_the_data_is_said_once_by_several_processes(values, tmp_path):
    job = Job({**values, "data": {"source": "jsonl", "path": str(tmp_path / "nowhere.jsonl"), "length": 96}}, 2)
    assert job.wait(60) == 2
    # The launcher repeats, indented, what the first process to fail said last.
    said = [line for line in job.output.splitlines() if "matches no .jsonl file" in line and not line.startswith(" ")]
    assert len(said) == 1 and said[0].startswith("dms: error: data.path")


def test_a_step_of_prompts_alone_has_nothing_to_predict_and_goes_on(make_values, tmp_path):
    rows = [{"q": " ".join(f"word{number}" for number in range(400)), "a": "yes"}, {"q": "x", "a": "y = 1"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "path": str(path), "prompt": "q", "completion": "a", "loss_on": "completions", "length": 64}
    values = make_values(
        tmp_path / "run", data=data, batch_size=1, micro_batch_size=1, steps=6, evaluation={"num_documents": 2, "num_items": 2}
    )
    loop.run(RetrofitRecipe.model_validate(values))
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 6 and any(m["kl"] == 0.0 for m in metrics)


def test_processes_that_read_other_data_are_refused():
    from dms_train.preflight import check_alike

    check_alike(["a", "a"], "at the start")
    with pytest.raises(ValueError, match=r"step 3: processes 1, 3 read other data than process 0"):
        check_alike([1.0, 2.0, 1.0, 2.0], "step 3")

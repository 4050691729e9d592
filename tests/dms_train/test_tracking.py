"""What trackers record: a run that is killed and resumed is one run, and no tracker stops it.

`python tests/dms_train/test_tracking.py RUN` lists the offline wandb parts of a run's folder: id, steps and keys.
"""

import importlib.util
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import dump_recipe, load_recipe
from dms_train.tracking import check_trackers, open_tracker
from rich.console import Console
from said import says

_LAYERS = [1, 4]
_KEYS = {"train/step", "train/loss", "train/kl", "evicted/layer1", "evicted/layer4", "evicted/least_head", "evicted/most_head"}


def read_records(path: Path) -> list:
    """The whole records of a .wandb file: LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, payload, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(data):
            break
        if kind in (1, 4):
            records.append(Record.FromString(payload))
            payload = b""
    return records


def read_parts(folder: Path) -> list[dict]:
    """Each offline part of a run: `id`, `config`, `history` (step -> key -> value), `summary`, `records`; oldest first."""
    parts = []
    for path in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        records = read_records(path)
        part = {"records": records, "id": None, "config": {}, "history": {}, "summary": {}}
        for record in records:
            if record.HasField("run"):
                part["id"], part["run"] = record.run.run_id, record.run
                part["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                assert record.history.step.num not in part["history"]
                items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                part["history"][record.history.step.num] = items
            for item in record.summary.update:
                part["summary"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        parts.append(part)
    return parts


def follow(tracker, steps, offset=0.0):
    for step in steps:
        rates = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
        tracker.log({"step": step, "loss": step + offset, "kl": 0.5, "note": "not a number"}, rates, _LAYERS)


@pytest.mark.parametrize("windows", [(8,), (8, 32)])
def test_shares_of_lifetimes_are_logged(make_recipe, console, windows):
    """By layer and over all, where there are several windows."""
    recipe = make_recipe(wandb="off")
    tracker = open_tracker(recipe, Path(recipe.output_dir), console, run_id=None, step=0)
    logged = []
    tracker._trackers["ours"] = SimpleNamespace(log=lambda step, scalars, heatmap: logged.append((step, scalars)))
    several = len(windows) > 1
    classes = torch.tensor([[[0.0, 0.25], [0.5, 0.25]], [[1.0, 0.0], [0.5, 0.5]]]) if several else None
    tracker.log({"step": 3, "kl": 0.5}, torch.tensor([[0.0, 0.5], [0.25, 1.0]]), _LAYERS, windows, classes)
    ((step, scalars),) = logged
    named = {name: value for name, value in scalars.items() if name.startswith("leave_after")}
    first, second = _LAYERS
    expected = {f"leave_after_8/layer{first}": 0.25, f"leave_after_8/layer{second}": 0.75, "leave_after_8/all": 0.5}
    expected |= {f"leave_after_32/layer{first}": 0.25, f"leave_after_32/layer{second}": 0.25, "leave_after_32/all": 0.25}
    assert step == 3 and named == (expected if several else {})


def end_process():
    """What happens when Python exits: only then is all of a finished run on the disk."""
    import wandb

    wandb.teardown()


# Logs its steps and waits to be killed.
_CHILD = """
import sys, time, torch
from pathlib import Path
from rich.console import Console
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import load_recipe
from dms_train.tracking import open_tracker

recipe = load_recipe(sys.argv[1], [], RetrofitRecipe)
tracker = open_tracker(recipe, Path(recipe.output_dir), Console(), run_id=None, step=0)
for step in range(1, 9):
    tracker.log({"step": step, "loss": float(step), "kl": 0.5}, torch.tensor([[0.0, 0.5], [0.25, 1.0]]), [1, 4])
print("run id:", tracker.run_id, flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def console():
    return Console(width=110, record=True, file=io.StringIO())


@pytest.fixture
def make_recipe(recipe_values):
    def make(steps=20, **tracking):
        values = {**recipe_values, "steps": steps, "tracking": {"wandb": "offline", **tracking}}
        Path(values["output_dir"]).mkdir(exist_ok=True)
        return RetrofitRecipe.model_validate(values)

    return make


@pytest.fixture
def ended():
    """What a run that ends hands over: its result and, in a folder, model card and result.json."""
    row = {"policy": "dense", "task": "recall", "metric": "accuracy", "value": 1.0, "ci_low": None, "ci_high": 1.0, "seconds": 3}
    result = {"policies": {"dense": {"recall": 1.0, "memory": "masked", "by_task": {}, "cr": None}}, "rows": [row]}

    def end(folder: Path):
        (folder / "model").mkdir()
        (folder / "model" / "README.md").write_text("# A card")
        (folder / "result.json").write_text(json.dumps(result))
        return result, folder / "model"

    return end


def wait_for(condition, what="it", seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def _next_second() -> None:
    """wandb names a part's folder by the second that it began in."""
    time.sleep(1.05 - time.time() % 1)


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_run(make_recipe, console, ended, tmp_path):
    recipe = make_recipe(tensorboard=True, project="p", group="g", tags=["t"])
    folder = Path(recipe.output_dir)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "recipe.yaml"), [], RetrofitRecipe) == recipe
    # With a wandb service of its own, which dies with it: this process's would hold on to the run's id for a while.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    # System metrics come every 15 s otherwise.
    environment["WANDB__STATS_SAMPLING_INTERVAL"] = "0.5"
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "recipe.yaml")]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: any(8 in part["history"] for part in read_parts(folder)))
        wait_for(lambda: any(record.HasField("stats") for record in read_parts(folder)[0]["records"]), "system metrics")
        run_id = next(line.split()[-1] for line in child.stdout if line.startswith("run id:"))
        # TensorBoard's writer flushes by itself as well.
        wait_for(lambda: _scalars(folder).get("train/loss", [(0, 0)])[-1][0] == 8)
    finally:
        child.kill()
        child.wait()

    _next_second()
    resumed = open_tracker(recipe, folder, console, run_id=run_id, step=5)
    follow(resumed, range(6, 15), offset=100.0)
    resumed.close()
    resumed.close()
    end_process()
    _next_second()
    again = open_tracker(recipe, folder, console, run_id=run_id, step=12)
    follow(again, range(13, 21), offset=200.0)
    again.finish(*ended(folder))
    again.close()
    end_process()
    assert resumed.run_id == again.run_id == run_id
    assert says(console.export_text(clear=False), f"wandb sync {folder}/wandb/offline-run-*")

    parts = read_parts(folder)
    assert [part["id"] for part in parts] == [run_id] * 3
    # No step twice, none left out; the last row holds the tables.
    assert [list(part["history"]) for part in parts] == [list(range(1, 9)), list(range(9, 15)), list(range(15, 22))]
    history = {step: row for part in parts for step, row in part["history"].items()}
    for step in range(1, 21):
        assert set(history[step]) >= _KEYS and history[step]["train/step"] == step and "train/note" not in history[step]
        # A step that is logged again after the resumption keeps what was logged first.
        assert history[step]["train/loss"] == step + (0 if step <= 8 else 100 if step <= 14 else 200)
        assert history[step]["evicted/layer4"] == 0.625 and history[step]["evicted/most_head"] == 1.0
        image = history[step]["evicted/heatmap/path"]
        assert sum((part / "files" / image).is_file() for part in (folder / "wandb").glob("offline-run-*")) == 1
    assert history[21]["results/table/_type"] == history[21]["evicted/table/_type"] == "table-file"
    for part in parts:
        run = part["run"]
        assert part["config"]["target_cr"] == 4.0 and part["config"]["dms"]["window"] == 8 and "torch" in part["config"]["versions"]
        assert (run.project, run.run_group, list(run.tags), run.display_name) == ("p", "g", ["t"], folder.name)
        assert {record.metric.glob_name: record.metric.step_metric for record in part["records"] if record.HasField("metric")}[
            "*"
        ] == "train/step"
    assert parts[-1]["summary"]["dense/recall"] == 1.0 and "dense/memory" not in parts[-1]["summary"]
    (table,) = (folder / "wandb").glob("offline-run-*/files/media/table/results/*.json")
    assert json.loads(table.read_text())["data"] == [["dense", "recall", "accuracy", 1.0, None, 1.0]]
    (rates,) = (folder / "wandb").glob("offline-run-*/files/media/table/evicted/*.json")
    assert json.loads(rates.read_text())["data"][-1] == [4, 1, 1.0]
    (card,) = [r.artifact for r in parts[-1]["records"] if r.HasField("artifact") and r.artifact.type == "model-card"]
    assert {entry.path for entry in card.manifest.contents} == {"README.md", "result.json"}
    assert json.loads(card.metadata)["weights"] == str(folder / "model")
    assert [r for r in parts[-1]["records"] if r.HasField("exit")]

    # TensorBoard has no server to ask: what was logged after the step that is resumed from is replaced.
    scalars = _scalars(folder)
    assert scalars["train/loss"] == [(s, s + (0 if s <= 5 else 100 if s <= 12 else 200)) for s in range(1, 21)]
    assert set(scalars) >= (_KEYS - {"train/step"}) | {"dense/recall"}
    events = _events(folder)
    assert [event.step for event in events.Images("evicted/heatmap")] == list(range(1, 21))
    assert {"recipe/text_summary", "model card/text_summary"} <= set(events.Tags()["tensors"])


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def _scalars(folder):
    if not (folder / "tensorboard").is_dir():
        return {}
    events = _events(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_parts_that_were_cut_short_do_not_keep_the_later_ones_from_wandb(make_recipe, console):
    recipe = make_recipe(steps=400)
    folder = Path(recipe.output_dir)
    tracker = open_tracker(recipe, folder, console, run_id=None, step=0)
    # More than one of the log's blocks, and pictures only now and then.
    follow(tracker, range(1, 101))
    tracker.close()
    end_process()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 32768
    pictures = [step for step, row in read_parts(folder)[0]["history"].items() if "evicted/heatmap/path" in row]
    assert pictures == [1, 20, 40, 60, 80, 100]
    # The exit record and the end of what stands before it.
    os.truncate(path, path.stat().st_size - 60)
    torn, records = path.stat().st_size, len(read_records(path))
    empty = folder / "wandb" / f"offline-run-20200101_000000-{tracker.run_id}" / path.name
    empty.parent.mkdir()
    empty.write_bytes(path.read_bytes()[:7])

    resumed = open_tracker(recipe, folder, console, run_id=tracker.run_id, step=50)
    follow(resumed, range(51, 103))
    resumed.close()
    end_process()
    assert path.stat().st_size < torn and len(read_records(path)) == records
    first, second = read_parts(folder)
    last = max(first["history"])
    assert last in (99, 100) and list(second["history"]) == list(range(last + 1, 103))


def test_a_tracker_whose_process_dies_does_not_stop_the_run(make_recipe, console, ended):
    recipe = make_recipe()
    folder = Path(recipe.output_dir)
    tracker = open_tracker(recipe, folder, console, run_id=None, step=0)
    follow(tracker, range(1, 3))
    services = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout.split()
    assert services
    for pid in services:
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.5)
    follow(tracker, range(3, 9))
    tracker.finish(*ended(folder))
    tracker.close()
    assert console.export_text().count("wandb fails, the run goes on without it") == 1
    # A later process, or this one, joins again.
    resumed = open_tracker(recipe, folder, console, run_id=tracker.run_id, step=8)
    follow(resumed, range(9, 11))
    resumed.close()
    end_process()
    assert list(read_parts(folder)[-1]["history"]) == [9, 10] and "fails" not in console.export_text()


def test_trackers_that_do_not_open_are_left_out(make_recipe, console, ended, monkeypatch):
    recipe = make_recipe(tensorboard=True)
    folder = Path(recipe.output_dir)

    def fail(*args, **kwargs):
        raise OSError("disk\nfull")

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    tracker = open_tracker(recipe, folder, console, run_id=None, step=0)
    follow(tracker, range(1, 3))
    tracker.finish(*ended(folder))
    lines = console.export_text().splitlines()
    assert lines == [f"{name} fails, the run goes on without it: OSError: disk full" for name in ("wandb", "TensorBoard")]
    assert tracker.run_id


def test_without_a_network_an_online_run_goes_on_offline_as_the_same_run(make_recipe, console, monkeypatch):
    import wandb

    recipe, init = make_recipe(wandb="online"), wandb.init

    def unreachable(mode, **kwargs):
        if mode == "online":
            raise wandb.errors.CommError("no route")
        return init(mode=mode, **kwargs)

    monkeypatch.setattr("wandb.init", unreachable)
    tracker = open_tracker(recipe, Path(recipe.output_dir), console, run_id="abcd1234", step=0)
    follow(tracker, [1])
    tracker.close()
    end_process()
    (part,) = read_parts(recipe.output_dir)
    assert part["id"] == tracker.run_id == "abcd1234" and list(part["history"]) == [1]
    assert says(console.export_text(), "tracked offline: CommError: no route")


def test_off_and_disabled_leave_nothing(make_recipe, console, ended, monkeypatch):
    recipe = make_recipe(wandb="off")
    folder = Path(recipe.output_dir)
    off = open_tracker(recipe, folder, console, run_id=None, step=0)
    assert off.run_id is None
    # The environment has the last word.
    monkeypatch.setenv("WANDB_MODE", "disabled")
    disabled = open_tracker(make_recipe(wandb="online"), folder, console, run_id=None, step=0)
    for tracker in (off, disabled):
        follow(tracker, range(1, 3))
    result, model_folder = ended(folder)
    off.finish(result, model_folder)
    disabled.finish(result, model_folder)
    assert console.export_text() == "" and {path.name for path in folder.iterdir()} == {"model", "result.json"}


def test_a_tracker_that_is_not_installed_is_refused(make_recipe, monkeypatch):
    check_trackers(make_recipe(tensorboard=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(make_recipe())
    with pytest.raises(ValueError, match=r"dms-retrofit\[track\].*tracking\.tensorboard=false"):
        check_trackers(make_recipe(tensorboard=True))


if __name__ == "__main__":
    for part in read_parts(Path(sys.argv[1])):
        steps, keys = sorted(part["history"]), sorted({key for row in part["history"].values() for key in row})
        print(f"{part['id']}: steps {steps[:1]} to {steps[-1:]}, {len(steps)} rows; keys: {', '.join(keys)}")

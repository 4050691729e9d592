"""What a run had learned when its schedule passed a ratio can be exported, and is not what it ended with."""

import json
import shutil

import pytest
import torch
from dms_train import loop
from dms_train.cli import app
from dms_train.ratio_snapshots import write_snapshot
from dms_train.recipe import RetrofitRecipe
from safetensors.torch import load_file
from serving import files_read
from typer.testing import CliRunner

import dms
from dms.export.folder import export
from dms.io.gates_file import read_gates
from dms.io.weights import base_hash


@pytest.fixture(scope="module")
def runs(make_values, tmp_path_factory):
    """Two finished runs, gates alone and every weight, with checkpoints at CR 2 and 3."""
    done = {}

    def of(trainable):
        if trainable not in done:
            folder = tmp_path_factory.mktemp("stages") / trainable
            values = make_values(folder, trainable=trainable, save={"every": 0, "at_cr": [2.0, 3.0]}, steps=4)
            values["evaluation"] = {"num_documents": 2, "num_items": 2}
            if trainable == "all":
                values["optimizer"] = values["optimizer"] | {"base_lr": 1e-3}
            loop.run(RetrofitRecipe.model_validate(values))
            done[trainable] = folder
        return done[trainable]

    return of


def checkpoint_at(run, cr):
    manifests = {json.loads(path.read_text())["at_cr"]: path.parent for path in (run / "checkpoints").glob("*/manifest.json")}
    return manifests[cr]


def tensors(folder):
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_gates_at_a_ratio_on_the_untouched_base(runs, tiny_folder, tmp_path):
    run = runs("gates")
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), "--format", "merged", "--at-cr", "2"])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    gates, metadata = read_gates(out)
    assert equal(gates, load_file(checkpoint_at(run, 2.0) / "gates.safetensors")) and not equal(gates, read_gates(run / "model")[0])
    assert metadata["target_cr"] == "2.0" and metadata["base_hash"] == base_hash(out)
    assert equal(tensors(out), tensors(run / "model"))
    card = (out / "README.md").read_text()
    assert "passed compression ratio 2" in card and "not evaluated" in card.replace("\n", " ") and "bits" not in card
    model = dms.load(out)
    assert equal({name: p.detach() for name, p in dms.retrofitting.gate_parameters(model).items()}, gates)

    assert files_read(out) == files_read(run / "model") == {"model.safetensors"}

    export(write_snapshot(run, 3.0, tmp_path / "staged"), tmp_path / "alone", format="gates")
    assert files_read(tmp_path / "staged" / "model") == {"model.safetensors"}
    alone, about = read_gates(tmp_path / "alone")
    assert equal(alone, load_file(checkpoint_at(run, 3.0) / "gates.safetensors"))
    assert about["base_hash"] == base_hash(tiny_folder) and about["target_cr"] == "3.0"
    assert len(dms.load(tmp_path / "alone", base=str(tiny_folder)).dms.layers) == 2


@pytest.mark.slow
def test_every_weight_at_a_ratio(runs, tmp_path):
    run = runs("all")
    export(write_snapshot(run, 2.0, tmp_path / "staged"), tmp_path / "out", format="merged")
    learned, now, ended = load_file(checkpoint_at(run, 2.0) / "weights.safetensors"), tensors(tmp_path / "out"), tensors(run / "model")
    assert set(learned) <= set(now) and all(torch.equal(now[name], learned[name].to(now[name].dtype)) for name in learned)
    assert not equal(now, ended)
    dms.load(tmp_path / "out")


def test_what_cannot_be_exported_is_said(runs, tmp_path):
    run = runs("gates")
    with pytest.raises(ValueError, match=r"no checkpoint at CR 4; there are: 2, 3 \(a recipe asks for them"):
        write_snapshot(run, 4.0, tmp_path / "staged")
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    with pytest.raises(ValueError, match="no finished run"):
        write_snapshot(copy, 2.0, tmp_path / "staged")
    # A damaged checkpoint is none.
    (checkpoint_at(copy, 2.0) / "gates.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="there are: 3 "):
        write_snapshot(copy, 2.0, tmp_path / "staged")


def test_adapters_are_merged_at_the_end_only(runs, tmp_path):
    copy = shutil.copytree(runs("gates"), tmp_path / "copy")
    manifest = checkpoint_at(copy, 2.0) / "manifest.json"
    values = json.loads(manifest.read_text())
    values["recipe"]["trainable"] = "gates+lora"
    manifest.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="merged at its end only"):
        write_snapshot(copy, 2.0, tmp_path / "staged")

"""Short runs on quantised bases, beside the same run on the base as it is. They need bitsandbytes or torchao."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dms_train import artifacts, loop
from dms_train.lora import merge_adapters
from dms_train.models import build, fingerprint
from dms_train.recipe import RetrofitRecipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dms
from dms.export.folder import export
from dms.io import base_models, checkpoint
from dms.io.quantization import packed_modules, packed_tensors
from dms.io.weights import base_hash
from dms.modes import set_mode

PACKAGE = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
IDS = torch.arange(20, 80)[None]
LORA = {"trainable": "gates+lora", "optimizer": {"lr": 0.02, "base_lr": 1e-3}, "lora": {"rank": 4}}


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """recipe(**changes): of a run of the embedded model, short."""

    def make(**changes):
        if form := changes.get("quantize"):
            pytest.importorskip(PACKAGE[form])
        values = {
            "model": "builtin:tiny",
            "output_dir": str(tmp_path_factory.mktemp("run") / "run"),
            "target_cr": 3,
            "dms": {"window": 16},
            "data": {"source": "builtin", "length": 384, "items": [2, 4]},
            "optimizer": {"lr": 0.02},
            "compression_weight": 4.0,
            "steps": 4,
            "batch_size": 1,
            "evaluation": {"num_documents": 2, "num_items": 3},
            "tracking": {"wandb": "off"},
        }
        return RetrofitRecipe.model_validate(values | changes)

    return make


@pytest.fixture(scope="module")
def runs(recipe):
    """runs(form): the folder of its run."""
    done = {}

    def of(form):
        if form not in done:
            wanted = recipe(quantize=form, save={"every": 2})
            loop.run(wanted)
            done[form] = Path(wanted.output_dir)
        return done[form]

    return of


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evicted(model):
    set_mode(model, "evict")
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("form", PACKAGE)
def test_gates_train_beside_those_of_the_ordinary_base(form, runs):
    folder, ordinary = runs(form), runs(None)
    gates = load_file(folder / "model" / "gates.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in gates.values())
    found, expected = metrics(folder), metrics(ordinary)
    # The same data and noise; each base is its own teacher.
    assert abs(found[0]["kl"] - expected[0]["kl"]) < 0.2 * expected[0]["kl"]
    assert found[-1]["cr_decided"] > 2 and expected[-1]["cr_decided"] > 2
    size = {name: (path / "model" / "model.safetensors").stat().st_size for name, path in (("packed", folder), ("ordinary", ordinary))}
    assert size["packed"] < 0.8 * size["ordinary"]


@pytest.mark.parametrize("form", PACKAGE)
def test_the_model_and_the_gates_alone_load_as_the_same(form, runs):
    folder = runs(form)
    model = dms.load(folder / "model", dtype="float32", device="cpu")
    alone = dms.load(folder / "gates", base="builtin:tiny", dtype="float32", device="cpu")
    assert packed_modules(model) and torch.equal(evicted(model), evicted(alone))
    with pytest.raises(ValueError, match=rf"packed as {form} when it was loaded.*--other-base"):
        dms.load(folder / "gates", base=str(folder / "model"))
    with pytest.warns(UserWarning, match=rf"packed as {form} when it was loaded\), used on builtin:tiny \(hash \w+\)$"):
        other = dms.load(folder / "gates", base="builtin:tiny", other_base=True, dtype="float32", device="cpu")
    assert not packed_modules(other)


@pytest.mark.parametrize("form", PACKAGE)
def test_a_resumed_run_is_the_uninterrupted_one(form, runs, recipe):
    changed = recipe(quantize=form, save={"every": 2})
    copy = Path(shutil.copytree(runs(form), changed.output_dir))
    for gone in ("result.json", "model", "gates", "checkpoints/step_000004"):
        path = copy / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    loop.run(changed)
    expected, found = (load_file(folder / "model" / "gates.safetensors") for folder in (runs(form), copy))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_form_does_not_continue_a_run(runs, recipe):
    copy = recipe(quantize="int8", save={"every": 2})
    shutil.copytree(runs("nf4"), copy.output_dir)
    (Path(copy.output_dir) / "result.json").unlink()
    with pytest.raises(ValueError, match="quantize"):
        loop.run(copy)


@pytest.mark.parametrize("form", PACKAGE)
def test_a_packed_folder_is_a_base_whose_files_are_kept(form, runs, recipe):
    base = runs(form) / "model"
    again = recipe(model=str(base), steps=2)
    loop.run(again)
    folder = Path(again.output_dir)
    assert base_hash(folder / "model") == base_hash(base)
    assert torch.isfinite(evicted(dms.load(folder / "model", device="cpu"))).all()
    assert torch.equal(evicted(dms.load(folder / "gates", base=str(base), device="cpu")), evicted(dms.load(folder / "model", device="cpu")))


def test_an_export_evicts_as_the_run_s_model(runs, tmp_path):
    model, out = runs("nf4") / "model", tmp_path / "out"
    export(model, out)
    # Packed models are held as their files are, by transformers.
    expected = evicted(dms.load(model, dtype="float16", device="cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto")
    with torch.no_grad():
        assert torch.equal(theirs(IDS, use_cache=False).logits, expected)
    # As dms.load has them: packed for inference on CPUs they would be others.
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in theirs.modules())


def test_an_export_of_the_gates_goes_with_the_base_packed_again(runs, tmp_path):
    export(runs("nf4"), tmp_path / "out", format="gates")
    alone = dms.load(tmp_path / "out", base="builtin:tiny", dtype="float32", device="cpu")
    assert torch.equal(evicted(alone), evicted(dms.load(runs("nf4") / "model", device="cpu")))


def test_gates_alone_are_exported_with_the_files_of_a_packed_base(runs, recipe, tmp_path, monkeypatch):
    base = runs("nf4") / "model"
    again = recipe(model=str(base), steps=1)
    loop.run(again)
    # Kinds without a way back from memory.
    monkeypatch.setattr(checkpoint, "save_pretrained", None)
    export(Path(again.output_dir) / "gates", tmp_path / "out", format="merged", base=str(base))
    assert base_hash(tmp_path / "out") == base_hash(base)
    assert torch.equal(evicted(dms.load(tmp_path / "out", device="cpu")), evicted(dms.load(Path(again.output_dir) / "model", device="cpu")))


@pytest.mark.parametrize("form", PACKAGE)
def test_adapters_are_merged_into_unpacked_weights(form, recipe):
    parts = build(recipe(quantize=form, **LORA), torch.float16, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parts.base.items():
            parameter.normal_(0, 0.02, generator=generator)
            assert ".lora_" in name and parameter.dtype == torch.float32
        expected = parts.student(IDS).logits
        merge_adapters(parts.student)
        assert not packed_modules(parts.student) and not hasattr(parts.student.config, "quantization_config")
        torch.testing.assert_close(parts.student(IDS).logits, expected, atol=0.05, rtol=0.01)


def test_a_run_with_adapters_leaves_an_ordinary_folder(recipe):
    wanted = recipe(quantize="nf4", steps=2, **LORA)
    loop.run(wanted)
    folder = Path(wanted.output_dir) / "model"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not packed_modules(dms.load(folder, device="cpu"))


def test_a_changed_code_or_scale_shows():
    pytest.importorskip("bitsandbytes")
    model = base_models.load_base("builtin:tiny", "float32", "cpu", quantize="nf4")
    before = fingerprint(model, set())
    name, module = next(iter(packed_modules(model).items()))
    module.weight.data[0] ^= 1
    module.weight.quant_state.absmax[0] ^= 1
    assert before.differing(fingerprint(model, set())) == [f"{name}.weight", f"{name}.weight.absmax"]
    assert len(packed_tensors(model)) == 28 * 6

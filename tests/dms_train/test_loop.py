"""Whole runs of a tiny random model: what comes out, and what stops a run."""

import json
import shutil

import pytest
import torch
from dms_train import loop
from dms_train.recipe import RetrofitRecipe

import dms


def load(values):
    return RetrofitRecipe.model_validate(values)


@pytest.fixture(scope="module")
def finished(make_values, tmp_path_factory):
    """One finished run, shared by the tests that only look."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = make_values(folder, steps=20, tracking={"wandb": "offline"})
    return folder, loop.run(load(values))


def test_what_comes_out(finished):
    folder, result = finished
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "gates/gates.safetensors",
        "model/model.safetensors",
        "model/gates.safetensors",
        "model/tokenizer.json",
        "model/README.md",
    ):
        assert (folder / name).is_file(), name
    assert {p.suffix for p in (folder / "report").iterdir()} == {".png", ".html", ".json"}
    saved = json.loads((folder / "result.json").read_text())
    assert set(saved["policies"]) == {"dense", "dms", "sliding_window"}
    for policy, figures in saved["policies"].items():
        assert {"bits_per_byte", "recall", "recall_by_distance", "cr_decided", "cr", "bytes", "memory"} <= set(figures)
        assert figures["memory"] == (None if policy == "dense" else "compacted")
    # 192 tokens, 4 layers, 2 heads of 32, keys and values in float32.
    assert 0 < saved["policies"]["dms"]["bytes"] < 192 * 4 * 2 * 32 * 2 * 4
    assert saved["target_cr"] == 4 and saved["steps"] == 20 and saved["tokens"] == 20 * 4 * 192
    assert saved["policies"]["dense"]["cr"] == 1.0
    # The window gets the budget that dms was measured to use.
    assert saved["policies"]["sliding_window"]["cr"] == pytest.approx(saved["policies"]["dms"]["cr"], rel=0.03)
    assert list((folder / "wandb").glob("offline-run-*"))


def test_gates_learn_to_evict(finished):
    folder, result = finished
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 21))
    assert metrics[0]["cr_decided"] < 1.1 and metrics[-1]["cr_decided"] > 2.0
    assert result["policies"]["dms"]["cr_decided"] > 2.0


def test_metrics_name_the_ratio_that_the_budget_counts(finished):
    metrics = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert all(m["cr"] == m["cr_decided"] for m in metrics)


@pytest.mark.slow
def test_a_run_of_several_windows(make_values, tmp_path, capsys):
    folder = tmp_path / "run"
    values = make_values(folder, steps=4, dms={"window": [4, 16, 64], "offset": 0.5, "scale": 5.0}, budget="end")
    result = loop.run(load(values))
    printed = " ".join(capsys.readouterr().out.split())
    assert "target CR 4 (of entries at a document's end), window 4, 16 or 64" in printed and "cr mean" in printed
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(m["cr_decided"] is None and m["cr"] >= 1 for m in metrics)
    figures = result["policies"]["dms"]
    assert figures["memory"] in ("masked", "compacted") and (figures["bytes"] is None) == (figures["memory"] == "masked")
    assert 4 < figures["entries_mean"] < 97 and figures["cr_mean"] == pytest.approx(193 / 2 / figures["entries_mean"])
    rows = [row for row in result["rows"] if row["policy"] == "dms"]
    assert {(row["entries"], row["entries_mean"], row["cr_mean"]) for row in rows} == {
        (figures["entries"], figures["entries_mean"], figures["cr_mean"])
    }
    window = result["policies"]["sliding_window"]
    assert window["memory"] == "compacted" and window["entries"] == pytest.approx(figures["entries"], rel=0.05)
    assert (folder / "report" / "lifetimes.png").is_file()
    (trace,) = json.loads((folder / "report" / "traces.json").read_text())["documents"]
    assert trace["windows"] == [4, 16, 64] and set("".join(trace["classes"][0])) <= set("0123")
    card = (folder / "model" / "README.md").read_text()
    assert "They choose how long an entry stays: for 4, 16 or 64 more tokens, or for good." in card and "cr_mean" in card
    model = dms.load(folder / "model", dtype="float32")
    assert model.dms.config.windows == (4, 16, 64)


def test_the_saved_model_is_the_one_that_was_measured(finished):
    from dms.evaluation.engine.run_end import evaluate_run, make_documents

    folder, result = finished
    model, tokenizer = dms.load(folder / "model", dtype="float32"), dms.io.base_models.load_tokenizer(str(folder / "model"))
    assert model.dms.trained_length == 192
    again = evaluate_run(model, make_documents(tokenizer, num_documents=8, length=192, num_items=3), policies=["dense", "dms"])
    for policy, figures in again.figures.items():
        for metric in ("bits_per_byte", "recall", "cr"):
            assert figures.to_dict()[metric] == pytest.approx(result["policies"][policy][metric], rel=1e-4)


def test_the_saved_model_generates(finished):
    from dms_train import generate_command

    ratios = generate_command.run(str(finished[0] / "model"), "def f(x):\n    return x + 1\n" * 4, max_new_tokens=8, evict_bias=50.0)
    assert ratios["seen"] > ratios["alive"] > 0


def test_a_loaded_model_works_in_a_pipeline(finished):
    from transformers import pipeline

    model = dms.load(finished[0] / "model", dtype="float32", evict_bias=2.0)
    writer = pipeline("text-generation", model=model, tokenizer=dms.io.base_models.load_tokenizer(str(finished[0] / "model")))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        init = dms.DMSCache.__init__
        patch.setattr(dms.DMSCache, "__init__", lambda cache, *args, **kwargs: (init(cache, *args, **kwargs), made.append(cache))[0])
        (result,) = writer("import os\nimport sys\n" * 8, max_new_tokens=6, do_sample=False)
    assert result["generated_text"].startswith("import os") and len(result["generated_text"]) > len("import os\nimport sys\n" * 8)
    assert model.dms.mode == "evict" and len(made) == 1 and made[0].report().cr_decided > 1


def test_transformers_alone_loads_the_folder_as_the_dense_model(finished, tiny_folder):
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(finished[0] / "model", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float32")
    ids = torch.arange(5, 40)[None]
    assert torch.equal(ours(ids).logits, base(ids).logits)


def test_gates_alone_load_on_their_base_only(finished, tiny_folder, tmp_path):
    model = dms.load(finished[0] / "gates", base=str(tiny_folder))
    assert model.dms.mode == "evict"
    with pytest.raises(ValueError, match="give that model as base"):
        dms.load(finished[0] / "gates")
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1.0
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="belong to another base"):
        dms.load(finished[0] / "gates", base=str(other))


def test_loading_refuses_what_it_cannot_read(finished, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="has no gates"):
        dms.load(tiny_folder)
    with pytest.raises(ValueError, match="is no folder on this machine"):
        dms.load(tmp_path / "nowhere")
    folder = tmp_path / "model"
    shutil.copytree(finished[0] / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format_version": 2}, "format_version is 2"),
        ({"alignment": "prev"}, "alignment"),
        ({"window": 9}, "disagree"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "dms": {**config["dms"], **change}}))
        with pytest.raises(ValueError, match=message):
            dms.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "gates.safetensors").write_bytes((folder / "gates.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        dms.load(folder)
    shutil.copy(finished[0] / "model" / "gates.safetensors", folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is damaged"):
        dms.load(folder)


def test_a_second_run_does_not_overwrite_the_first(finished, recipe_values):
    values = {**recipe_values, "output_dir": str(finished[0])}
    with pytest.raises(ValueError, match="holds a finished run"):
        loop.run(load(values))


def test_a_foreign_folder_is_never_deleted(recipe_values, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    # A recipe of one's own beside it makes it no run.
    (tmp_path / "precious" / "recipe.yaml").write_text("model: x")
    with pytest.raises(ValueError, match="holds no run"):
        loop.run(load({**recipe_values, "output_dir": str(tmp_path / "precious"), "overwrite": True}))
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_run_that_evicts_nothing_says_so(recipe_values):
    recipe = load({**recipe_values, "steps": 1, "optimizer": {"lr": 1e-9}})
    with pytest.raises(loop.NothingEvicted, match="next to nothing"):
        loop.run(recipe)


def test_changed_frozen_weights_are_noticed(recipe_values, monkeypatch):
    original = loop.distill_step

    def meddling(student, *args, **kwargs):
        with torch.no_grad():
            student.model.norm.weight[3] += 1e-3
        return original(student, *args, **kwargs)

    monkeypatch.setattr(loop, "distill_step", meddling)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        loop.run(load({**recipe_values, "steps": 1}))


def test_a_loss_that_is_not_finite_stops_with_its_step(recipe_values, monkeypatch):
    original, calls = loop.distill_step, []

    def poisoned(*args, **kwargs):
        from dataclasses import replace

        calls.append(1)
        output = original(*args, **kwargs)
        return replace(output, kl=output.kl * float("nan")) if len(calls) == 3 else output

    monkeypatch.setattr(loop, "distill_step", poisoned)
    with pytest.raises(FloatingPointError, match="at step 2"):
        loop.run(load(recipe_values))


@pytest.mark.slow
def test_all_weights_with_a_frozen_copy_as_teacher(recipe_values, tiny_folder):
    result = loop.run(load({**recipe_values, "trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-4}}))
    base = dms.io.base_models.load_base(str(tiny_folder), "float32")
    trained = dms.load(f"{recipe_values['output_dir']}/model", dtype="float32")
    assert not torch.equal(base.model.norm.weight, trained.model.norm.weight)
    assert result["trainable"] == "all"


@pytest.mark.slow
def test_activation_checkpointing_and_offloading_change_nothing(recipe_values, tmp_path):
    losses = {}
    for name, changes in {
        "plain": {},
        "checkpointing": {"activation_checkpointing": True},
        "offloading": {"activation_checkpointing": True, "offload_activations": True},
    }.items():
        folder = tmp_path / name
        loop.run(load({**recipe_values, **changes, "output_dir": str(folder)}))
        losses[name] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses["plain"] == pytest.approx(losses["checkpointing"], rel=1e-5)
    assert losses["checkpointing"] == losses["offloading"]

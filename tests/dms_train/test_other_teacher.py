"""Runs whose teacher is another model, of another width: what is distilled, what is called dense, and what is refused."""

import copy
import json

import pytest
import torch
from dms_train import artifacts, loop, models
from dms_train.recipe import RetrofitRecipe
from small_models import wider_model


def load(values):
    return RetrofitRecipe.model_validate(values)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["gates", "all"])
def test_a_run_is_distilled_from_it(trainable, make_values, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.report, "write_report", lambda *_, **__: [])
    teacher = wider_model(tmp_path / "teacher", tiny_folder)
    optimizer = {"lr": 2e-3, "warmup_steps": 1} | ({} if trainable == "gates" else {"base_lr": 1e-3})
    values = {"steps": 3, "trainable": trainable, "optimizer": optimizer}
    from_it = loop.run(load(make_values(tmp_path / "from-it", teacher=teacher, **values)))
    alone = loop.run(load(make_values(tmp_path / "alone", **values)))
    # Dense is the model itself, whatever it learns from.
    assert from_it["policies"]["dense"]["bits_per_byte"] == pytest.approx(alone["policies"]["dense"]["bits_per_byte"], rel=1e-6)
    kl = [
        [json.loads(line)["kl"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("from-it", "alone")
    ]
    assert kl[0][0] > 10 * kl[1][0], "another model's distribution is farther than its own"


def test_what_is_refused(make_values, tiny_folder, tmp_path):
    def build(**values):
        return models.build(load(make_values(tmp_path / "run", **values)), torch.float32, "cpu")

    tokens = json.loads((tiny_folder / "config.json").read_text())["vocab_size"]
    with pytest.raises(ValueError, match=rf"has another vocabulary .* and {tokens + 8:,} logits against"):
        build(teacher=wider_model(tmp_path / "rows", tiny_folder, vocab_size=tokens + 8))
    with pytest.raises(ValueError, match="has another vocabulary"):
        build(teacher="builtin:tiny")
    for changes, message in (
        ({"teacher_cache": {"path": "x"}}, "teacher_cache is made of the model itself"),
        ({"warm_start": {"steps": 2}}, "warm_start is made of the model itself"),
        (
            {"dms": {"window": 8, "gate": "borrowed"}, "trainable": "all", "optimizer": {"lr": 1e-3, "base_lr": 1e-3}},
            "teacher is for gates with weights of their own",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load(make_values(tmp_path / "run", teacher="other", **copy.deepcopy(changes)))

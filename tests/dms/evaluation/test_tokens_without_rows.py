"""Tokens that the model has no row for are refused before anything is measured or said."""

import json
import shutil

import pytest
from dms_train import generate_command

from dms.evaluation import command
from dms.evaluation.command import evaluate_folder
from dms.evaluation.engine.settings import EvaluationSettings, ScalingSettings
from dms.io import base_models

EXTRA = "<extra>"


@pytest.fixture(scope="module")
def extended(gated_folder, tmp_path_factory):
    """The embedded model, of 2,048 rows, with a token more in its tokenizer."""
    folder = tmp_path_factory.mktemp("extended") / "model"
    shutil.copytree(gated_folder, folder)
    tokenizer = base_models.load_tokenizer(str(folder))
    assert tokenizer.add_tokens([EXTRA]) == 1
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(**changes):
    return EvaluationSettings(suites=["text"], lengths=[96], num_documents=2, **changes)


def test_an_evaluations_text_is_refused(extended, tmp_path):
    (tmp_path / "text.txt").write_text(f"{EXTRA} word\n" * 200)
    with pytest.raises(ValueError, match=r"document 1 of the evaluation holds the token '<extra>', number 2048.* has 2048 rows"):
        evaluate_folder(str(extended), settings_of(text=str(tmp_path / "text.txt")), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluations_problems_are_refused(extended, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{text} 1 + 1 =", "answer": 2}) + "\n" for text in ("so", EXTRA)))
    scaling = ScalingSettings(problems=str(problems), max_k=2)
    settings = EvaluationSettings(suites=[], lengths=[96], scaling=scaling)
    with pytest.raises(ValueError, match=r"document 2 of the evaluation holds the token '<extra>'"):
        evaluate_folder(str(extended), settings, out=tmp_path / "out")


def test_another_models_tokenizer_is_refused(gated_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "num_embeddings", lambda config: 1000)
    with pytest.raises(ValueError, match="is another model's: the embedding has 1000 rows, and 523 tokens have none"):
        evaluate_folder(str(gated_folder), settings_of(), out=tmp_path / "out")


def test_a_prompt_is_refused(extended):
    with pytest.raises(ValueError, match="the prompt holds the token '<extra>', number 2048"):
        generate_command.run(str(extended), f"import {EXTRA}", max_new_tokens=2)

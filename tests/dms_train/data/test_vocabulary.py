"""Tokens that the model has no row for are refused before anything is spent; what a tokenizer merely lists is not."""

import json
import shutil

import pytest
import torch
from dms_train import cache_teacher, generate_data, loop
from dms_train.recipe import GenerateRecipe, RetrofitRecipe
from packed import documents_of, texts

from dms.io import base_models, vocabulary

# The tiny model has 1,024 rows and its tokenizer as many tokens.
EXTRA = "<extra>"
SAID = r"x\.jsonl:2 holds the token '<extra>', number 1024, and the embedding of the model has 1024 rows; take it out of the text"


@pytest.fixture(scope="module")
def extended(tiny_folder, tmp_path_factory):
    """The tiny model with a tokenizer that has tokens more: two of them added, and one of those its padding."""
    folder = tmp_path_factory.mktemp("extended") / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = base_models.load_tokenizer(str(folder))
    assert tokenizer.add_tokens([EXTRA, "<padding>"]) == 2 and len(tokenizer) == 1026
    tokenizer.pad_token = "<padding>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """No weights are loaded."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base_models, "load_base", load)


@pytest.fixture
def rows(jsonl):
    return lambda *rows: {"source": "jsonl", "path": str(jsonl("x.jsonl", rows))}


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    # Of 1,024 tokens 499 are of its own, the others were added.
    vocabulary.check_tokenizer(tokenizer, 1024)
    vocabulary.check_tokenizer(tokenizer, 2048)
    vocabulary.check_tokenizer(tokenizer, 499)
    (token,) = tokenizer.convert_ids_to_tokens([400])
    with pytest.raises(ValueError, match="is another model's: the embedding has 400 rows, and 99 tokens have none") as raised:
        vocabulary.check_tokenizer(tokenizer, 400)
    assert f"{token!r} (number 400) the first" in str(raised.value)


def test_padding_has_a_row(extended, tokenizer):
    other = base_models.load_tokenizer(str(extended))
    assert (vocabulary.padding_id(other, 1026), vocabulary.padding_id(other, 1024)) == (1025, tokenizer.eos_token_id)
    assert vocabulary.padding_id(tokenizer, 1024) == tokenizer.pad_token_id == 1
    other.pad_token = None
    other.eos_token = EXTRA
    assert vocabulary.padding_id(other, 1024) == 0


def recipe_of(make_values, tmp_path, model, data, **changes):
    changes = {"evaluation": {"num_documents": 8, "num_items": 3, "length": 192}, **changes}
    return RetrofitRecipe.model_validate(make_values(tmp_path / "run", model=str(model), data={"length": 64, **data}, **changes))


def test_a_run_is_refused_before_a_model_is_loaded(make_values, tmp_path, extended, rows, no_model):
    recipe = recipe_of(make_values, tmp_path, extended, rows("good", f"a {EXTRA} b", *texts(3)))
    with pytest.raises(ValueError, match=SAID):
        loop.run(recipe)
    assert not (tmp_path / "run").exists()
    # It is not the row that is bad, so that skipping bad ones does not hide it.
    with pytest.raises(ValueError, match=SAID):
        loop.run(recipe_of(make_values, tmp_path, extended, rows("good", f"a {EXTRA} b", *texts(3)) | {"bad_shards": "skip"}))
    cached = recipe_of(make_values, tmp_path, extended, rows("good", f"a {EXTRA} b"), teacher_cache={"path": str(tmp_path / "teacher")})
    with pytest.raises(ValueError, match=SAID):
        cache_teacher.write(cached)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("source", ["builtin", "jsonl"])
def test_another_models_tokenizer_is_refused_by_every_command(make_values, tmp_path, tiny_folder, rows, no_model, source):
    """That of a model with 1,024 tokens, on one with 400 rows."""
    folder = tmp_path / "small"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    data = {"source": "builtin", "items": [1, 2]} if source == "builtin" else rows(*texts(30))
    recipe = recipe_of(make_values, tmp_path, folder, {**data, "length": 192}, teacher_cache={"path": str(tmp_path / "teacher")})
    prompts = {**data, "tokens": 8}
    generate = GenerateRecipe(model=str(folder), output=str(tmp_path / "out.jsonl"), prompts=prompts, num_prompts=2, max_new_tokens=2)
    for command, given in ((loop.run, recipe), (cache_teacher.write, recipe), (generate_data.run, generate)):
        with pytest.raises(ValueError, match="is another model's: the embedding has 400 rows, and 99 tokens have none"):
            command(given)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out.jsonl").exists()


def test_generating_is_refused_before_a_model_is_loaded(tmp_path, extended, rows, no_model):
    recipe = GenerateRecipe(model=str(extended), output=str(tmp_path / "out.jsonl"), prompts=rows("", f"a {EXTRA}"), max_new_tokens=2)
    with pytest.raises(ValueError, match=SAID):
        generate_data.run(recipe)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_builtin_document_is_refused_as_well(make_values, tmp_path, extended, no_model):
    """A tokenizer that begins each text with a token of its own."""
    folder = tmp_path / "begins"
    shutil.copytree(extended, folder)
    tokenizer = base_models.load_tokenizer(str(folder))
    tokenizer.bos_token = EXTRA
    tokenizer.save_pretrained(folder)
    recipe = recipe_of(make_values, tmp_path, folder, {"source": "builtin", "items": [1, 2], "length": 192})
    with pytest.raises(ValueError, match=r"builtin document \d+ holds the token '<extra>', number 1024"):
        loop.run(recipe)


def test_the_runs_own_evaluation_is_refused_before_training(make_values, tmp_path, extended, rows, monkeypatch, no_model):
    original = loop.make_documents

    def documents(*given, **named):
        made = original(*given, **named)
        made[3].input_ids[5] = 1025
        return made

    monkeypatch.setattr(loop, "make_documents", documents)
    with pytest.raises(ValueError, match="document 4 of the evaluation holds the token '<padding>', number 1025"):
        loop.run(recipe_of(make_values, tmp_path, extended, rows(*texts(50)) | {"length": 192}))


def test_a_late_document_is_refused_at_its_place_before_its_step(
    make_values, tmp_path, extended, rows, monkeypatch, open_stream, tokenizer
):
    """Only reading it tells; what was trained until then is saved."""
    texts = [f"{number} " + "word " * 60 for number in range(512)]
    changes = {"steps": 40, "batch_size": 8}
    stream = open_stream({"length": 64, **rows(*texts)}, **changes)
    steps = [documents_of(stream.next_step().micro_batches) for _ in range(40)]
    begins = [tokenizer.decode(ids, skip_special_tokens=True).partition(" ")[0] for ids, _ in steps[30]]
    late = next(int(begin) for begin in begins if begin.isdigit())

    taken, original = [], loop.Engine.step

    def stepping(engine):
        taken.append(1)
        return original(engine)

    monkeypatch.setattr(loop.Engine, "step", stepping)
    recipe = recipe_of(make_values, tmp_path, extended, rows(*texts[:late], f"a {EXTRA}", *texts[late + 1 :]), **changes, save={"every": 4})
    with pytest.raises(ValueError, match=rf"x\.jsonl:{late + 1} holds the token '<extra>'"):
        loop.run(recipe)
    assert 8 <= len(taken) <= 30 and list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_listed_tokens_that_no_text_uses_do_no_harm(make_values, tmp_path, extended, rows):
    """Padding without a row is never read; a run with it is the run with another."""
    losses = []
    for name, folder in (("extended", extended), ("plain", None)):
        other = tmp_path / name
        shutil.copytree(extended, other)
        if folder is None:
            tokenizer = base_models.load_tokenizer(str(other))
            tokenizer.pad_token = tokenizer.eos_token
            tokenizer.save_pretrained(other)
        data = {**rows(*texts(60)), "fill": "pad"}
        recipe = RetrofitRecipe.model_validate(
            make_values(tmp_path / f"run-{name}", model=str(other), data={"length": 96, **data}, steps=2, target_cr=1)
        )
        loop.run(recipe)
        metrics = [json.loads(line) for line in (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()]
        assert any(row["padding"] > 0 for row in metrics)
        losses.append([row["loss"] for row in metrics])
    assert losses[0] == losses[1]


def test_generating_pads_with_a_token_that_has_a_row(tmp_path, extended, rows):
    prompts = rows("import os", "import os\nimport sys\nimport json\n")
    values = {"model": str(extended), "max_new_tokens": 3, "temperature": 0.0, "precision": "fp32"}
    texts_of = {}
    for size in (1, 2):
        output = tmp_path / f"{size}.jsonl"
        generate_data.run(GenerateRecipe(**values, output=str(output), prompts=prompts, batch_size=size))
        texts_of[size] = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert len(texts_of[1]) == 2 and texts_of[1] == texts_of[2]


def test_more_rows_than_tokens_are_no_fault(make_values, tmp_path, tiny_folder, rows):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "padded"
    shutil.copytree(tiny_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(1088)
    model.save_pretrained(folder)
    data = {**rows(*texts(60)), "length": 96}
    loop.run(recipe_of(make_values, tmp_path, folder, data, steps=1, target_cr=1))
    assert (tmp_path / "run" / "result.json").is_file()

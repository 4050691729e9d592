"""Data that the model itself writes: each row a function of its number, whatever happened in between."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml
from dms_train.data.loader import open_data
from dms_train.data.shards import Record
from dms_train.generate_data import prompt_render, run
from dms_train.generated_file import GeneratedFile
from dms_train.recipe import GenerateRecipe
from said import says

from dms.io import base_models


@pytest.fixture
def values(tiny_folder, tmp_path):
    return {
        "model": str(tiny_folder),
        "output": str(tmp_path / "out.jsonl"),
        "prompts": {"source": "builtin", "tokens": 96, "items": [1, 2]},
        "num_prompts": 10,
        "max_new_tokens": 24,
        "batch_size": 4,
        "precision": "fp32",
    }


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8").read().splitlines()]


def generate(values, **changes):
    recipe = GenerateRecipe(**{**values, **changes})
    reasons = run(recipe)
    rows = rows_of(recipe.output)
    assert Counter(row["finish_reason"] for row in rows) == reasons
    return rows


def test_rows_go_on_from_their_prompts(values, tiny_folder, tmp_path):
    rows = generate(values)
    tokenizer = base_models.load_tokenizer(str(tiny_folder))
    assert [row["number"] for row in rows] == list(range(10))
    assert {row["prompt_tokens"] for row in rows} == {96} and len({row["completion"] for row in rows}) == 10
    for row in rows:
        assert row["text"] == row["prompt"] + row["completion"]
        assert row["finish_reason"] == "eos" or row["completion_tokens"] == 24
        assert tokenizer(row["prompt"], add_special_tokens=False)["input_ids"][0] == tokenizer.bos_token_id
    from dms_train.data.packing import Cost
    from dms_train.data.settings import Data

    data = Data(source="jsonl", path=values["output"], prompt="prompt", completion="completion", loss_on="completions", length=128)
    stream = open_data(
        tokenizer, data, batch_size=2, micro_batch_size=2, steps=3, seed=0, cost=Cost(1.0, 1.0), num_embeddings=len(tokenizer)
    )
    (batch,) = stream.next_step().micro_batches
    # A random model's bytes are read back as other tokens; its prompts are still not counted.
    assert 0 < int(batch["loss_mask"].sum()) < 2 * (128 - 90)
    stream.close()


def test_a_row_does_not_depend_on_its_batch(values, tmp_path):
    expected = generate(values)
    for size in (1, 10):
        assert generate(values, batch_size=size, output=str(tmp_path / f"{size}.jsonl")) == expected
    assert generate(values, seed=1, output=str(tmp_path / "seed.jsonl")) != expected


def test_prompts_of_different_lengths_share_a_batch(values, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": "import os\n" * (number % 5 + 1)}) + "\n" for number in range(10)))
    changes = {"prompts": {"source": "jsonl", "path": str(path)}, "num_prompts": None, "temperature": 0.0}
    together = generate(values, **changes)
    alone = generate(values, **changes, batch_size=1, output=str(tmp_path / "alone.jsonl"))
    assert together == alone and len({row["prompt_tokens"] for row in alone}) == 5
    assert Counter(row["prompt"] for row in alone) == Counter(json.loads(line)["text"] for line in path.read_text().splitlines())


def test_several_samples_of_each_prompt(values, tmp_path):
    rows = generate(values, num_prompts=3, samples=3)
    assert [row["number"] for row in rows] == list(range(9))
    assert len({row["prompt"] for row in rows}) == 3 and len({row["completion"] for row in rows}) == 9
    assert rows[0]["prompt"] == rows[2]["prompt"] != rows[3]["prompt"]


@pytest.mark.parametrize("left", ["half a line", "six lines", "all"])
def test_what_a_kill_leaves_is_gone_on_from(values, left, capsys):
    generate(values)
    path = values["output"]
    with open(path, "rb") as file:
        whole = file.read()
    lines = whole.splitlines(keepends=True)
    num_whole = {"half a line": 5, "six lines": 6, "all": 10}[left]
    cut = {"half a line": b"".join(lines[:5]) + lines[5][:30], "six lines": b"".join(lines[:6]), "all": whole}[left]
    with open(path, "wb") as file:
        file.write(cut)
    capsys.readouterr()
    generate(values)
    with open(path, "rb") as file:
        assert file.read() == whole
    assert says(capsys.readouterr().out, f"holds {num_whole} records of this recipe: continuing")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8])
def test_kill_9_while_it_writes(values, tmp_path, kills):
    expected = generate(values, output=str(tmp_path / "whole.jsonl"), num_prompts=40)
    recipe, path = tmp_path / "recipe.yaml", tmp_path / "out.jsonl"
    recipe.write_text(yaml.safe_dump({**values, "num_prompts": 40}))
    command = [sys.executable, "-m", "dms_train.cli", "generate-data", str(recipe)]
    for number in range(kills):
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = path.stat().st_size if path.exists() else 0
        deadline = time.monotonic() + 60
        while job.poll() is None and (path.stat().st_size if path.exists() else 0) <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.03 * number)
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert rows_of(path) == expected


def test_rows_of_another_recipe_are_not_gone_on_with(values):
    generate(values)
    with pytest.raises(ValueError, match="seed is 0 there and 7 here"):
        generate(values, seed=7)
    rows = generate(values, seed=7, overwrite=True)
    assert len(rows) == 10
    with open(values["output"], "a") as file:
        file.write('{"number": 3}\n')
    with pytest.raises(ValueError, match=r"out.jsonl:11 is not the record that was written there"):
        generate(values, seed=7)


def test_files_of_others_are_never_overwritten(values, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious\n")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"no recipe beside them|not written by dms generate-data"):
            generate(values, **changes)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_a_file_in_use_is_refused(values):
    with GeneratedFile(GenerateRecipe(**values), "sources"):
        for changes in ({}, {"seed": 7, "overwrite": True}):
            with pytest.raises(ValueError, match="is being written by another process"):
                generate(values, **changes)


def test_other_prompts_or_weights_are_not_gone_on_with(values, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"x{number} = "}) + "\n" for number in range(6)))
    changes = {"prompts": {"source": "jsonl", "path": str(prompts)}, "num_prompts": 4}
    generate(values, **changes)
    with prompts.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ValueError, match="the files of its prompts, or of its model, are others now"):
        generate(values, **changes)
    assert len(generate(values, overwrite=True, **changes)) == 4 * values.get("samples", 1)


def test_the_models_own_settings_for_generation_are_left_aside(values, tmp_path):
    """transformers fills from them whatever a call leaves open."""
    plain = generate(values, temperature=0.0, samples=1)
    folder = tmp_path / "base"
    shutil.copytree(values["model"], folder)
    settings = folder / "generation_config.json"
    own = json.loads(settings.read_text()) | {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2}
    settings.write_text(json.dumps(own))
    again = generate(values, temperature=0.0, samples=1, model=str(folder), output=str(tmp_path / "again.jsonl"))
    assert [row["completion"] for row in again] == [row["completion"] for row in plain]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"source": "builtin"}}, "prompts.tokens is missing"),
        ({"num_prompts": None}, "num_prompts is missing"),
        ({"temperature": 0.0, "samples": 2}, "no effect with temperature 0"),
        ({"max_new_tokens": 500}, r"prompts of 96 tokens and max_new_tokens 500 exceed the 512 tokens"),
        ({"prompts": {"source": "jsonl", "path": "/nowhere.jsonl"}}, "as a glob matches none"),
        ({"prompts": {"source": "jsonl", "path": "x", "loss_on": "completions"}}, "no effect in prompts"),
        ({"prompts": {"source": "jsonl", "path": "x", "messages": "m"}}, "matches no|has no chat template"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(values, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(GenerateRecipe(**{**values, **changes}))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_chats_prompt_is_all_before_the_last_answer(tiny_folder):
    tokenizer = base_models.load_tokenizer(str(tiny_folder))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    recipe = {"model": "x", "output": "x", "max_new_tokens": 1, "prompts": {"source": "jsonl", "path": "x", "messages": "m"}}
    render = prompt_render(tokenizer, GenerateRecipe(**recipe).prompts, 100)
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    answered, asked, alone, long = render(
        [Record("x", {"m": m}) for m in (chat, chat[:3], chat[1:2], [{"role": "user", "content": "word " * 200}])]
    )
    assert tokenizer.decode(answered.ids) == tokenizer.decode(asked.ids) == "<user>a\n<assistant>b\n<user>c\n<assistant>"
    assert "there is no prompt" in alone.problem and "longer than the context" in long.left_out

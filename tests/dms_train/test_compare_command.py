"""`dms compare`: a page with what is written dense and evicting, to be read by people."""

import json

import pytest
from dms_train.compare_command import _quoted, run
from evicting import save_gated_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gated_tiny(tmp_path_factory.mktemp("gated"))


def prompts(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_the_page_says_where_answers_part(folder, tmp_path, capsys):
    given = prompts(tmp_path, {"prompt": "import os\n"}, "", {"prompt": "def f(x):\n" * 200})
    page = tmp_path / "page.md"
    # Gates that never evict, and gates that always do.
    run(folder, given, str(page), [-1000.0, 1000.0], max_new_tokens=30)
    text = page.read_text()
    first, second = text.split("\n## ")[1:]
    assert first.startswith("1. ") and second.startswith("2. ")
    for part in (first, second):
        assert "evict_bias -1000**: the same; " in part and "CR 1.00" in part and "**dense** (" in part
    assert "at evict_bias -1000 2 of 2 answers are the dense model's" in text
    assert "evict_bias +1000**: the same for " in second and " [...] " in second
    assert "2 of 2, evict_bias +1000" in capsys.readouterr().out


def test_what_is_no_list_of_prompts(folder, tmp_path):
    for row, message in (
        ("{", "line 1 is no JSON"),
        ({"text": "a"}, "line 1: give an object with either prompt or messages"),
        ({"prompt": ""}, "line 1 is empty"),
        ("", "holds no prompts"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no chat template"),
        ({"prompt": "a = 1\n" * 2000}, r"line 1 has \d+ tokens, and with 30 new ones it is above the model's context of 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, prompts(tmp_path, row), str(tmp_path / "page.md"), [0.0], max_new_tokens=30)
    with pytest.raises(ValueError, match="is no file; name a JSONL file"):
        run(folder, str(tmp_path / "none.jsonl"), str(tmp_path / "page.md"), [0.0], max_new_tokens=30)
    assert not (tmp_path / "page.md").exists()


def test_fences_hold_any_text():
    assert _quoted("a ```` b ``") == "`````text\na ```` b ``\n`````"

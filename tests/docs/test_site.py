"""The site: tables of keys are complete, every key says what it means, and the site builds with broken links as errors."""

import re
import subprocess
import sys

import pytest
import yaml
from house import ROOT

TARGETS = [
    target
    for page in (ROOT / "docs").rglob("*.md")
    for target in re.findall(r"^<!-- keys: (\S+) -->$", page.read_text(encoding="utf-8"), re.M)
]


def test_the_recipes_of_all_commands_are_listed():
    assert {target.partition(":")[2] for target in TARGETS} >= {"RetrofitRecipe", "GenerateRecipe", "PretrainRecipe"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_key_says_what_it_means(keys, target):
    silent = [key.name for key in keys.keys_of(keys.load(target)) if not key.meaning]
    assert not silent, f"{target}: write a docstring under {silent}"


def test_every_key_of_a_recipe_is_in_the_table(documented_keys):
    """What a recipe with everything set writes, and what packaged recipes say."""
    from dms_train.recipe import RetrofitRecipe
    from dms_train.recipe_file import load_recipe, packaged_recipes

    known = documented_keys("dms_train.recipe:RetrofitRecipe")
    recipe = load_recipe("tiny/retrofit", ["trainable=gates+lora", "optimizer.base_lr=1e-4", "lora={rank: 4}"], RetrofitRecipe)

    def check(values, prefix: str) -> None:
        for key, value in values.items():
            assert prefix + key in known, prefix + key
            if isinstance(value, dict):
                check(value, f"{prefix}{key}.")

    check(recipe.model_dump() | {"teacher_cache": {"path": "", "top_k": 1}}, "")
    table = (ROOT / "docs" / "_keys.py").exists() and packaged_recipes()
    assert table


def test_the_table_of_recipes_has_them_all(keys):
    from dms_train.recipe_file import packaged_recipes

    table = keys.recipe_table()
    for name in packaged_recipes():
        assert re.search(rf"^\| `{re.escape(name)}` \| \S.*", table, re.M), f"{name}: begin the recipe with a comment on what it does"


def test_a_table_shows_types_defaults_and_choices(keys):
    rows = {line.split(" | ")[0].lstrip("| "): line for line in keys.key_table("dms_train.recipe:RetrofitRecipe").splitlines()[2:]}
    assert "**required**" in rows["`target_cr`"]
    assert "`gates`, `gates+lora`, `all`" in rows["`trainable`"] and "`gates`" in rows["`trainable`"].split(" | ")[2]
    assert "KL(teacher \\|\\| student)" in rows["`beta`"]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"([\w/-]+\.md)$", text, re.M))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_is_an_error(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed (scripts/setup_env.sh docs brings it)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (scripts/setup_env.sh docs brings it)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "doc-heading" in (tmp_path / "api" / "dms" / "index.html").read_text(encoding="utf-8")
    # The switches that make it so, rather than a second build with a link broken on purpose.
    levels = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!!python/name:", ""), yaml.SafeLoader)
    assert levels["strict"] and set(levels["validation"]["links"].values()) == {"warn"}

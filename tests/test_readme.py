"""What the README tells people to type exists and parses."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip().split("#")[0].strip() for line in README.splitlines() if re.match(r"^ {4}(dms |scripts/\w)", line)]


def test_there_are_commands():
    assert {command.split()[0] for command in COMMANDS} >= {"dms", "scripts/quickstart.sh", "scripts/test.sh"}


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_is_one_that_the_program_has(command):
    from dms_train.cli import app
    from dms_train.recipe_file import packaged_recipes
    from typer.main import get_command

    program, *arguments = command.split()
    if program.startswith("scripts/"):
        assert (ROOT / program).stat().st_mode & 0o111, f"{program} is not executable"
        return
    known = get_command(app).commands
    assert arguments[0] in known, command
    options = {name for parameter in known[arguments[0]].params for name in parameter.opts}
    for argument in arguments[1:]:
        if argument.startswith("--"):
            assert argument in options, command
    if arguments[0] in ("retrofit", "pretrain", "generate-data") and not arguments[1].endswith(".yaml"):
        assert arguments[1] in packaged_recipes(), command


def test_the_recipe_in_the_readme_is_valid():
    from dms_train.recipe import RetrofitRecipe

    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert RetrofitRecipe.model_validate(yaml.safe_load(block.replace("6e-5", "0.00006"))).target_cr == 4


def test_the_python_in_the_readme_uses_names_that_exist():
    import dms

    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        compile(block, "README", "exec")
        for name in re.findall(r"\bdms\.(\w+)\(", block):
            assert hasattr(dms, name), name


def test_every_file_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("## ")[0]
    folder = ROOT
    found = 0
    for line in tree.splitlines():
        match = re.match(r"^ {4}( *)([\w.]+/?)(?: {2,}|$)", line)
        if not match:
            continue
        indent, name = match.groups()
        if not indent:
            folder = ROOT / name
            assert folder.exists(), name
        else:
            assert (folder / name).exists(), f"{folder.name}/{name}"
        found += 1
    assert found > 15

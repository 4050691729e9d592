"""What README and docs tell people to type: every command parses, and those marked `<!-- run -->` really run.

Each fence of commands has a mark on the line above it: `<!-- run -->` (it runs here, in order, in a folder of its own), `<!-- runs in: PATHS -->`
(other tests or stages run it, there), or `<!-- needs: WHAT -->` (gpu, nodes, hub or release). YAML is `<!-- recipe -->` (a whole recipe),
`<!-- recipe: part -->` or `<!-- settings -->` (of an evaluation).
"""

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml
from house import ROOT, lines

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md", "kernels/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NEEDS = {"gpu", "nodes", "hub", "release"}
PROGRAMS = r"dms|scripts/|\.ci/|make|pip|python3?|pytest|sbatch|git|mkdocs"


class Block(NamedTuple):
    """A fence of a page: its language, the mark above it, and its text."""

    page: str
    line: int
    language: str
    mark: str
    text: str


class Command(NamedTuple):
    """One line to type, without its comment."""

    place: str
    mark: str
    words: tuple[str, ...]


def blocks_of(page: Path) -> list[Block]:
    found, number, text = [], 0, page.read_text(encoding="utf-8").splitlines()
    while number < len(text):
        if fence := re.match(r"^( *)```(\w*)", text[number]):
            end = next(i for i in range(number + 1, len(text)) if text[i].strip() == "```")
            mark = re.fullmatch(r"<!-- (.*) -->", text[number - 1].strip()) if number else None
            body = "\n".join(line.removeprefix(fence[1]) for line in text[number + 1 : end])
            found.append(Block(page.relative_to(ROOT).as_posix(), number + 1, fence[2], mark[1] if mark else "", body))
            number = end
        number += 1
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> list[Command]:
    found = []
    for number, line in enumerate(block.text.replace("\\\n", " " * 2).splitlines(), block.line + 1):
        if words := shlex.split(line, comments=True):
            found.append(Command(f"{block.page}:{number}", block.mark, tuple(words)))
    return found


COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in commands_of(block)]


def test_commands_stand_in_marked_fences_alone():
    """Else this file would not see them."""
    for page in PAGES:
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            fenced ^= line.strip().startswith("```")
            assert fenced or not re.match(rf"^ {{4}}(?:{PROGRAMS})\S* ", line), (
                f"{page.name}:{number}: put commands into a fence with `bash`"
            )
    for block in BLOCKS:
        allowed = {
            "bash": {"run", *(f"needs: {what}" for what in NEEDS)},
            "yaml": {"recipe", "recipe: part", "settings"},
            "python": {"", "run"},
            "mermaid": {""},
        }
        elsewhere = block.language == "bash" and block.mark.startswith("runs in: ")
        assert elsewhere or block.mark in allowed[block.language], (
            f"{block.page}:{block.line}: {block.mark!r} is no mark of {block.language}"
        )


def test_there_are_commands():
    assert {command.words[0] for command in COMMANDS} >= {"dms", "scripts/quickstart.sh", "scripts/test.sh"}
    assert {block.mark for block in BLOCKS} >= {"run", "recipe", "recipe: part"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the pages' relative paths mean something."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("tests", "scripts", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    whole = {block.text for block in BLOCKS if block.mark == "recipe"}
    assert len(whole) == 1, "README and docs show different recipes as my.yaml"
    (folder / "my.yaml").write_text(whole.pop())
    for block in BLOCKS:
        if block.mark == "settings":
            (folder / "my-evaluation.yaml").write_text(block.text)
    return folder


def schema(name: str) -> type:
    """A settings class, from the module in which the pages find its keys."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    (module,) = set(re.findall(rf"^<!-- keys: (\S+):{name} -->$", pages, re.M))
    return getattr(importlib.import_module(module), name)


def check_dms(arguments: tuple[str, ...]) -> None:
    """The command line takes these arguments, and the recipe loads with these overrides."""
    from dms_train.cli import app
    from dms_train.recipe_file import load_recipe
    from typer.main import get_command

    command, context, rest = get_command(app), None, list(arguments)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no command {' '.join(arguments)}"
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(arguments[0], rest)
    name = {"generate-data": "GenerateRecipe", "pretrain": "PretrainRecipe"}.get(arguments[0], "RetrofitRecipe")
    if context.params.get("settings"):
        told = context.params["settings"]
        assert not [word for word in told if word.startswith("-")], f"no such option: {told}"
        files = [word for word in told if "=" not in word]
        load_recipe(files[0] if files else None, [word for word in told if "=" in word], schema("EvaluationSettings"))
    if "recipe" in context.params and context.params["recipe"] != "all":
        load_recipe(context.params["recipe"], context.params["overrides"] or [], schema(name))


def check(words: tuple[str, ...]) -> None:
    """Raises where a command could not even start."""
    program, *arguments = words
    if program == "dms":
        check_dms(tuple(arguments))
    elif program == "sbatch":
        check((arguments[0],))
    elif program.startswith(("scripts/", ".ci/")):
        assert os.access(ROOT / program, os.X_OK), f"{program} is not executable"
        if program in ("scripts/quickstart.sh", "scripts/launch_node.sh", "scripts/launch_multinode.sh"):
            told = [word for word in arguments if "=" in word and not word.startswith("-")]
            check_dms(("retrofit", "tiny/retrofit", *told))
        if program == "scripts/setup_env.sh":
            assert set(arguments) <= extras()
    elif program == "make":
        assert set(arguments) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)), words
    elif program == "pip":
        for argument in arguments:
            if named := re.search(r"\[(.*)\]", argument):
                assert set(named[1].split(",")) <= extras(), argument
    elif program in ("python", "python3") and arguments[0] == "-m":
        assert arguments[1] in ("pytest", "mypy", "mkdocs", "ruff", "build", "twine"), words
    elif program in ("python", "python3"):
        assert (ROOT / arguments[0]).is_file(), words
    elif program == "transformers":
        from transformers.cli.serve import Serve

        known = {"--" + name.replace("_", "-") for name in inspect.signature(Serve.__init__).parameters}
        assert arguments[0] == "serve" and {word for word in arguments if word.startswith("--")} <= known, words
    else:
        assert program in ("git", "export"), f"{program}: teach tests/docs/test_commands.py this program, or leave it out"


def extras() -> set[str]:
    from configparser import ConfigParser

    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options.extras_require"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_every_command_parses(command, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    check(command.words)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.mark.startswith("runs in: ")], ids=lambda command: command.place)
def test_what_is_said_to_run_elsewhere_is_named_there(command):
    program, *rest = command.words
    named = (
        rest[0]
        if program in ("dms", "transformers")
        else {"make": "make", "pip": "pip install"}.get(program, (rest[0] if program == "python" else program))
    )
    texts = []
    for path in command.mark.removeprefix("runs in: ").split():
        assert (ROOT / path).exists(), f"{command.place}: {path}"
        files = [ROOT / path] if (ROOT / path).is_file() else [file for file in (ROOT / path).rglob("*") if file.suffix in (".py", ".yml")]
        texts += [file.read_text(encoding="utf-8") for file in files]
    assert any(Path(named).name in text for text in texts), f"{command.place}: {named} is in none of {command.mark}"


@pytest.fixture(scope="module")
def sandbox(workplace):
    """As `workplace`, with offline and quiet settings; what the pages run leaves its files here."""
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    shutil.rmtree(workplace / "runs", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield workplace


def run_in_process(words: tuple[str, ...]) -> None:
    """A dms command, without the seconds that starting Python and importing torch take."""
    from dms_train.cli import app
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, list(words[1:]), catch_exceptions=False)
    assert done.exit_code == 0, done.output


# The quickstart makes the run that the others use.
RUN = sorted((block for block in BLOCKS if block.mark == "run"), key=lambda block: block.page != "docs/quickstart.md")


@pytest.mark.slow
def test_marked_blocks_run(sandbox):
    """In one test, because they build on each other's files."""
    for block in RUN:
        place = f"{block.page}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, place, "exec"), {"__name__": "__main__"})
            continue
        for command in commands_of(block):
            if command.words[0] == "dms":
                run_in_process(command.words)
            else:
                done = subprocess.run(command.words, cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, f"{command.place}: {done.stderr}"


def test_launching_says_what_it_would_do(sandbox):
    """`--dry-run` of the launcher, as the page on many GPUs offers it."""
    command = [str(ROOT / "scripts/launch_node.sh"), "tiny/retrofit", "--dry-run"]
    done = subprocess.run(
        command, cwd=sandbox, env={**os.environ, "DMS_SKIP_SETUP": "1", "DMS_VENV": sys.prefix}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "tiny/retrofit" in done.stdout + done.stderr, done.stderr


def test_recipes_in_the_pages_are_valid():
    from dms_train.recipe import RetrofitRecipe
    from dms_train.recipe_file import parse_yaml

    for block in BLOCKS:
        if block.mark == "recipe":
            assert RetrofitRecipe.model_validate(parse_yaml(block.text, block.page)).target_cr == 4


def test_parts_of_recipes_have_keys_that_exist(documented_keys):
    from dms_train.recipe_file import parse_yaml

    known = documented_keys("dms_train.recipe:RetrofitRecipe")
    for block in BLOCKS:
        if block.mark == "recipe: part":
            for key in names(parse_yaml(block.text, block.page)):
                # What a source may say, `data` may say too; columns and options of templates have names of their own.
                plain = key.replace("data.sources[].", "data.", 1)
                free = re.match(r"data\.(template|filter\.where)\.", plain)
                assert free or {key, plain} & known, f"{block.page}:{block.line}: {key}"


def names(values: object, prefix: str = "") -> set[str]:
    """The dotted names of all keys."""
    if isinstance(values, list):
        return set().union(*(names(value, prefix.rstrip(".") + "[].") for value in values)) if prefix else set()
    if not isinstance(values, dict):
        return set()
    return {prefix + key for key in values} | set().union(*(names(value, f"{prefix}{key}.") for key, value in values.items()))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: f"{block.page}:{block.line}")
def test_python_in_the_pages_uses_names_that_exist(block):
    import dms

    compile(block.text, block.page, "exec")
    for name in re.findall(r"\bdms\.(\w+)\(", block.text):
        assert hasattr(dms, name), name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_paths_in_the_pages_exist():
    """Files of the tree that a page names in code; `runs/`, and paths with names to be filled in, are the reader's own."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for path in re.findall(r"`((?:dms|train|kernels|tests|scripts|recipes|docs|examples|\.ci|\.github)/[\w./-]+)`", text):
            assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists() or list(ROOT.glob(f"{path}*")), f"{page.name}: {path}"


def test_every_file_of_citation_and_site_is_yaml():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"]
    assert lines((ROOT / "mkdocs.yml").read_text())

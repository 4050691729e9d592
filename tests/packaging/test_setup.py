"""The scripts: that they parse, what the set-up says and installs, and the versions that it is given."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from house import ROOT, lines
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console

from dms.evaluation.present.tables import results_table
from dms.evaluation.stats.collect import RunFigures

SCRIPTS = [
    *sorted((ROOT / "scripts").glob("*.sh")),
    ROOT / "scripts" / "slurm.sbatch",
    *(ROOT / ".ci" / name for name in ("run", "first_command", "package", "release_notes")),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (scripts/setup_env.sh dev brings it)")
def test_shellcheck():
    done = subprocess.run([SHELLCHECK, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def fake_python(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder with a space in its name that holds what scripts/setup_env.sh reads, and a PATH of our choosing."""
    root, tools = tmp_path / "a checkout", tmp_path / "bin"
    (root / "scripts").mkdir(parents=True)
    tools.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "scripts/setup_env.sh"):
        shutil.copy(ROOT / name, root / name)
    for tool in (
        "bash",
        "env",
        "dirname",
        "sed",
        "tr",
        "sort",
        "head",
        "cat",
        "grep",
        "date",
        "sha256sum",
        "cut",
        "mv",
        "flock",
        "timeout",
    ):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)

    def run(*args, **env):
        command = [str(root / "scripts" / "setup_env.sh"), *args]
        return subprocess.run(command, cwd="/", env={"PATH": str(tools), **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    return root, tools, run


def test_setup_names_the_missing_compiler(checkout):
    _, _, run = checkout
    done = run()
    assert done.returncode == 1
    assert "apt-get install g++" in done.stderr


def test_setup_names_the_missing_python(checkout):
    _, tools, run = checkout
    fake_python(tools, "g++", "exit 0")
    fake_python(tools, "python3", "exit 127")
    fake_python(tools, "python3.12", "echo 3.9")
    done = run()
    assert done.returncode == 1
    assert "no Python 3.10 to 3.13" in done.stderr
    assert "python3-venv" in done.stderr


def test_setup_names_the_missing_venv(checkout):
    _, tools, run = checkout
    fake_python(tools, "g++", "exit 0")
    fake_python(tools, "python3", '[[ "$2" == *version_info* ]] && echo 3.11')
    done = run()
    assert done.returncode == 1
    assert "cannot make virtual environments" in done.stderr
    assert "apt-get install python3-venv" in done.stderr


@pytest.mark.parametrize(("version", "complaint"), [("3.9", "is Python 3.9"), ("3.14", "is Python 3.14"), ("", "does not run")])
def test_setup_refuses_a_python_that_does_not_fit(checkout, version, complaint):
    _, tools, run = checkout
    fake_python(tools, "g++", "exit 0")
    fake_python(tools, "mine", f"echo {version}" if version else "exit 1")
    done = run(PYTHON=str(tools / "mine"))
    assert done.returncode == 1
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("args", "env", "complaint"),
    [
        ((), {"DMS_VERSIONS": "new"}, "DMS_VERSIONS is 'new'; it may be locked or newest"),
        ((), {"DMS_VENV": "venv"}, "DMS_VENV is 'venv'; give an absolute path"),
        (
            ("lmeval",),
            {},
            "no extra 'lmeval'; there are: train evaluate report track deepspeed lora gguf quantized openai serve all docs dev",
        ),
    ],
)
def test_setup_refuses_what_it_does_not_know(checkout, args, env, complaint):
    _, _, run = checkout
    done = run(*args, **env)
    assert done.returncode == 1
    assert complaint in done.stderr


@pytest.fixture
def installs(checkout):
    """`installs(*extras, **env)`: the arguments of each `pip install` that a set-up calls for, with a venv stood in by a stub that notes
    them, knows which PyTorch it was given, and does not reach PyTorch's index."""
    root, tools, run = checkout
    calls, torch = root / "calls", root / "torch"
    fake_python(tools, "g++", "exit 0")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "pyvenv.cfg").write_text("version = 3.11.7\n")
    fake_python(
        root / ".venv" / "bin",
        "python",
        f"""case "$*" in
            *version_info*) echo 3.11 ;;
            *'version("torch")'*) [[ -s "{torch}" ]] && cat "{torch}" ;;
            -\\ *) exit 1 ;;
            *install*torch*--editable*) echo "$*" >> "{calls}" ;;
            *install*torch==*) echo "$*" >> "{calls}"; sed 's/.*torch==//' <<<"$*" > "{torch}" ;;
            *install*torch*) echo "$*" >> "{calls}"; echo 2.14.0 > "{torch}" ;;
            *install*) echo "$*" >> "{calls}" ;;
        esac""",
    )

    def _installs(*args, **env) -> list[str]:
        calls.write_text("")
        done = run(*args, **env)
        assert done.returncode == 0, done.stderr
        return re.findall(r" install (.*)", calls.read_text())

    return _installs


def editable(calls: list[str]) -> list[str]:
    return [found for call in calls for found in re.findall(r"--editable (.*)", call)]


def test_setup_is_quick_when_there_is_nothing_to_do(checkout, installs):
    """Installs once, then not again until something that it reads has changed."""
    root, _, _ = checkout
    assert editable(installs()) == [str(root)]
    start = time.perf_counter()
    assert installs() == []
    assert time.perf_counter() - start < 1.0
    assert editable(installs("dev")) == [f"{root}[dev]"]
    assert installs() == []
    assert editable(installs("lora")) == [f"{root}[dev,lora]"]
    assert installs("dev", "lora") == []
    for name in ("setup.cfg", "constraints.txt"):
        (root / name).write_text((root / name).read_text() + "\n")
        assert editable(installs()) == [f"{root}[dev,lora]"]
    everything = "deepspeed,dev,evaluate,gguf,lora,report,track,train"
    assert editable(installs("all")) == [f"{root}[{everything}]"]
    assert installs("train", "evaluate", "all") == []


def test_setup_installs_the_locked_versions(checkout, installs):
    root, _, _ = checkout
    lock = (root / "constraints.txt").read_text()
    (pin,) = re.findall(r"^torch==(.*)$", lock, re.M)
    first, *others = installs()
    assert first.endswith(f" torch=={pin}")
    assert all(f"--constraint {root}/.venv/constraints.txt" in call and "--upgrade" not in call for call in others) and others
    assert (root / ".venv/constraints.txt").read_text() == lock


def test_setup_installs_the_newest_on_request(checkout, installs):
    """PyTorch apart, whose newest build may be one for CUDA where its CPU index does not answer."""
    root, _, _ = checkout
    assert installs()
    (pin,) = re.findall(r"^torch==(.*)$", (root / "constraints.txt").read_text(), re.M)
    calls = installs(DMS_VERSIONS="newest")
    assert "--upgrade --upgrade-strategy eager" in calls[-1] and editable(calls) == [str(root)]
    assert (root / ".venv/constraints.txt").read_text() == f"torch=={pin}\n"
    assert installs(DMS_VERSIONS="newest") == []
    # And back.
    assert "--upgrade" not in installs()[-1]


def test_setup_leaves_pytorch_to_the_gpu(checkout, installs):
    root, tools, _ = checkout
    fake_python(tools, "nvidia-smi", "exit 0")
    first, *_ = installs()
    (wanted,) = re.findall(r"^ *(torch[<>=].*)$", (root / "setup.cfg").read_text(), re.M)
    assert first.endswith(f" {wanted}")
    lock, used = ((root / name).read_text().splitlines() for name in ("constraints.txt", ".venv/constraints.txt"))
    assert used and [line for line in lock if line not in used] == [line for line in lock if re.match("(torch|triton|setuptools)==", line)]


# The locked versions.

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins(python: str) -> dict[str, Version]:
    """What constraints.txt has for a Python on Linux, by canonical name."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "platform_system": "Linux"}
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate(environment):
            ((operator, version),) = ((spec.operator, spec.version) for spec in one.specifier)
            assert operator == "==" and canonicalize_name(one.name) not in found, line
            found[canonicalize_name(one.name)] = Version(version)
    return found


def requirements(setup_cfg) -> list[Requirement]:
    extras = setup_cfg["options.extras_require"]
    told = lines(setup_cfg["options"]["install_requires"])
    told += [line for name in set(extras) - {"serve", "all"} for line in lines(extras[name])]
    return [Requirement(line) for line in told]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_bounds(setup_cfg, python):
    locked = pins(python)
    for one in requirements(setup_cfg):
        version = locked.get(canonicalize_name(one.name))
        assert version is not None and one.specifier.contains(version), f"{one} for Python {python}: {version}; run scripts/lock.sh"


def test_the_lock_fits_machines_with_and_without_a_gpu():
    text = (ROOT / "constraints.txt").read_text()
    assert len(re.findall(r"^torch==[\d.]+$", text, re.M)) == 1
    assert not re.search(r"^(nvidia|cuda)", text, re.M)


def test_what_we_reach_into_has_an_upper_bound(setup_cfg):
    bounded = {canonicalize_name(one.name) for one in requirements(setup_cfg) if any("<" in spec.operator for spec in one.specifier)}
    touched = {"torch", "transformers", "accelerate", "datasets", "wandb", "deepspeed", "peft", "lm-eval", "triton", "kernels"}
    assert touched <= bounded


PINNED = r"actions/[a-z-]+@v\d+|pypa/gh-action-pypi-publish@release/v1"


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_run_scripts_that_exist(workflow):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    for job in jobs.values():
        assert job["timeout-minutes"] and {job.get("needs")} <= {None, *jobs}
        choices = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(PINNED, step["uses"])
                continue
            for choice in choices:
                program, *arguments = step["run"].replace("${{ matrix.command }}", choice.get("command", "")).split()
                assert set(arguments) <= set(targets) if program == "make" else os.access(ROOT / program, os.X_OK), step["run"]


def test_everything_in_github_is_yaml_or_text():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(names) == len(set(names)) > 0


def test_the_notes_of_the_present_version_can_be_released():
    command = ROOT / ".ci/release_notes"
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "dms/__init__.py").read_text(), re.M)[1]
    done = subprocess.run([command, f"v{version}"], capture_output=True, text=True)
    assert done.returncode == 0 and "dms retrofit" in done.stdout, done.stderr
    done = subprocess.run([command, "v99.0.0"], capture_output=True, text=True)
    assert done.returncode == 1 and "the tag is v99.0.0" in done.stderr


# What continuous integration reads of the first command.


@pytest.mark.parametrize(
    ("cr", "complaint"),
    [
        ({"dense": 1.0, "dms": 3.11, "sliding_window": 3.1}, None),
        ({"dense": 1.0, "dms": 1.0, "sliding_window": 1.0}, "it has evicted next to nothing"),
        ({"dense": 1.0, "dms": 3.11, "sliding_window": 1.0}, "not the same size"),
        ({"dense": 1.0, "dms": 3.11}, "dense, dms and sliding_window were expected"),
    ],
    ids=["good", "nothing evicted", "another size", "a row is missing"],
)
def test_the_table_is_read(tmp_path, cr, complaint):
    figures = {"bits_per_byte": 1.3, "recall": 1.0, "recall_by_distance": [1.0, None, 0.4, 0.0], "recall_questions": 9, "by_task": {}}
    figures |= {"cr_decided": None, "bytes": 1000, "seconds": 1.0}
    by_policy = {name: RunFigures(**figures, cr=value, memory=None if name == "dense" else "compacted") for name, value in cr.items()}
    table = results_table(by_policy, "builtin:tiny at 512 tokens, target CR 4")
    with (tmp_path / "table.txt").open("w") as file:
        Console(file=file, width=100).print(table)
    done = subprocess.run([sys.executable, ROOT / ".ci/check_table.py", tmp_path / "table.txt"], capture_output=True, text=True)
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr

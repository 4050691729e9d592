"""Guards of the house: what is packaged, what may import what, and what must never stand in the tree."""

import ast
import configparser
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / "scripts" / "slurm.sbatch", ROOT / ".ci" / "run"]


def python(code: str, *, flags: tuple[str, ...] = (), cwd: Path = ROOT, **env: str) -> str:
    """Run code in a fresh interpreter with cwd first on its path; what it prints, or a failure with what it complains of."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def packages(setup_cfg) -> dict[str, Path]:
    """The folder of each package that setup.cfg lists, found as setuptools finds it: the nearest ancestor in package_dir."""
    folders = dict(re.split(r"\s*=\s*", line) for line in lines(setup_cfg["options"]["package_dir"]))
    found = {}
    for name in lines(setup_cfg["options"]["packages"]):
        parts = name.split(".")
        cut = next(cut for cut in range(len(parts), 0, -1) if ".".join(parts[:cut]) in folders)
        found[name] = ROOT.joinpath(folders[".".join(parts[:cut])], *parts[cut:])
    return found


def tree_files() -> list[Path]:
    """The files that belong to the repository: tracked, or not ignored; without git, all but the usual leavings."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(git, capture_output=True, check=True)
        names = [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
    leavings = {".git", ".venv", "runs", "wandb", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    return [ROOT / name for name in names if not leavings & set(name.parts) and (ROOT / name).is_file()]


def test_transformers_imports_with_the_root_first_on_the_path():
    """A package of ours named `kernels` would shadow the one that transformers imports."""
    out = python("import sys; assert sys.path[0] == ''; from transformers import LlamaForCausalLM, Trainer; print(Trainer.__name__)")
    assert out.endswith("Trainer")


def test_kernels_is_no_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_conftest_or_package_at_the_root_of_the_tests():
    for name in ("conftest.py", "__init__.py", "tests/__init__.py"):
        assert not (ROOT / name).exists(), name


def test_every_package_folder_is_listed(packages):
    listed = set(packages.values())
    for folder in listed:
        assert (folder / "__init__.py").is_file(), f"setup.cfg lists {folder}, which has no __init__.py"
    sources = [path for path in tree_files() if path.suffix == ".py"]
    roots = [folder for name, folder in packages.items() if name in ("dms", "dms.train", "dms.recipes", "dms_kernels")]
    packaged = {path.parent for path in sources if any(path.is_relative_to(root) for root in roots)}
    assert packaged <= listed, f"not in setup.cfg's packages: {sorted(map(str, packaged - listed))}"
    elsewhere = {path.parent for path in sources if path.name == "__init__.py" and "tests" not in path.relative_to(ROOT).parts}
    assert elsewhere <= listed, f"packages outside the known folders: {sorted(map(str, elsewhere - listed))}"


def test_every_data_file_is_covered_by_package_data(setup_cfg, packages):
    globs = {name: lines(value) for name, value in setup_cfg["options.package_data"].items()}
    covered = {path for name, patterns in globs.items() for pattern in patterns for path in packages[name].glob(pattern)}
    roots = set(packages.values())
    data = {path for path in tree_files() if path.suffix != ".py" and any(path.is_relative_to(root) for root in roots)}
    documents = {path for path in data if path.suffix == ".md" and "recipes" not in path.parts}
    assert data - documents <= covered, f"not in setup.cfg's package_data: {sorted(map(str, data - documents - covered))}"
    assert any(path.name == "retrofit.yaml" for path in covered)


def test_one_version(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: dms.__version__"
    out = python("import dms, importlib.metadata as m; print(dms.__version__, m.version('dms-retrofit'))")
    assert len(set(out.split())) == 1, f"{out}: install the project again"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the tree."""
    source, out = tmp_path_factory.mktemp("source") / "a copy", tmp_path_factory.mktemp("wheel")
    for path in tree_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("dms_retrofit-*.whl")
    return built


def test_wheel_holds_every_package_recipe_and_licence(wheel, packages):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in packages.items():
        inside = package.replace(".", "/")
        for path in folder.glob("*.py"):
            assert f"{inside}/{path.name}" in names
    for path in (ROOT / "recipes").rglob("*"):
        if path.suffix == ".yaml" or "model" in path.relative_to(ROOT / "recipes").parts[:-1]:
            assert f"dms/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in names
    assert any(name.endswith("LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"dms", "dms_kernels"}


def test_wheel_used_from_inside_a_checkout(wheel, tmp_path):
    """./dms is found first; the rest of the package must then come from the wheel."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    # -S leaves out site-packages' .pth files and with them the editable install.
    code = """
        import os, sys
        sys.path[1:1] = os.environ["TARGETS"].split(os.pathsep)
        import dms, dms.recipes, dms.train, dms_kernels
        for module in (dms, dms.train, dms.recipes, dms_kernels):
            print(module.__file__)
    """
    purelib = sysconfig.get_paths()["purelib"]
    where = [Path(line) for line in python(code, flags=("-S",), TARGETS=os.pathsep.join([str(target), purelib])).splitlines()]
    assert where == [ROOT / "dms/__init__.py", *(target / name / "__init__.py" for name in ("dms/train", "dms/recipes", "dms_kernels"))]
    # And from anywhere else it is whole by itself.
    where = python(code, flags=("-S",), cwd=tmp_path, TARGETS=os.pathsep.join([str(target), purelib])).splitlines()
    assert all(Path(line).is_relative_to(target) for line in where)


def imports_of(path: Path, package: str) -> set[str]:
    """Full names of all that a module imports, wherever in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def modules(packages: dict[str, Path], top: str, *, without: tuple[str, ...] = ()) -> list[tuple[Path, set[str]]]:
    chosen = [name for name in packages if f"{name}.".startswith(f"{top}.") and not f"{name}.".startswith(tuple(f"{x}." for x in without))]
    return [(path, imports_of(path, name)) for name in chosen for path in sorted(packages[name].glob("*.py"))]


def test_dms_never_imports_the_training(packages):
    for path, found in modules(packages, "dms", without=("dms.train", "dms.recipes")):
        assert not [name for name in found if name == "dms.train" or name.startswith("dms.train.")], path


def test_kernels_import_torch_and_triton_alone(packages):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "dms_kernels"}
    for path, found in modules(packages, "dms_kernels"):
        assert {name.split(".")[0] for name in found} <= allowed, path


def test_scanner_sees_every_kind_of_import(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import dms.train.loop\nfrom dms import train\nfrom . import train\nfrom .train import loop\ndef f():\n    from ..x import y\n"
    )
    assert {"dms.train.loop", "dms.train", "x.y"} <= imports_of(source, "dms") | imports_of(source, "dms.sub")
    source.write_text("import importlib\nimportlib.import_module('dms.train.loop')\n")
    assert "dms.train.loop" in imports_of(source, "dms")


def test_kernels_ship_alone():
    python("""
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("dms", "transformers", "accelerate"):
                    raise ImportError(f"dms_kernels must not need {name}")

        sys.meta_path.insert(0, Refuse())
        sys.path.insert(0, "kernels")
        import dms_kernels

        assert dms_kernels.__file__
        assert not {"dms", "transformers", "accelerate"} & set(sys.modules)
    """)


def run_help() -> tuple[float, float]:
    """Seconds on the clock and on the processor of one `dms --help`."""
    command = Path(sysconfig.get_path("scripts"), "dms")
    assert command.exists(), "the console command is not installed"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([command, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "retrofit" in done.stdout
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_little():
    assert min(run_help()[1] for _ in range(3)) < 0.5


def test_help_is_instant():
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 2 * cores:
        pytest.skip(f"load {load:.1f} on {cores} cores: the clock would measure the other processes")
    seconds = [run_help()[0] for _ in range(5)]
    assert min(seconds) < 1.0, seconds


def test_the_command_imports_nothing_heavy():
    python(
        "import sys, dms.train.cli; heavy = {'torch', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )


# Written in pieces, so that this file passes its own test.
REGISTRIES = [
    a + b for a, b in (("py", "pi.org"), ("python", "hosted.org"), ("ana", "conda.org"), ("conda.", "anaconda"), ("npm", "js.org"))
]
REGISTRIES += [a + b for a, b in (("crates", ".io"), ("jf", "rog"), ("arti", "factory"), ("dev", "pi"), ("aliyun", ".com"))]
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Names that stand for anybody may serve as examples.
ANYBODY = r"(?!(?:someone|somebody|user|you|me)/)"
HOMES = re.compile(r"(?<![\w.\-}~/])/(?:" + "ro" + "ot|ho" + rf"me/{ANYBODY}\w+|Us" + rf"ers/{ANYBODY}\w+)/")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    found = {}
    for path in tree_files():
        try:
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_nothing_that_is_ignored_is_tracked():
    """An environment or a run that was committed by mistake comes with every clone."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not tracked, f"{len(tracked)} ignored files are tracked (git rm -r --cached), such as {tracked[:3]}"


def test_no_package_registry_is_named(texts):
    """Whoever installs decides where packages come from; only PyTorch's public CPU index is named."""
    for name, text in texts.items():
        assert not [host for host in REGISTRIES if host in text.lower()], name
        flags = re.findall(r"--(?:extra-)?index-url[ =]+[\"']?([^\s\"'`]+)", text) if name.startswith(("scripts/", ".ci/")) else []
        assert set(flags) <= {"$cpu_index"}, name
    assert f'cpu_index="{PYTORCH_INDEX}"' in texts["scripts/setup_env.sh"]


def test_no_path_of_a_developers_machine(texts):
    here = re.compile(r"(?<![\w.\-}~/])" + re.escape(str(ROOT)) + r"(?![\w\-])") if len(ROOT.parts) > 2 else None
    for name, text in texts.items():
        assert not HOMES.search(text), name
        assert not (here and here.search(text)), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
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
    for name in ("setup.cfg", "pyproject.toml", "scripts/setup_env.sh"):
        shutil.copy(ROOT / name, root / name)
    for tool in ("bash", "env", "dirname", "sed", "tr", "sort", "head", "cat", "sha256sum", "cut", "mv", "flock", "timeout"):
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


def test_setup_is_quick_when_there_is_nothing_to_do(checkout):
    """With a venv stood in by stubs that record what they are called for: installs once, then not again until setup.cfg changes."""
    root, tools, run = checkout
    calls = root / "calls"
    fake_python(tools, "g++", "exit 0")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "pyvenv.cfg").write_text("version = 3.11.7\n")
    fake_python(root / ".venv" / "bin", "python", f'[[ "$2" == *version_info* ]] && echo 3.11; echo "$*" >> "{calls}"; exit 0')

    def installs(*args) -> list[str]:
        calls.write_text("")
        done = run(*args)
        assert done.returncode == 0, done.stderr
        return re.findall(r"--editable (.*)", calls.read_text())

    assert installs() == [str(root)]
    start = time.perf_counter()
    assert installs() == []
    assert time.perf_counter() - start < 1.0
    assert installs("dev") == [f"{root}[dev]"]
    assert installs() == []
    assert installs("lora") == [f"{root}[dev,lora]"]
    assert installs("dev", "lora") == []
    (root / "setup.cfg").write_text((root / "setup.cfg").read_text() + "\n")
    assert installs() == [f"{root}[dev,lora]"]

"""Guards of the house: what is packaged, what may import what, and what must never stand in the tree."""

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from house import ROOT, imports_of, lines, modules, python, tree_files


@pytest.mark.slow
def test_transformers_imports_with_the_root_first_on_the_path():
    """A package of ours named `kernels` would shadow the one that transformers imports."""
    out = python("import sys; assert sys.path[0] == ''; from transformers import LlamaForCausalLM, Trainer; print(Trainer.__name__)")
    assert out.endswith("Trainer")


@pytest.mark.parametrize("folder", ["kernels", "serve", "train"])
def test_folders_of_packages_are_none(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_conftest_or_package_at_the_root_of_the_tests():
    for name in ("conftest.py", "__init__.py", "tests/__init__.py"):
        assert not (ROOT / name).exists(), name


def test_every_package_folder_is_listed(packages):
    listed = set(packages.values())
    for folder in listed - {ROOT / "recipes"}:
        assert (folder / "__init__.py").is_file(), f"setup.cfg lists {folder}, which has no __init__.py"
    sources = [path for path in tree_files() if path.suffix == ".py"]
    roots = [folder for name, folder in packages.items() if name in ("dms", "dms_train", "dms_vllm", "dms_kernels")]
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


def test_dms_never_imports_the_training_or_the_serving(packages):
    for path, found in modules(packages, "dms"):
        assert not [name for name in found if name.split(".")[0] in ("dms_train", "dms_vllm")], path


def test_kernels_import_torch_and_triton_alone(packages):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "dms_kernels"}
    for path, found in modules(packages, "dms_kernels"):
        assert {name.split(".")[0] for name in found} <= allowed, path


def test_scanner_sees_every_kind_of_import(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("import dms.a.loop\nfrom dms import b\nfrom . import c\nfrom .d import loop\ndef f():\n    from ..x import y\n")
    assert {"dms.a.loop", "dms.b", "dms.c", "dms.d.loop", "x.y"} <= imports_of(source, "dms") | imports_of(source, "dms.sub")
    source.write_text("import importlib\nimportlib.import_module('dms_train.loop')\n")
    assert "dms_train.loop" in imports_of(source, "dms")


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


def cost_of(code: str) -> tuple[float, float]:
    """Seconds on the processor that code takes in a Python that has started, and MiB that the process held at its peak."""
    said = python(f"""
import atexit, pathlib, re, time
start = time.process_time()

@atexit.register
def say():
    print(time.process_time() - start, re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

{code}
""")
    seconds, kib = said.splitlines()[-1].split()
    return float(seconds), int(kib) / 1024


def test_help_costs_little():
    """Measured: 0.16 s of processor time and 25 MiB at the peak; with torch they would be over 1 s and 220 MiB."""
    assert min(run_help()[1] for _ in range(3)) < 0.5
    _, memory = cost_of("import sys; sys.argv = ['dms', '--help']; from dms_train.cli import main; main()")
    assert memory < 50


def test_importing_dms_costs_little():
    """Measured: 5 ms and 1 MiB; what is heavy waits for its first use."""
    _, without = cost_of("")
    seconds, memory = min(cost_of("import dms; dms.__version__") for _ in range(3))
    assert seconds < 0.1
    assert memory - without < 5


def test_help_is_instant():
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 2 * cores:
        pytest.skip(f"load {load:.1f} on {cores} cores: the clock would measure the other processes")
    seconds = [run_help()[0] for _ in range(5)]
    assert min(seconds) < 1.0, seconds


def test_the_command_imports_nothing_heavy():
    python(
        "import sys, dms_train.cli; heavy = {'torch', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
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

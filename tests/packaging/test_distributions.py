"""Wheel and source distribution: what is in them, and what of them runs with the base dependencies alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest
from house import ROOT, lines, modules, python, tree_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def run_in(folder: Path, *command) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the tree, and nothing taken from what an earlier build left there."""
    source, out = tmp_path_factory.mktemp("source") / "a copy", tmp_path_factory.mktemp("sdist")
    for path in tree_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    run_in(source, "-c", "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", out)
    (built,) = out.glob("dms_retrofit-*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, as pip does where there is no wheel."""
    out = tmp_path_factory.mktemp("wheel")
    run_in(out, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, sdist)
    (built,) = out.glob("dms_retrofit-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_package_recipe_and_licence(names, packages):
    for package, folder in packages.items():
        inside = package.replace(".", "/")
        for path in folder.glob("*.py"):
            assert f"{inside}/{path.name}" in names
    for path in (ROOT / "recipes").rglob("*"):
        if path.suffix == ".yaml" or "model" in path.relative_to(ROOT / "recipes").parts[:-1]:
            assert f"dms/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in names
    assert any(name.endswith("LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"dms", "dms_train", "dms_vllm", "dms_kernels"}


def test_wheel_holds_data_and_type_information(names):
    assert {
        "dms/py.typed",
        "dms_train/py.typed",
        "dms_kernels/py.typed",
        "dms/costs/hardware.yaml",
        "dms/benchmarks/Qwen3-8B.json",
    } <= names
    assets = {f"dms/report/assets/{path.name}" for path in (ROOT / "dms/report/assets").iterdir()}
    assert assets and assets <= names


def test_wheel_holds_nothing_else(names):
    """No test, nothing that a build left, no document that lies beside a module."""
    models = ("/tiny/model/", "/smollm2-135m/gates-cr8/")
    kinds = {PurePosixPath(name).suffix for name in names if ".dist-info/" not in name and not any(model in name for model in models)}
    assert kinds == {".py", ".yaml", ".typed", ".json", ".js", ".css"}
    assert not [name for name in names if {"tests", "__pycache__"} & set(PurePosixPath(name).parts) or "/test_" in name]


def test_wheel_asks_for_the_base_dependencies_alone(wheel, setup_cfg):
    (inside,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(inside).decode()
    wanted = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, re.M)]
    base = {one.name for one in wanted if one.marker is None}
    assert base == {"torch", "transformers", "safetensors", "pydantic", "pyyaml", "typer", "rich"}
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.M)) == set(setup_cfg["options.extras_require"])


def test_sdist_holds_every_file_of_the_tree(sdist):
    with tarfile.open(sdist) as archive:
        inside = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive.getmembers() if member.isfile()}
    # What belongs to the repository, not to a release.
    left_out = {".gitignore", ".pre-commit-config.yaml"}
    tree = {path.relative_to(ROOT).as_posix() for path in tree_files()}
    missing = {name for name in tree - inside - left_out if not name.startswith(".github/")}
    assert not missing
    assert {"constraints.txt", "tests/conftest.py", "scripts/test.sh", ".ci/run"} <= inside


def test_all_brings_every_extra_for_users(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    (everything,) = lines(extras["all"])
    assert Requirement(everything).extras == set(extras) - {"all", "dev", "docs", "openai", "quantized", "serve"}


OURS = ("dms", "dms_train", "dms_vllm", "dms_kernels")
# Imported, and installed with a package that we declare and that needs it.
BROUGHT = {"packaging": "transformers", "huggingface_hub": "transformers", "jinja2": "torch", "pyarrow": "datasets"}


def test_what_is_imported_is_declared(setup_cfg, packages):
    """A package that only happens to be installed here is missing elsewhere."""
    extras = setup_cfg["options.extras_require"]
    declared = lines(setup_cfg["options"]["install_requires"])
    declared += [line for name in set(extras) - {"all", "dev", "serve"} for line in lines(extras[name])]
    known = {Requirement(line).name for line in declared}
    for one, by in BROUGHT.items():
        assert by in known and canonicalize_name(one) in {canonicalize_name(Requirement(line).name) for line in metadata.requires(by)}
        # Triton is installed with PyTorch's builds for CUDA.
        # vLLM's extra is declared apart, and brings prometheus_client.
        known |= {*sys.stdlib_module_names, *BROUGHT, *OURS, "yaml", "triton", "vllm", "prometheus_client"}
    for path, found in [pair for name in OURS for pair in modules(packages, name)]:
        strangers = {name.split(".")[0] for name in found if name} - known
        assert not strangers, f"{path} imports {strangers}, which setup.cfg does not name"


@pytest.mark.slow
def test_wheel_used_from_inside_a_checkout(wheel, tmp_path):
    """./dms is found first, with the checkout's recipes; the other packages come from the wheel."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    # -S leaves out site-packages' .pth files and with them the editable install.
    code = """
        import os, sys
        sys.path[1:1] = os.environ["TARGETS"].split(os.pathsep)
        import dms, dms_train, dms_kernels
        from dms.builtin import recipes_folder
        for module in (dms, dms_train, dms_kernels):
            print(module.__file__)
        print(recipes_folder())
    """
    installed = [path for path in sys.path if path.endswith("site-packages")]
    where = [Path(line) for line in python(code, flags=("-S",), TARGETS=os.pathsep.join([str(target), *installed])).splitlines()]
    inside = [target / name for name in ("dms_train/__init__.py", "dms_kernels/__init__.py")]
    assert where == [ROOT / "dms/__init__.py", *inside, ROOT / "recipes"]
    # And from anywhere else it is whole by itself.
    where = python(code, flags=("-S",), cwd=tmp_path, TARGETS=os.pathsep.join([str(target), *installed])).splitlines()
    assert all(Path(line).is_relative_to(target) for line in where)


@pytest.mark.slow
def test_modules_that_import_with_the_base_dependencies_alone():
    """All of inference and the command line do; what else does not lacks a package that an extra brings."""
    said = python(
        "import base_alone, runpy; base_alone.hide(); runpy.run_path('.ci/check_modules.py')", PYTHONPATH=str(ROOT / "tests/helpers")
    )
    # The blocker works: training cannot be imported.
    assert "'dms_train.loop': 'accelerate'" in said, said

"""What is installed against what was tested and what each command needs; setup.cfg is the one source of both."""

import subprocess
import sys
from importlib import metadata

import base_alone
import pytest
from packaging.requirements import Requirement

from dms import requirements


def test_each_extra_brings_what_the_table_says_and_the_table_names_all_that_they_bring():
    setup = base_alone.read_setup()
    always = base_alone.with_their_requirements(base_alone.names(setup["options"]["install_requires"]))
    named: dict[str, set[str]] = {}
    for module, extra in requirements.EXTRAS.items():
        named.setdefault(extra, set()).add(module.replace("_", "-"))
    for extra, packages in named.items():
        listed = base_alone.names(setup["options.extras_require"][extra]) - always
        # What several extras bring is in the table with one of them.
        listed -= set().union(*(others for name, others in named.items() if name != extra))
        assert listed <= packages <= base_alone.with_their_requirements(listed), extra
        assert packages.isdisjoint(always), extra


def test_ranges_are_those_of_the_installed_distribution():
    lines = [Requirement(line) for line in metadata.requires("dms-retrofit")]
    (torch,) = (line for line in lines if line.name == "torch")
    assert torch.specifier and set(requirements.tested("torch").split(",")) == set(map(str, torch.specifier))
    assert requirements.tested("no-such-package") == ""


def test_the_base_counts_before_extras_and_names_are_compared_as_pip_does(distribution):
    distribution(
        ["transformers>=5.17,<5.25", 'transformers<5.20; extra == "serve"', 'lm_eval<0.4.14; extra == "evaluate"', 'ruff<1; extra == "dev"']
    )
    assert requirements.tested("transformers") == ">=5.17,<5.25"
    assert requirements.tested("lm-eval") == requirements.tested("lm_eval") == "<0.4.14"
    # Of tools for developers nobody else is told.
    assert requirements.tested("ruff") == ""


def test_a_version_outside_is_said_with_the_cure(distribution, monkeypatch):
    distribution(["transformers>=5.17,<5.25", "torch>=2.11", 'accelerate<2; extra == "train"', "no-such-package<1"])
    versions = {"transformers": "5.26.0", "torch": "2.13.0+cpu", "accelerate": "2.0.1"}
    monkeypatch.setattr(requirements, "installed", versions.get)
    assert requirements.untested() == [
        "transformers 5.26.0 is not among the tested versions >=5.17,<5.25; if anything fails, pip install 'transformers>=5.17,<5.25'",
        "accelerate 2.0.1 is not among the tested versions <2; if anything fails, pip install 'accelerate<2'",
    ]


def test_without_metadata_nothing_is_said(monkeypatch):
    monkeypatch.setattr(requirements, "DISTRIBUTION", "not-installed-here")
    requirements._ranges.cache_clear()
    assert requirements.untested() == [] and requirements.tested("torch") == "" and requirements.fits("torch", "0.1")
    requirements._ranges.cache_clear()


def test_the_look_at_versions_imports_none_of_the_packages_and_takes_milliseconds():
    """About 60 ms of processor time here, most of it for importing `packaging`, which transformers needs anyway."""
    code = (
        "import sys, time; from dms.requirements import untested; start = time.process_time(); untested(); "
        "print(time.process_time() - start, sorted({'torch', 'transformers', 'accelerate', 'wandb'} & set(sys.modules)))"
    )
    seconds, loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert loaded.strip() == "[]" and float(seconds) < 0.5


def test_missing_packages_are_named_with_their_extras(monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    assert (
        requirements.explain(ModuleNotFoundError("No module named 'datasets'", name="datasets.iterable"), "dms retrofit")
        == "dms retrofit needs datasets, which is not installed; pip install 'dms-retrofit[train]'"
    )
    assert requirements.explain(ModuleNotFoundError("No module named 'antigravity2'", name="antigravity2"), "dms retrofit") is None
    with pytest.raises(
        RuntimeError, match=r"needs accelerate and matplotlib, which are not installed; pip install 'dms-retrofit\[train,report\]'"
    ):
        requirements.require("dms retrofit", "accelerate", "matplotlib")


def test_a_module_that_is_missing_in_an_installed_package_is_not_called_an_extra():
    assert (
        requirements.explain(ModuleNotFoundError("No module named 'matplotlib.nowhere'", name="matplotlib.nowhere"), "dms report") is None
    )

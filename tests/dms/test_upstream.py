"""What is said where a package is no longer as our code assumes."""

import pytest

from dms import requirements, upstream

ASKED = ["torch<2.14,>=2.11", 'lm_eval<0.5,>=0.4.9; extra == "evaluate"', 'datasets[vision]~=5.2; extra == "train"']


@pytest.fixture
def versions(monkeypatch):
    monkeypatch.setattr(upstream.metadata, "version", lambda name: "2.15.0")


@pytest.mark.parametrize(("package", "tested"), [("torch", ">=2.11,<2.14"), ("lm-eval", ">=0.4.9,<0.5"), ("Datasets", "~=5.2")])
def test_the_error_names_package_touch_need_and_cure(distribution, versions, package, tested):
    distribution(ASKED)
    error = upstream.changed("compat.set_world_group", package, "torch.new_group")
    assert isinstance(error, RuntimeError)
    assert str(error) == (
        f"{package} 2.15.0: compat.set_world_group needs torch.new_group, which is not there any more; "
        f"install {package} {tested}, which this version was tested with, or see docs/upstream.md"
    )


def test_a_package_without_bounds(distribution, versions):
    distribution(ASKED)
    assert (
        str(upstream.changed("compat.x", "wandb", "y"))
        == "wandb 2.15.0: compat.x needs y, which is not there any more; see docs/upstream.md"
    )


def test_without_metadata_it_is_said_as_well(monkeypatch):
    monkeypatch.setattr(requirements, "DISTRIBUTION", "not-installed-here")
    requirements._ranges.cache_clear()
    error = upstream.changed("compat.x", "not-installed-either", "y")
    requirements._ranges.cache_clear()
    assert str(error).startswith("not-installed-either of unknown version: compat.x needs y") and str(error).endswith(
        "see docs/upstream.md"
    )

"""What is said where a package is no longer as our code assumes."""

import pytest

from dms import upstream

ASKED = [
    "torch<2.14,>=2.11",
    'lm_eval<0.5,>=0.4.9; extra == "evaluate"',
    "transformers!=5.21,>=5.17",
    'datasets[vision]~=5.2; extra == "train"',
]


@pytest.mark.parametrize(
    ("package", "versions"),
    [("torch", "<2.14,>=2.11"), ("lm-eval", "<0.5,>=0.4.9"), ("Datasets", "~=5.2"), ("transformers", None), ("wandb", None)],
)
def test_tested_versions_are_those_that_this_package_asks_for(monkeypatch, package, versions):
    monkeypatch.setattr(upstream.metadata, "requires", lambda name: ASKED if name == "dms-retrofit" else None)
    assert upstream.tested_versions(package) == versions


def test_the_error_names_package_touch_need_and_cure(monkeypatch):
    monkeypatch.setattr(upstream.metadata, "requires", lambda name: ASKED)
    monkeypatch.setattr(upstream.metadata, "version", lambda name: "2.15.0")
    error = upstream.changed("compat.set_world_group", "torch", "torch.new_group")
    assert isinstance(error, RuntimeError)
    assert str(error) == (
        "torch 2.15.0: compat.set_world_group needs torch.new_group, which is not there any more; "
        "install torch <2.14,>=2.11, which this version was tested with, or see docs/upstream.md"
    )
    assert (
        str(upstream.changed("compat.x", "wandb", "y"))
        == "wandb 2.15.0: compat.x needs y, which is not there any more; see docs/upstream.md"
    )


def test_without_metadata_it_is_said_as_well(monkeypatch):
    def missing(name):
        raise upstream.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(upstream.metadata, "requires", missing)
    monkeypatch.setattr(upstream.metadata, "version", missing)
    assert str(upstream.changed("compat.x", "torch", "y")).startswith("torch of unknown version: compat.x needs y")

"""The hook of the site that makes tables of keys."""

import importlib.util
import sys
from types import ModuleType

import pytest
from house import ROOT


@pytest.fixture(scope="session")
def keys() -> ModuleType:
    """docs/_keys.py."""
    path = ROOT / "docs" / "_keys.py"
    spec = importlib.util.spec_from_file_location("docs_keys", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # NamedTuple and dataclasses look their module up by name.
    sys.modules["docs_keys"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def documented_keys(keys):
    """documented_keys(MODULE:CLASS): the dotted names of its keys, as the pages list them."""
    return lambda target: {key.name for key in keys.keys_of(keys.load(target))}

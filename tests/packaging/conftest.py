"""What setup.cfg says."""

import configparser
import re
from pathlib import Path

import pytest
from house import ROOT, lines


@pytest.fixture(scope="session")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="session")
def packages(setup_cfg) -> dict[str, Path]:
    """The folder of each package that setup.cfg lists, found as setuptools finds it: the nearest ancestor in package_dir."""
    folders = dict(re.split(r"\s*=\s*", line) for line in lines(setup_cfg["options"]["package_dir"]))
    found = {}
    for name in lines(setup_cfg["options"]["packages"]):
        parts = name.split(".")
        cut = next(cut for cut in range(len(parts), 0, -1) if ".".join(parts[:cut]) in folders)
        found[name] = ROOT.joinpath(folders[".".join(parts[:cut])], *parts[cut:])
    return found

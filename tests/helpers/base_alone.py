"""What `pip install dms-retrofit` brings without its extras, by the requirements in setup.cfg; `hide()` leaves a Python with that alone."""

import configparser
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def read_setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(Path(__file__).resolve().parents[2] / "setup.cfg", encoding="utf-8")
    return found


def names(lines: str) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines.splitlines() if line and not line.startswith("#")}


def with_their_requirements(packages: set[str]) -> set[str]:
    found, remaining = set(), list(packages)
    while remaining:
        if (package := remaining.pop()) in found:
            continue
        found.add(package)
        try:
            lines = metadata.requires(package) or ()
        except metadata.PackageNotFoundError:
            continue
        needed = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
        remaining += [canonicalize_name(one.name) for one in needed]
    return found


def hide() -> set[str]:
    """From here on, packages that are neither required nor ourselves cannot be found. Returns their modules."""
    kept = with_their_requirements(names(read_setup()["options"]["install_requires"])) | {"dms-retrofit"}
    packages = {module: set(map(canonicalize_name, found)) for module, found in metadata.packages_distributions().items()}
    hidden = {module for module, found in packages.items() if kept.isdisjoint(found)}
    absent = set().union(*(packages[module] for module in hidden))

    class Bare(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            return None if fullname.partition(".")[0] in hidden else super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, *context):
            return (one for one in super().find_distributions(*context) if canonicalize_name(one.metadata["Name"]) not in absent)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
    return hidden

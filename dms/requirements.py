"""What is installed, against what this distribution asks for: the versions that were tested, and the extras that some commands need.

Both stand in setup.cfg alone, and are read from the installed distribution's metadata. Used from a path without being installed, there
is none, and nothing is said of versions.
"""

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "dms-retrofit"
# Modules that only some commands need, by the extra that brings them.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "pyarrow": "train",
    "lm_eval": "evaluate",
    "matplotlib": "report",
    "wandb": "track",
    "tensorboard": "track",
    "deepspeed": "deepspeed",
    "ninja": "deepspeed",
    "peft": "lora",
    "vllm": "serve",
}


def missing(what: str, *modules: str) -> str:
    """The sentence for modules of `EXTRAS` that are not installed; what: what needs them, such as "dms retrofit"."""
    extras = ",".join(dict.fromkeys(EXTRAS[module] for module in modules))
    verb = "is" if len(modules) == 1 else "are"
    return f"{what} needs {' and '.join(modules)}, which {verb} not installed; pip install '{DISTRIBUTION}[{extras}]'"


def require(what: str, *modules: str) -> None:
    """Raises RuntimeError with the sentence of `missing` where one of these modules of `EXTRAS` is not installed."""
    if absent := [module for module in modules if find_spec(module) is None]:
        raise RuntimeError(missing(what, *absent))


def explain(error: ModuleNotFoundError, what: str) -> str | None:
    """The sentence of `missing` for an import that failed, or None where no extra brings that module."""
    module = (error.name or "").partition(".")[0]
    return missing(what, module) if module in EXTRAS and find_spec(module) is None else None


def installed(package: str) -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tested(package: str) -> str:
    """The versions of a package that this distribution was tested with, such as ">=5.17,<5.25"; empty for any."""
    # ">" sorts after "<", and the floor is read first.
    return ",".join(sorted(map(str, _ranges().get(_canonical(package), ())), reverse=True))


def fits(package: str, version: str, *, floor_only: bool = False) -> bool:
    """Whether a version is a tested one; floor_only: or a newer one."""
    from packaging.version import InvalidVersion, Version

    try:
        number = Version(version)
    except InvalidVersion:
        # Of a build that its maker numbered otherwise it cannot be told.
        return True
    wanted = [one for one in _ranges().get(_canonical(package), ()) if not (floor_only and one.operator.startswith("<"))]
    return all(one.contains(number, prereleases=True) for one in wanted)


def untested() -> list[str]:
    """A sentence for each installed package whose version is not a tested one. Takes some milliseconds and imports none of them."""
    found = {package: version for package in _ranges() if (version := installed(package)) is not None}
    return [
        f"{package} {version} is not among the tested versions {tested(package)}; if anything fails, pip install '{package}{tested(package)}'"
        for package, version in found.items()
        if not fits(package, version)
    ]


@cache
def _ranges() -> "dict[str, SpecifierSet]":
    """By canonical name, of packages whose versions are bounded: what always comes first, then the extras in their order above."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return {}
    ranges: dict[str, SpecifierSet] = {}
    for extra in ("", *dict.fromkeys(EXTRAS.values())):
        for requirement in requirements:
            if requirement.specifier and (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
                ranges.setdefault(_canonical(requirement.name), requirement.specifier)
    return ranges


def _canonical(package: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(package)

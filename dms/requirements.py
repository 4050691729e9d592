"""What is installed, compared with what this distribution asks for: the versions that were tested, and the extras that commands need.

Both are written in setup.cfg alone, and read from the installed distribution's metadata. Where the code is used from a path without being
installed there is no metadata, and versions are not compared.
"""

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "dms-retrofit"
# Modules that only some commands need, and the extra that installs each.
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
    "gguf": "gguf",
    "bitsandbytes": "quantized",
    "torchao": "quantized",
    "vllm": "serve",
}


def missing(what: str, *modules: str) -> str:
    """The message for modules of `EXTRAS` that are not installed. what: what needs them, such as "dms retrofit"."""
    extras = ",".join(dict.fromkeys(EXTRAS[module] for module in modules))
    verb = "is" if len(modules) == 1 else "are"
    return f"{what} needs {' and '.join(modules)}, which {verb} not installed; pip install '{DISTRIBUTION}[{extras}]'"


def require(what: str, *modules: str) -> None:
    """Raises RuntimeError with the message of `missing` where one of these modules of `EXTRAS` is not installed."""
    if absent := [module for module in modules if find_spec(module) is None]:
        raise RuntimeError(missing(what, *absent))


def explain(error: ModuleNotFoundError, what: str) -> str | None:
    """The message of `missing` for an import that failed, or None where no extra installs that module."""
    module = (error.name or "").partition(".")[0]
    return missing(what, module) if module in EXTRAS and find_spec(module) is None else None


def installed(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tested(package: str) -> str:
    """The versions of a package that this distribution was tested with, such as ">=5.17,<5.25"; empty for any."""
    # Reversed, since ">" sorts after "<" and the lower bound comes first.
    return ",".join(sorted(map(str, _ranges().get(_canonical(package), ())), reverse=True))


def fits(package: str, version: str, *, floor_only: bool = False) -> bool:
    """Whether a version is within the tested ones. floor_only: or above them."""
    from packaging.version import InvalidVersion, Version

    try:
        number = Version(version)
    except InvalidVersion:
        # A private build with a number of its own cannot be compared.
        return True
    wanted = [one for one in _ranges().get(_canonical(package), ()) if not (floor_only and one.operator.startswith("<"))]
    return all(one.contains(number, prereleases=True) for one in wanted)


def untested() -> list[str]:
    """A message for each installed package whose version is not among the tested ones. Takes some milliseconds and imports none of them."""
    found = {package: version for package in _ranges() if (version := installed(package)) is not None}
    return [
        f"{package} {version} is not among the tested versions {tested(package)}; if anything fails, pip install '{package}{tested(package)}'"
        for package, version in found.items()
        if not fits(package, version)
    ]


@cache
def _ranges() -> "dict[str, SpecifierSet]":
    """The tested versions by canonical name, of packages with bounds: of the base requirements first, then of the extras in `EXTRAS`."""
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

"""What happens where a package that this project stands on is no longer as some code of ours assumes."""

from importlib import metadata


class UpstreamChanged(RuntimeError):
    """A package lacks what a touch of ours needs of it, or has it in another form. The message names touch, package and cure."""


def changed(touch: str, package: str, needs: str) -> UpstreamChanged:
    """The error of a touch (`module.function`) that needs something of a package which is not there any more."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "of unknown version"
    wanted = tested_versions(package)
    cure = f"install {package} {wanted}, which this version was tested with, or see docs/upstream.md" if wanted else "see docs/upstream.md"
    return UpstreamChanged(f"{package} {found}: {touch} needs {needs}, which is not there any more; {cure}")


def tested_versions(package: str) -> str | None:
    """The versions of a package that this one asks for, such as ">=5.17,<5.25"; None where it sets no upper bound, or is not installed."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        asked = map(Requirement, metadata.requires("dms-retrofit") or [])
    except (ImportError, metadata.PackageNotFoundError):
        return None
    same = (one.specifier for one in asked if canonicalize_name(one.name) == canonicalize_name(package))
    return next((str(versions) for versions in same if any(part.operator in ("<", "<=", "==", "~=") for part in versions)), None)

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
    return UpstreamChanged(f"{package} {found}: {touch} needs {needs}, which is not there any more; see docs/upstream.md")

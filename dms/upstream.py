"""The error where a package that this project uses is no longer as some code of ours assumes."""

from importlib import metadata


class UpstreamChanged(RuntimeError):
    """A package lacks what a touch of ours needs of it, or has it in another form. The message names touch, package and cure."""


def changed(touch: str, package: str, needs: str) -> UpstreamChanged:
    """The error of a touch (`module.function`) that needs something of a package which is not there any more."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "of unknown version"
    try:
        from dms.requirements import tested

        wanted = tested(package)
    except ImportError:
        # In an exported folder, which cannot tell.
        wanted = ""
    cure = f"install {package} {wanted}, which this version was tested with, or see docs/upstream.md" if wanted else "see docs/upstream.md"
    return UpstreamChanged(f"{package} {found}: {touch} needs {needs}, which is not there any more; {cure}")

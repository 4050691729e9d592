"""Imported first, leaves this Python with the project and its base dependencies: no package that only an extra brings."""

from importlib import metadata
from importlib.machinery import PathFinder

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def _with_needs(name: str) -> set[str]:
    """The distribution and all that it requires without extras, as far as they are installed."""
    found, left = set(), [name]
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        wanted = [Requirement(line) for line in requires]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


_KEPT = _with_needs("dms-retrofit")
# Triton comes with PyTorch's builds for CUDA, and is for GPUs.
_KEPT.discard("triton")
HIDDEN = {
    top for top, owners in metadata.packages_distributions().items() if not _KEPT & {canonicalize_name(owner) for owner in owners}
} - {"dms", "dms_kernels"}

_find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.split(".")[0] in HIDDEN else _find(name, path, target)
)

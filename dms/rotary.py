"""For the time of a merge: the old place of `reading`."""

from dms.modes import RotaryLengths, reading  # noqa: F401

"""For the time of a merge: the old place of `save_tensors`."""

from dms.io.weights import follow_umask, save_tensors  # noqa: F401

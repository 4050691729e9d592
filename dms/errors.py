"""Error messages for people, where an exception says too little: which file it was about, and what to do."""

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors that only writing gives. Python names no file for them: they come from a file that is open already.
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_CURES = {
    errno.ENOSPC: "free space there, or write to another place",
    errno.EDQUOT: "your quota there is used up: free space, or write to another place",
    errno.EFBIG: "raise the limit (ulimit -f), or write to another file system",
    errno.EROFS: "it cannot be written to: choose another place",
    errno.EACCES: "change the permissions, or choose another place",
    errno.EPERM: "change the permissions, or choose another place",
}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within it `path` is written, or files in it: the error of a full disk then names the path, unless it names a file already.

    Raises:
        OSError: also in place of the errors of safetensors and tokenizers.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # Errors from Rust have the system's number in their text.
        if number is None and (words := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(words[1])
        if number not in _OF_WRITING or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def describe(error: BaseException) -> str:
    """The text of an error: with a cure where the file system refused, and with its type and place where it has no text."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno in _CURES:
        text = f"{error.strerror}: {error.filename or _place(error)}; {_CURES[error.errno]}"
    return text or f"{type(error).__name__} without a message, {_place(error)}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "never raised"

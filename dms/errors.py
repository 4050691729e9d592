"""What a person is told of an error that carries too little: where it came from, which file it was about, what to do."""

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Faults that only writing has. Python names no file for them, as it knows only open ones by then.
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
    """A context that writes `path`, or files within it: the error of a full disk names it, unless it names one already.

    Raises:
        OSError: in place of what safetensors and tokenizers raise, too.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # Errors out of Rust have the system's number among their words.
        if number is None and (words := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(words[1])
        if number not in _OF_WRITING or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def describe(error: BaseException) -> str:
    """What an error says, in a line or more: with a cure for what the file system refused; and of one without words its type and place."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno in _CURES:
        text = f"{error.strerror}: {error.filename or _place(error)}; {_CURES[error.errno]}"
    return text or f"{type(error).__name__} without a word, {_place(error)}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "raised nowhere"

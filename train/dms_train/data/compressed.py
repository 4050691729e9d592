"""Files that may be compressed, which their suffix tells."""

import importlib
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

try:
    from lzma import LZMAError
except ImportError:
    # Of a Python that was built without it, which then reads no .xz.
    LZMAError = EOFError

# By suffix, what unpacks it. pyarrow comes with `datasets`; Python's own module for zstd came with 3.14.
_MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
SUFFIXES = tuple(_MODULES)
# What a file that is damaged, cut short or out of reach raises while it is read.
UNREADABLE = (OSError, EOFError, zlib.error, LZMAError)


def check_modules(files: Iterable[Path]) -> None:
    """Raises RuntimeError where what unpacks one of the files is not installed."""
    for suffix in sorted({file.suffix.lower() for file in files} & _MODULES.keys()):
        name = _MODULES[suffix]
        try:
            importlib.import_module(name)
        except ImportError as error:
            mend = (
                "pip install pyarrow" if name == "pyarrow" else f"this Python was built without {name}: take another, or unpack the files"
            )
            raise RuntimeError(f"{suffix} files cannot be read here ({error}); {mend}") from None


def open_file(file: Path) -> BinaryIO:
    """A file to read its content from, unpacked. It, and what is read from it, raises UNREADABLE."""
    suffix = file.suffix.lower()
    if suffix not in _MODULES:
        return file.open("rb")
    module = importlib.import_module(_MODULES[suffix])
    if suffix == ".zst":
        return io.BufferedReader(module.input_stream(str(file), compression="zstd"))
    return module.open(file)

"""Files that may be compressed, by their suffix."""

import importlib
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

# The module that unpacks it, by suffix. pyarrow comes with `datasets`; Python's own module for zstd came with 3.14.
_MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
SUFFIXES = tuple(_MODULES)
# Errors of reading a file that is damaged, cut short or out of reach.
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
try:
    from lzma import LZMAError
except ImportError:
    # This Python was built without lzma, and reads no .xz.
    pass
else:
    UNREADABLE += (LZMAError,)


def check_modules(files: Iterable[Path]) -> None:
    """Raises RuntimeError where the module that unpacks one of the files is not installed."""
    for suffix in sorted({file.suffix.lower() for file in files} & _MODULES.keys()):
        name = _MODULES[suffix]
        try:
            importlib.import_module(name)
        except ImportError as error:
            remedy = (
                "pip install pyarrow" if name == "pyarrow" else f"this Python was built without {name}: take another, or unpack the files"
            )
            raise RuntimeError(f"{suffix} files cannot be read here ({error}); {remedy}") from None


def open_file(file: Path) -> BinaryIO:
    """A file to read its content from, unpacked. It, and what is read from it, raises UNREADABLE."""
    suffix = file.suffix.lower()
    if suffix not in _MODULES:
        return file.open("rb")
    module = importlib.import_module(_MODULES[suffix])
    if suffix == ".zst":
        return io.BufferedReader(module.input_stream(str(file), compression="zstd"))
    return module.open(file)

"""The built-in text: the standard-library sources of the running Python, read where they lie and never copied."""

import functools
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

# Tests are not installed everywhere, tables are not prose, and site-packages is not the standard library.
_SKIPPED_PARTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
_MIN_BYTES = 2_000
_HELD_OUT_EVERY = 8


@functools.cache
def stdlib_files(held_out: bool) -> tuple[Path, ...]:
    """Source files of one split; the split hashes each file's relative path, so that it is the same on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, names, _ in os.walk(root):
        # Not entered, or the time would be that of whatever is installed beside the library.
        names[:] = set(names) - _SKIPPED_PARTS
        files += [path for path in Path(folder).glob("*.py") if path.stat().st_size >= _MIN_BYTES]
    files = sorted(path for path in files if (zlib.crc32(path.relative_to(root).as_posix().encode()) % _HELD_OUT_EVERY == 0) == held_out)
    if not files:
        raise RuntimeError(
            f"the built-in text needs the standard library's .py files under {root}, and there are none; "
            "install the full Python (Debian/Ubuntu: apt-get install libpython3-stdlib) or name other data"
        )
    return tuple(files)


@functools.lru_cache(maxsize=256)
def _lines_of(path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return tuple(line.rstrip() + "\n" for line in text.splitlines())


class StdlibText:
    """Runs of lines from the standard library. `held_out` chooses the files kept for evaluation."""

    def __init__(self, held_out: bool):
        self.files = stdlib_files(held_out)
        self._cumulative = []
        total = 0
        for path in self.files:
            total += path.stat().st_size
            self._cumulative.append(total)

    def lines(self, rng: Random, num_chars: int) -> list[str]:
        """Consecutive lines from a random place, at least `num_chars` characters; at a file's end it goes on in another."""
        taken: list[str] = []
        chars = 0
        while chars < num_chars:
            (path,) = rng.choices(self.files, cum_weights=self._cumulative)
            lines = _lines_of(path)
            for line in lines[rng.randrange(len(lines)) :]:
                taken.append(line)
                chars += len(line)
                if chars >= num_chars:
                    break
        return taken

    def texts(self, rng: Random) -> Iterator[str]:
        """Each file once, in random order."""
        for path in rng.sample(self.files, len(self.files)):
            yield "".join(_lines_of(path))

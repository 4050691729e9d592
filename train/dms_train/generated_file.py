"""The file that `dms generate-data` writes, and the line that says how far it is."""

import fcntl
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console

from dms_train.generate_recipe import GenerateRecipe
from dms_train.progress import LiveLine
from dms_train.recipe_file import dump_recipe, flat

# These change how fast rows come and how their sums are rounded, not what is asked for.
_FREE = {"output", "overwrite", "batch_size"}
_SOURCES = "# made from "


class Output:
    """The file of rows, held by this process alone; whole rows and whole batches of it count."""

    def __init__(self, recipe: GenerateRecipe, sources: str):
        """sources: a hash of what prompts and weights are read from."""
        self.recipe, self.sources, self.path = recipe, sources, Path(recipe.output).expanduser()
        self.recipe_path = self.path.with_name(f"{self.path.name}.recipe.yaml")
        self.num_rows, self.reasons = 0, Counter[str]()
        self.file: IO[bytes] | None = None

    def __enter__(self) -> "Output":
        if self.path.is_dir():
            raise ValueError(f"output '{self.path}' is a folder; name a .jsonl file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            self._begin()
        except BaseException:
            self.file.close()
            raise
        return self

    def _begin(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output '{self.path}' is being written by another process; wait for its end, or choose another") from None
        if os.fstat(self.file.fileno()).st_size:
            self._check_recipe()
        self.file.truncate(self._whole_batches())
        if self.num_rows == 0:
            # Before the first row, so that rows without a recipe are nobody's.
            self.recipe_path.write_text(f"{_SOURCES}{self.sources}\n{dump_recipe(self.recipe)}", encoding="utf-8")

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def _check_recipe(self) -> None:
        """Raises ValueError for rows that another recipe made, unless they are to be replaced."""
        now = {name: value for name, value in flat(self.recipe.model_dump()).items() if name not in _FREE}
        text = self.recipe_path.read_text(encoding="utf-8") if self.recipe_path.is_file() else ""
        stored = yaml.safe_load(text)
        then = {name: value for name, value in flat(stored).items() if name not in _FREE} if isinstance(stored, dict) else {}
        names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
        differing = [f"{name} is {then.get(name)!r} there and {now.get(name)!r} here" for name in names]
        if then and not text.startswith(f"{_SOURCES}{self.sources}\n"):
            differing.append("the files of its prompts, or of its model, are others now")
        if differing and self.recipe.overwrite:
            if not then:
                raise ValueError(f"output '{self.path}' was not written by dms generate-data; it is not overwritten: choose another file")
            self.file.truncate(0)
        elif differing:
            why = "; ".join(differing) if then else "there is no recipe beside them"
            raise ValueError(
                f"output '{self.path}' holds rows of another recipe ({why}); choose another file, or overwrite=true to replace them"
            )

    def _whole_batches(self) -> int:
        """The length of the file up to where rows are generated anew: after the last whole batch."""
        self.file.seek(0)
        ends, reasons = [0], []
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                known = row["number"] == len(reasons)
                reasons.append(row["finish_reason"])
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise ValueError(f"{self.path}:{len(ends)} is not the row that was written there; delete the file to begin anew")
            ends.append(ends[-1] + len(line))
        self.num_rows = len(reasons) // self.recipe.batch_size * self.recipe.batch_size
        total = None if self.recipe.num_prompts is None else self.recipe.num_prompts * self.recipe.samples
        if len(reasons) == total:
            # The last batch of all may be a smaller one.
            self.num_rows = total
        self.reasons.update(reasons[: self.num_rows])
        return ends[self.num_rows]

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.num_rows += len(rows)
        self.reasons.update(row["finish_reason"] for row in rows)


class Line(LiveLine):
    """How far generation is."""

    def __init__(self, console: Console, total: int | None, done: int):
        super().__init__(console, "row", total, done)
        self.total, self.done, self.begun = total, done, done
        self.start, self.tokens = time.perf_counter(), 0

    def update(self, done: int, tokens: int) -> None:
        self.tokens += tokens
        seconds = time.perf_counter() - self.start
        text = f"{self.tokens / seconds:,.0f} tok/s"
        self.progress.update(self.task, completed=done, text=text)
        if not self.console.is_terminal and (done // self.every > self.done // self.every or done == self.total):
            eta = f"  eta {(self.total - done) * seconds / (done - self.begun):.0f} s" if self.total else ""
            self.console.print(f"row {done}{f'/{self.total}' if self.total else ''}  {text}{eta}", highlight=False)
        self.done = done

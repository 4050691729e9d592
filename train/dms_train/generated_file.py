"""The file that `dms generate-data` writes, and its progress line."""

import fcntl
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dms_train.progress import LiveLine
from dms_train.recipe import GenerateRecipe
from dms_train.recipe_file import dump_recipe, flat

# These change how fast records are made and how sums are rounded, not what is asked for.
_FREE = {"output", "overwrite", "batch_size"}
_SOURCES = "# made from "


@dataclass(frozen=True)
class GeneratedRecord:
    """A line of the file; the fields are its keys."""

    number: int
    prompt: str
    completion: str
    text: str
    """Both."""
    finish_reason: str
    """eos or length."""
    prompt_tokens: int
    completion_tokens: int


class GeneratedFile:
    """The file, held by this process alone from entering to leaving the context. Whole lines of it count."""

    def __init__(self, recipe: GenerateRecipe, sources: str):
        """sources: a hash of the files that prompts and weights are read from."""
        self.recipe, self.sources, self.path = recipe, sources, Path(recipe.output).expanduser()
        self.recipe_path = self.path.with_name(f"{self.path.name}.recipe.yaml")
        self.num_records, self.reasons = 0, Counter[str]()

    def __enter__(self) -> "GeneratedFile":
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
        self.file.truncate(self._whole_lines())
        if self.num_records == 0:
            # Before the first record: a file without a recipe beside it is never taken for ours.
            self.recipe_path.write_text(f"{_SOURCES}{self.sources}\n{dump_recipe(self.recipe)}", encoding="utf-8")

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def _check_recipe(self) -> None:
        """Raises ValueError for records of another recipe, unless they are to be replaced."""
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
                f"output '{self.path}' holds records of another recipe ({why}); choose another file, or overwrite=true to replace them"
            )

    def _whole_lines(self) -> int:
        """The length of the file up to the end of the last whole line; what follows is generated again."""
        self.file.seek(0)
        ends, reasons = [0], list[str]()
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                known = record["number"] == len(reasons)
                reasons.append(record["finish_reason"])
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise ValueError(f"{self.path}:{len(ends)} is not the record that was written there; delete the file to start over")
            ends.append(ends[-1] + len(line))
        self.num_records = len(reasons)
        self.reasons.update(reasons)
        return ends[-1]

    def append(self, records: list[GeneratedRecord]) -> None:
        self.file.write("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.num_records += len(records)
        self.reasons.update(record.finish_reason for record in records)


class GenerationLine(LiveLine):
    """The progress of generation."""

    def __init__(self, console: Console, total: int | None, done: int):
        super().__init__(console, "record", total, done)
        self.total, self.done, self.begun = total, done, done
        self.start, self.tokens = time.perf_counter(), 0

    def update(self, done: int, tokens: int) -> None:
        self.tokens += tokens
        seconds = time.perf_counter() - self.start
        text = f"{self.tokens / seconds:,.0f} tok/s"
        self.progress.update(self.task, completed=done, text=text)
        if not self.console.is_terminal and (done // self.every > self.done // self.every or done == self.total):
            eta = f"  eta {(self.total - done) * seconds / (done - self.begun):.0f} s" if self.total else ""
            self.console.print(f"record {done}{f'/{self.total}' if self.total else ''}  {text}{eta}", highlight=False)
        self.done = done

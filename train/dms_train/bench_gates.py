"""`dms bench gates`: variants of a retrofit recipe, compared over ratios and seeds at equal memory.

One strict YAML file says what is compared. Every recipe is checked before the first run; a run is `dms retrofit` in a process of its own, in
`output_dir`/VARIANT/cr8-seed0, and is evaluated when it ends. The same command goes on where it was stopped.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console

from dms.config import DMSConfig, nearest
from dms.console import make_console
from dms.evaluation.policies import TRAINING_FREE
from dms.strict_config import Strict
from dms_train.preflight import check_context
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import flat, load_recipe
from dms_train.run_folder import differences, is_of_another_run, stored_recipe

# A variant's name is a folder's.
_NAME = re.compile(r"[A-Za-z0-9][\w.+=,-]*")
# The comparison sets these itself, or needs them as they are.
_SET_ELSEWHERE = {
    "output_dir": "runs lie in the comparison's output_dir",
    "target_cr": "the comparison's target_cr lists them",
    "seed": "the comparison's seeds lists them",
    "resume": "a run that was stopped is always continued",
    "overwrite": "delete a run's folder to make it anew",
}


class GateEvaluation(Strict):
    """Held-out documents that the gates of every run read in one pass."""

    lengths: list[int] = Field(min_length=1)
    """Tokens of a document; each length is evaluated by itself."""
    num_documents: int = Field(default=56, ge=1)
    """Documents of each length."""
    num_items: int = Field(default=24, ge=1)
    """Tasks planted in each."""
    batch_size: int = Field(default=4, ge=1)
    """Documents of one forward; changes time and memory, not figures."""
    seed: int = 7
    """Of the documents."""

    @property
    def documents(self) -> dict[str, int]:
        """What decides which documents of a length they are."""
        return self.model_dump(include={"num_documents", "num_items", "seed"})


class Comparison(Strict):
    """`dms bench gates`: which recipes are compared, and how."""

    recipe: str
    """A retrofit recipe: a path, or a packaged name such as `tiny/retrofit`."""
    overrides: dict[str, Any] = Field(default={})
    """Recipe keys, dotted, that all runs share."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """By name the recipe keys, dotted, in which a variant differs."""
    target_cr: list[float] = Field(min_length=1)
    """Ratios that each variant is trained for."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of each variant and ratio."""
    output_dir: str
    """The folder of all runs, `rows.jsonl`, `table.md` and `pareto.svg`."""
    evaluation: GateEvaluation
    baselines: list[str] = Field(default=["sliding_window"])
    """Training-free policies that read the same documents with as many entries as the gates hold, at the end and in the mean."""
    processes: int = Field(default=1, ge=1)
    """Runs at a time."""

    @model_validator(mode="after")
    def _check(self):
        problems = []
        for name in self.variants:
            if not _NAME.fullmatch(name):
                problems.append(
                    f"variants: {name!r} is no name for a folder; use letters, digits and . _ + = , - after a first letter or digit"
                )
        for where, keys in (("overrides", self.overrides), *((f"variants.{name}", keys) for name, keys in self.variants.items())):
            problems += [f"{where}: {key} is not for here: {_SET_ELSEWHERE[key]}" for key in keys if key in _SET_ELSEWHERE]
        for key in ("target_cr", "seeds", "baselines"):
            problems += _repeated(key, getattr(self, key))
        problems += _repeated("evaluation.lengths", self.evaluation.lengths)
        for policy in self.baselines:
            if policy not in TRAINING_FREE:
                problems.append(
                    f"baselines: unknown policy {policy!r}{nearest(policy, TRAINING_FREE)}; allowed: {', '.join(TRAINING_FREE)}"
                )
        problems += [
            f"evaluation.lengths: {length} is too short for a document; give at least 64"
            for length in self.evaluation.lengths
            if length < 64
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser()


def _repeated(key: str, values: list[Any]) -> list[str]:
    return [f"{key}: {value!r} is given {count} times" for value, count in Counter(values).items() if count > 1]


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    variant: str
    recipe: RetrofitRecipe
    """Resolved; its output_dir is the run's folder."""

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.folder.name}"

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def beside(self, suffix: str) -> Path:
        """A file of the bench's own beside the run's folder, such as its log. Not `with_suffix`: ratios have points."""
        return self.folder.with_name(self.folder.name + suffix)

    @cached_property
    def digest(self) -> str:
        """Of all in the recipe that makes it another run, and differs from the defaults: new keys of later versions leave it as it is."""
        return digest_of(self.recipe)

    @property
    def is_finished(self) -> bool:
        return (self.folder / "result.json").is_file()


def digest_of(recipe: RetrofitRecipe) -> str:
    values = recipe.model_dump(exclude_defaults=True)
    default = vars(DMSConfig())
    values["dms"] = {key: value for key, value in vars(recipe.dms).items() if value != default[key]}
    said = {key: value for key, value in flat(values).items() if value is not None and is_of_another_run(key)}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_runs(comparison: Comparison) -> list[Run]:
    """Every run, its recipe checked: all seeds of a ratio of a variant, then the next ratio, then the next variant.

    Raises:
        ValueError: naming every variant whose recipe is refused, with the keys, and what the variants cannot differ in.
    """
    runs: list[Run] = []
    problems: dict[str, list[str]] = {}
    for variant, keys in comparison.variants.items():
        for target_cr in comparison.target_cr:
            for seed in comparison.seeds:
                folder = comparison.folder / variant / f"cr{target_cr:g}-seed{seed}"
                own = {"target_cr": target_cr, "seed": seed, "output_dir": str(folder)}
                given = {**_dotted(comparison.overrides), **_dotted(keys), **own}
                # JSON is YAML.
                overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
                try:
                    recipe = load_recipe(comparison.recipe, overrides, RetrofitRecipe)
                    check_context(recipe)
                    runs.append(Run(variant, recipe))
                except ValueError as error:
                    of_text = problems.setdefault(str(error), [])
                    if variant not in of_text:
                        of_text.append(variant)
    if problems:
        count = len(comparison.variants)
        lines = [
            f"{'all variants' if 1 < len(names) == count else 'variants ' * (len(names) > 1) + 'variant ' * (len(names) == 1) + ', '.join(names)}: {text}"
            for text, names in problems.items()
        ]
        raise ValueError("no run was started: " + "; ".join(lines))
    _check_together(runs)
    return runs


def _dotted(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys, so that they are added to the recipe's sections as `extends` adds them, and do not replace them."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _check_together(runs: list[Run]) -> None:
    problems, first = [], runs[0].recipe
    by_digest: dict[str, str] = {}
    for run in runs:
        recipe = run.recipe
        if recipe.trainable != "gates":
            problems.append(
                f"variant {run.variant}: trainable is {recipe.trainable!r}, and gates alone are compared, on one dense model; choose gates"
            )
        for key in ("model", "quantize", "precision"):
            one, other = getattr(first, key), getattr(recipe, key)
            if one != other:
                problems.append(
                    f"variant {run.variant}: {key} is {other!r} and {one!r} in {runs[0].variant}; one dense model is compared with"
                )
        same = by_digest.setdefault(run.digest, run.variant)
        if same != run.variant:
            problems.append(f"variants {same} and {run.variant} are the same recipe; remove one, or change what they differ in")
    if problems:
        raise ValueError("no run was started: " + "; ".join(dict.fromkeys(problems)))


def check_folders(runs: list[Run]) -> None:
    """Raises ValueError where a run's folder holds another run, naming it and every key that differs."""
    problems = []
    for run in runs:
        stored = stored_recipe(run.folder)
        if stored is None:
            continue
        # With the defaults of keys that came since; one that has keys that are gone stays as it is, and `differences` names them.
        with suppress(ValueError):
            stored = RetrofitRecipe.model_validate(stored).model_dump()
        if differing := differences(stored, run.recipe):
            problems.append(f"{run.folder} holds another run: {'; '.join(differing)}")
    if problems:
        raise ValueError(
            "no run was started: "
            + "; ".join(problems)
            + "; give the variant another name, another output_dir, or delete the folder to run it anew"
        )


def run(comparison: Comparison, *, table_only: bool = False, console: Console | None = None) -> bool:
    """Make what is missing of a comparison's runs and rows, print the table, write it and the picture.

    table_only: show what is there. Returns whether every run finished and was evaluated.

    Raises:
        ValueError: a recipe that is refused, or a folder that holds another run, before the first run starts.
        Stopped: a signal came; runs saved a checkpoint.
    """
    console = console or make_console()
    runs = make_runs(comparison)
    check_folders(runs)
    from dms_train.bench_gates_table import show

    if table_only:
        return show(comparison, runs, console)
    from dms_train.bench_gates_runs import make_all

    make_all(comparison, runs, console)
    return show(comparison, runs, console)

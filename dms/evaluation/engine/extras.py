"""What `dms evaluate` measures beside its suites: chains of hyper-scaling, and tasks of lm-evaluation-harness."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dms.console import make_progress
from dms.evaluation.data.problems import Problems, make_chains, read_problems
from dms.evaluation.engine.scaling import check_scaling, run_scaling
from dms.evaluation.engine.settings import Settings
from dms.evaluation.present.tables import scaling_table

# What a sampled chain may write where the user says nothing: of the built-in ones, and of others.
_CHAIN_TOKENS, _ANSWER_TOKENS = 24, 1024


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Hyper-scaling. problems: a JSONL file, None: built-in chains of so many hops, in documents of the longest of the evaluation's
    lengths. The rest as in `run_scaling` and `read_problems`."""

    problems: str | None = None
    num_problems: int = 64
    max_k: int = 16
    chains_at_once: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    answer_pattern: str | None = None
    stop: tuple[str, ...] = ()
    num_hops: int = 6


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Tasks of lm-evaluation-harness, as in `run_lm_eval`."""

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None


@dataclass(frozen=True)
class PreparedScaling:
    """Problems and settings of which everything is checked and nothing is sampled."""

    model: Any
    tokenizer: Any
    problems: Problems
    options: dict[str, Any]

    def run(self, shared: dict[str, Any], console: Console) -> list[dict[str, Any]]:
        """Sample, print the table, and return rows. shared: common, out and trained_length of `run_scaling`."""
        with make_progress(console) as progress:
            total = len(self.problems.problems) * (1 + len(self.options["points"]))
            task = progress.add_task(f"hyper-scaling: {self.problems.name}", total=total)
            rows = run_scaling(
                self.model, self.tokenizer, problems=self.problems, progress=lambda n: progress.advance(task, n), **self.options, **shared
            )
        chat = "on" if self.problems.chat_template else "off"
        console.print(
            scaling_table(rows, f"hyper-scaling: {self.problems.name}, {len(self.problems.problems)} problems, chat template {chat}")
        )
        return rows


def prepare_scaling(model, tokenizer, settings: Settings, wanted: Scaling) -> PreparedScaling:
    """Raises ValueError for what could not be sampled, before anything is measured."""
    own = wanted.problems is None
    max_new_tokens = wanted.max_new_tokens or (_CHAIN_TOKENS if own else _ANSWER_TOKENS)
    if own:
        length = max(settings.lengths) - max_new_tokens
        problems = make_chains(tokenizer, num_problems=wanted.num_problems, length=length, num_hops=wanted.num_hops, seed=settings.seed)
    else:
        problems = read_problems(
            wanted.problems,
            tokenizer,
            answer_pattern=wanted.answer_pattern,
            stop=wanted.stop,
            limit=wanted.num_problems,
            chat_template=True if settings.chat else None,
        )
    options = {
        "points": list(settings.evict_bias),
        "max_new_tokens": max_new_tokens,
        "seed": settings.seed,
        **{name: getattr(wanted, name) for name in ("max_k", "temperature", "top_p", "chains_at_once")},
    }
    check_scaling(model, problems, **options)
    return PreparedScaling(model, tokenizer, problems, options)


@dataclass(frozen=True)
class PreparedHarness:
    """Tasks of the harness, checked and not run. num_runs: of a task under a policy at an operating point."""

    prepared: Any
    num_runs: int

    def run(self, shared: dict[str, Any], console: Console) -> list[dict[str, Any]]:
        """Run what is not finished, and return rows. shared: as of `PreparedScaling.run`."""
        with make_progress(console) as progress:
            task = progress.add_task("lm-evaluation-harness", total=self.num_runs)
            return self.prepared.run(progress=lambda n: progress.advance(task, n), **shared)


def prepare_harness(model, tokenizer, settings: Settings, wanted: LmEval, versions: dict, out: Path) -> PreparedHarness:
    """Raises ValueError for unknown tasks and requests that would be truncated, before anything is measured."""
    from dms.evaluation.engine.lm_eval import prepare_lm_eval

    # The others have no place in a likelihood's single forward pass.
    policies = tuple(policy for policy in settings.policies if policy in ("dense", "dms"))
    prepared = prepare_lm_eval(
        model,
        tokenizer,
        tasks=list(wanted.tasks),
        policies=policies,
        points=list(settings.evict_bias),
        num_fewshot=wanted.num_fewshot,
        limit=wanted.limit,
        batch_size=settings.batch_size,
        apply_chat_template=settings.chat,
        include_path=wanted.include_path,
        versions=versions,
        out=out,
    )
    return PreparedHarness(prepared, len(prepared.units))

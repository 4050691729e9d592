"""Every touch of what lm-evaluation-harness does not promise.

One function a touch. Its docstring says what it does and what it assumes; where that is not so it raises UpstreamChanged with the
touch's name. docs/upstream.md lists them, and tests/dms/evaluation/test_lm_eval_compat.py holds each against the installed version.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dms.upstream import UpstreamChanged, changed


def _changed(touch: str, needs: str) -> UpstreamChanged:
    return changed(f"lm_eval_compat.{touch}", "lm_eval", needs)


# By step: its parameters, and the methods that call it.
STEPS = {
    "_loglikelihood_tokens": (("requests", "disable_tqdm", "override_bs"), ("loglikelihood", "loglikelihood_rolling")),
    "_model_call": (("inps", "attn_mask", "labels"), ("_loglikelihood_tokens",)),
    "tok_batch_encode": (("strings", "padding_side", "left_truncate_len", "truncation"), ("generate_until",)),
    "_model_generate": (("context", "max_length", "stop", "generation_kwargs"), ("generate_until",)),
}


def harness_step(name: str) -> Callable:
    """One of the steps by which the harness's model class computes; ours has methods of that name instead, and calls this one.

    Assumes: lm_eval.models.huggingface.HFLM has each of STEPS with those parameters, and calls it in those methods. Requests are
    ((context, continuation), context's tokens, continuation's tokens), and what is answered stands in their order; `_model_generate`
    hands on to `generate` what it does not know.
    """
    from lm_eval.models.huggingface import HFLM

    parameters, callers = STEPS[name]
    step = getattr(HFLM, name, None)
    if step is None or tuple(inspect.signature(step).parameters)[1:] != parameters:
        raise _changed("harness_step", f"HFLM.{name}({', '.join(parameters)})")
    for caller in callers:
        if not any(name in _names(vars(cls)[caller]) for cls in HFLM.__mro__ if caller in vars(cls)):
            raise _changed("harness_step", f"HFLM.{caller} that calls {name}")
    return step


def _names(function: Callable) -> tuple[str, ...]:
    """What a function's code looks up."""
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())


def max_new_tokens(settings: dict[str, Any], default: int) -> int:
    """How many tokens a request may generate at most, by its settings; default: where they do not say.

    Assumes: lm_eval.models.utils.normalize_gen_kwargs(settings, default) says so under "max_gen_toks", as `generate_until` reads it.
    """
    from lm_eval.models import utils

    normalize = getattr(utils, "normalize_gen_kwargs", None)
    found = normalize(settings, default).get("max_gen_toks") if normalize is not None else None
    if found is None:
        raise _changed("max_new_tokens", "lm_eval.models.utils.normalize_gen_kwargs that gives max_gen_toks")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's warnings: what it would warn of is refused by us, or said in rows.

    Assumes: its loggers are named after its modules, below "lm_eval".
    """
    from lm_eval import evaluator

    logger = getattr(evaluator, "eval_logger", None)
    if not isinstance(logger, logging.Logger) or not logger.name.startswith("lm_eval."):
        raise _changed("quiet", "lm_eval.evaluator.eval_logger, a logger below lm_eval")
    above = logging.getLogger("lm_eval")
    level = above.level
    above.setLevel(logging.ERROR)
    try:
        yield
    finally:
        above.setLevel(level)


_REQUIRED = ("results", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better")


def read_results(found: dict[str, Any]) -> dict[str, Any]:
    """What of the result of `simple_evaluate` is kept and read, without the samples.

    Assumes: the fields _REQUIRED, by task or group; "results" has figures under METRIC,FILTER and METRIC_stderr,FILTER, and
    "n-samples" has "effective".
    """
    if missing := [name for name in _REQUIRED if name not in found]:
        raise _changed("read_results", f"{', '.join(missing)} in the result of simple_evaluate")
    if not any("," in name for figures in found["results"].values() for name in figures):
        raise _changed("read_results", "figures under METRIC,FILTER in the result of simple_evaluate")
    if not all("effective" in number for number in found["n-samples"].values()):
        raise _changed("read_results", '"effective" among the "n-samples" of simple_evaluate')
    return {name: found[name] for name in (*_REQUIRED, "groups") if name in found}


class Answered(NamedTuple):
    """One document of a task under one filter. metrics: by name. num_answers: of a document whose answers are chosen, how many there
    are; else None."""

    task: str
    document: str
    filter: str
    metrics: dict[str, Any]
    num_answers: int | None


def read_samples(found: dict[str, Any]) -> Iterator[Answered]:
    """The documents in the result of `simple_evaluate` with log_samples.

    Assumes: "samples", by task, are dictionaries with doc_id, filter, metrics (their names), each metric, and filtered_resps; a task's
    configuration says under "output_type" whether answers are chosen ("multiple_choice"), and then each has a response.
    """
    try:
        for task, samples in found["samples"].items():
            is_choice = found["configs"][task].get("output_type") == "multiple_choice"
            for sample in samples:
                metrics = {name: sample[name] for name in sample["metrics"]}
                yield Answered(task, str(sample["doc_id"]), sample["filter"], metrics, len(sample["filtered_resps"]) if is_choice else None)
    except (KeyError, TypeError) as error:
        raise _changed("read_samples", f"{error} in the samples of simple_evaluate") from error


def num_fewshot(found: dict[str, Any]) -> dict[str, int]:
    """How many examples stood before the questions, by task.

    Assumes: the result of `simple_evaluate` says so under "n-shot".
    """
    if not isinstance(found.get("n-shot"), dict):
        raise _changed("num_fewshot", '"n-shot" in the result of simple_evaluate')
    return found["n-shot"]


__all__ = ["UpstreamChanged"] + [
    name
    for name, value in list(globals().items())
    if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == __name__
]

"""What is assumed of lm-evaluation-harness, held against the installed one.

`test_NAME` holds the assumption of the touch `lm_eval_compat.NAME`; `break_NAME` breaks it on purpose.
"""

import inspect
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from evicting import embedded

from dms.evaluation.engine import lm_eval_compat as compat
from dms.upstream import UpstreamChanged

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'dms-retrofit[lmeval]'")

UPSTREAM = Path(__file__).parents[3] / "docs" / "upstream.md"
TEXTS = ("import os\n", "def f(x):\n    return x", "class A:\n    pass")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(what `simple_evaluate` returns, the names and arguments of the steps that were taken), by HFLM itself on tasks of every kind."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root, taken = tmp_path_factory.mktemp("tasks"), []
    (root / "documents.jsonl").write_text("".join(json.dumps({"text": t, "choices": [" 1", " two"], "label": 0}) + "\n" for t in TEXTS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "documents.jsonl")}}, "test_split": "test"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "generation": {
            "output_type": "generate_until",
            "doc_to_target": "1",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "text": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
    }
    for name, task in tasks.items():
        (root / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **common, "doc_to_text": "" if name == "text" else "{{text}}", **task})
        )

    class Watched(HFLM):
        pass

    def watch(name: str):
        def step(self, *args, **kwargs):
            taken.append((name, inspect.signature(getattr(HFLM, name)).bind(self, *args, **kwargs).arguments))
            return getattr(HFLM, name)(self, *args, **kwargs)

        setattr(Watched, name, step)

    for name in compat.STEPS:
        watch(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        manager = TaskManager(include_path=str(root), include_defaults=False)
        model, tokenizer = embedded()
        harness = Watched(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
        return lm_eval.simple_evaluate(harness, tasks=list(tasks), task_manager=manager, num_fewshot=1, bootstrap_iters=0), taken


def test_harness_step(measured):
    _, taken = measured
    assert {name for name, _ in taken} == set(compat.STEPS)
    for name, (parameters, _) in compat.STEPS.items():
        assert list(inspect.signature(compat.harness_step(name)).parameters)[1:] == list(parameters)
    for name, given in taken:
        if name == "_loglikelihood_tokens":
            for pair, context, continuation in given["requests"]:
                assert all(isinstance(token, int) for token in [*context, *continuation]) and len(context) and len(continuation)
                assert pair is None or [type(part) for part in pair] == [str, str]
        elif name == "_model_call":
            # No mask: rows of different lengths are padded without one.
            assert given.keys() == {"self", "inps"} and given["inps"].dim() == 2
        elif name == "_model_generate":
            assert given["generation_kwargs"]["attention_mask"].shape == given["context"].shape


def test_harness_step_answers_in_order():
    """In whatever batches; and what `_model_generate` does not know reaches `generate`."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = embedded()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
    requests = [(None, tokenizer(text)["input_ids"], tokenizer(end)["input_ids"]) for text in TEXTS for end in (" two", " 1")]
    score = compat.harness_step("_loglikelihood_tokens")
    together = score(harness, requests, disable_tqdm=True, override_bs=None)
    alone = [score(harness, [request], disable_tqdm=True, override_bs=None)[0] for request in requests]
    assert [nll for nll, _ in together] == pytest.approx([nll for nll, _ in alone], rel=1e-4)
    ids, mask = compat.harness_step("tok_batch_encode")(harness, list(TEXTS), "left", None, False)
    assert ids.shape == mask.shape and (mask[:, 0] == 0).any() and (mask[:, -1] == 1).all()
    made = compat.harness_step("_model_generate")(
        harness, ids, ids.shape[1] + 2, ["\n"], return_dict_in_generate=True, attention_mask=mask, do_sample=False
    )
    assert torch.equal(made.sequences[:, : ids.shape[1]], ids)


def test_max_new_tokens():
    assert compat.max_new_tokens({"until": ["\n"], "max_gen_toks": 7}, 256) == 7
    assert compat.max_new_tokens({"until": ["\n"], "max_new_tokens": 9, "temperature": 0.5, "do_sample": True}, 256) == 9
    assert compat.max_new_tokens({"until": []}, 256) == 256


def test_quiet():
    """Of every logger that the harness's modules have made by now."""
    import lm_eval.models.huggingface  # noqa: F401

    names = [name for name in logging.root.manager.loggerDict if name.startswith("lm_eval.")]
    assert "lm_eval.models.huggingface" in names
    before = [logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names]
    with compat.quiet():
        assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)
        assert all(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in names)
    assert [logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names] == before


def test_read_results(measured):
    kept = compat.read_results(measured[0])
    assert kept["results"].keys() == {"choice", "generation", "text"} and "samples" not in kept
    for task, metric in (("choice", "acc,none"), ("generation", "exact_match,none"), ("text", "bits_per_byte,none")):
        assert isinstance(kept["results"][task][metric], float)
        assert metric.replace(",", "_stderr,") in kept["results"][task]
        assert kept["n-samples"][task]["effective"] == len(TEXTS)
    assert kept["higher_is_better"]["choice"] == {"acc": True}


def test_read_samples(measured):
    found = list(compat.read_samples(measured[0]))
    assert sorted((one.task, one.document) for one in found) == [(t, str(n)) for t in ("choice", "generation", "text") for n in range(3)]
    assert {(one.task, one.num_answers) for one in found} == {("choice", 2), ("generation", None), ("text", None)}
    for task, metric in (("choice", "acc"), ("generation", "exact_match")):
        values = [one.metrics[metric] for one in found if one.task == task and one.filter == "none"]
        assert sum(values) / len(values) == pytest.approx(measured[0]["results"][task][f"{metric},none"])


def test_num_fewshot(measured):
    assert {task: number for task, number in compat.num_fewshot(measured[0]).items() if task != "text"} == {"choice": 1, "generation": 1}


# By touch: break what it stands on, and touch it. `found`: a result of `simple_evaluate`.


def break_harness_step(patch, found):
    patch.delattr("lm_eval.models.huggingface.HFLM._model_generate")
    compat.harness_step("_model_generate")


def break_harness_step_parameters(patch, found):
    patch.setattr("lm_eval.models.huggingface.HFLM._model_call", lambda self, ids, **kwargs: None)
    compat.harness_step("_model_call")


def break_harness_step_callers(patch, found):
    patch.setattr("lm_eval.models.huggingface.HFLM.generate_until", lambda self, requests, disable_tqdm=False: [])
    compat.harness_step("_model_generate")


def break_max_new_tokens(patch, found):
    patch.delattr("lm_eval.models.utils.normalize_gen_kwargs")
    compat.max_new_tokens({}, 256)


def break_max_new_tokens_name(patch, found):
    patch.setattr("lm_eval.models.utils.normalize_gen_kwargs", lambda settings, default: {"max_new_tokens": default})
    compat.max_new_tokens({}, 256)


def break_quiet(patch, found):
    patch.setattr("lm_eval.evaluator.eval_logger", logging.getLogger("lm-eval"))
    with compat.quiet():
        pass


def break_read_results(patch, found):
    compat.read_results({name: value for name, value in found.items() if name != "n-samples"})


def break_read_results_names(patch, found):
    compat.read_results({**found, "results": {task: {"acc": 1.0} for task in found["results"]}})


def break_read_samples(patch, found):
    compat_samples = {
        task: [{**one, "metrics": [*one["metrics"], "other"]} for one in samples] for task, samples in found["samples"].items()
    }
    list(compat.read_samples({**found, "samples": compat_samples}))


def break_read_samples_place(patch, found):
    list(compat.read_samples({name: value for name, value in found.items() if name != "samples"}))


def break_num_fewshot(patch, found):
    compat.num_fewshot({name: value for name, value in found.items() if name != "n-shot"})


BREAKS = {name.removeprefix("break_"): value for name, value in list(globals().items()) if name.startswith("break_")}
TOUCHES = [name for name in compat.__all__ if name != "UpstreamChanged"]


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_touch_is_named(name, measured):
    touch = max((touch for touch in TOUCHES if name.startswith(touch)), key=len)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UpstreamChanged) as error:
        BREAKS[name](patch, measured[0])
    assert re.match(
        rf"lm_eval \S+: lm_eval_compat\.{touch} needs .+, which is not there any more; .*see docs/upstream\.md$", str(error.value)
    )


def test_a_changed_harness_is_refused_before_anything_runs(monkeypatch):
    """Steps that the harness alone would call: it would go its own way without a word."""
    from dms.evaluation.engine.lm_eval_model import Harness

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._model_call", lambda self, ids: None)
    with pytest.raises(UpstreamChanged, match=r"lm_eval_compat\.harness_step needs HFLM\._model_call\(inps, attn_mask, labels\)"):
        Harness(SimpleNamespace(), None, 1)


def test_every_touch_is_held_broken_and_listed():
    section = UPSTREAM.read_text().partition("`dms/evaluation/engine/lm_eval_compat.py`")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == TOUCHES
    for touch in TOUCHES:
        assert f"test_{touch}" in globals() and touch in BREAKS
        said = getattr(compat, touch).__doc__
        assert re.search(r"\n\n    Assumes: ", said), touch

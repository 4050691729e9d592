"""lm-evaluation-harness, merged: its figures are those of the harness run by hand, and nothing is cut or done silently."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from evicting import embedded

import dms
from dms.evaluation.engine.lm_eval import prepare_lm_eval
from dms.evaluation.engine.settings import EvaluationSettings, LmEvalSettings, ScalingSettings
from dms.evaluation.stats.rows import RowContext

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'dms-retrofit[evaluate]'")

MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "toy_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[label] | trim}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [{"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "toy_fixed": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "toy_long": {
        "output_type": "generate_until",
        "doc_to_text": "{{text * 40}}",
        "doc_to_target": "1",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 400},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "toy_long_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text * 40}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
}
GROUP = {
    "group": "toy_group",
    "task": ["toy_choice", "toy_generation"],
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "filter_list": "none"}],
}
NAMES = ("amber-osprey", "goose-snow", "petal-adobe", "oasis-laurel", "kelp-nectar", "orchid-autumn", "coyote-pearl", "sapphire-beaver")
NUM_DOCUMENTS = 6


@pytest.fixture(scope="module")
def tiny():
    return embedded()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks about records in the embedded model's own form, of which the first is asked for: dense, it knows most answers."""
    root = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    documents = []
    for number in range(NUM_DOCUMENTS):
        names, values = rng.sample(NAMES, 4), rng.sample(range(100, 400), 7)
        lines = [
            f"\n#: ${name} {value}\n        self.step_{rng.randint(10, 99)} = {rng.randint(1, 9)}"
            for name, value in zip(names, values, strict=False)
        ]
        # Of different lengths.
        text = "<|endoftext|>" + "".join(lines) + "\n        pass" * number + f"\n#? ${names[0]}"
        documents.append({"text": text, "choices": [f" {value}" for value in (values[0], *values[4:])], "label": 0})
    with open(root / "documents.jsonl", "w") as f:
        f.writelines(json.dumps(document) + "\n" for document in documents)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "documents.jsonl")}}, "test_split": "test"}
    for name, task in TASKS.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    (root / "toy_group.yaml").write_text(yaml.safe_dump(GROUP))
    return root


@pytest.fixture(scope="module", autouse=True)
def faster_harness(tmp_path_factory):
    """Its cache is not the user's, and pip's list of packages is not asked for at each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


CONTEXT = RowContext(model="tiny", model_hash=None, recipe_hash=None, target_cr=None, seed=7, versions={}, device="cpu")


def prepare(tiny, folder, *, points=(0.0, -100.0), policies=("dense", "dms"), chat=False, out=None, trained_length=None, **given):
    wanted = LmEvalSettings(**{"tasks": ["toy_choice", "toy_generation", "toy_text"], "include_path": str(folder), **given})
    return prepare_lm_eval(*tiny, wanted, points=points, policies=policies, batch_size=4, chat=chat, versions={}, out=out)


def run(tiny, folder, **given):
    prepared, out = prepare(tiny, folder, **given), given.get("out")
    return prepared.run(context=CONTEXT, out=out, trained_length=given.get("trained_length"))


@pytest.fixture(scope="module")
def merged(tiny, folder, tmp_path_factory):
    """(rows, the folder that they were written to)."""
    out = tmp_path_factory.mktemp("out")
    return run(tiny, folder, out=out, trained_length=20), out


def test_figures_are_those_of_the_harness_run_by_hand(tiny, folder, merged):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows, _ = merged
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    values = {}
    for policy, bias in (("dense", None), ("dms", 0.0), ("dms", -100.0)):
        dms.set_mode(tiny[0], "dense" if policy == "dense" else "evict")
        tiny[0].dms.evict_bias = bias or 0.0
        # One request at a time, so that nothing is padded.
        harness = HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=1)
        found = simple_evaluate(harness, tasks=["toy_choice", "toy_generation", "toy_text"], task_manager=manager, bootstrap_iters=1000)
        ours = {(row.task, row.metric): row for row in rows if (row.policy, row.evict_bias) == (policy, bias)}
        for task, metric in (("toy_choice", "acc,none"), ("toy_generation", "exact_match,number"), ("toy_text", "bits_per_byte,none")):
            row, expected = ours[f"lm_eval:{task}", metric], found["results"][task]
            assert row.value == pytest.approx(expected[metric], rel=1e-5), (policy, task)
            values.setdefault(task, []).append(row.value)
            assert row.num_samples == NUM_DOCUMENTS
            if task == "toy_text":
                assert row.ci_low is row.ci_high is None
            else:
                right = [sample[metric.split(",")[0]] for sample in found["samples"][task]]
                assert 0 <= row.ci_low <= row.value == np.mean(right) <= row.ci_high <= 1
                assert row.ci_low < row.ci_high
    tiny[0].dms.evict_bias = 0.0
    # Eviction acts in every kind of task, and gates that keep everything change nothing.
    for dense, evicting, keeping in values.values():
        assert evicting != dense and keeping == pytest.approx(dense, rel=1e-5)
    assert values["toy_choice"][0] == 1.0 and values["toy_generation"][0] > 0.5


def test_what_was_evicted_is_measured(tiny, folder, merged):
    rows, _ = merged
    for row in rows:
        evicts, keeps = row.evict_bias == 0.0, row.evict_bias == -100.0
        assert (row.cr > 1.2) == evicts and (row.cr == 1.0) == (not evicts)
        assert ("evicted_nothing" in row.marks) == keeps
        assert row.memory == (None if row.policy == "dense" else "compacted")
        assert "few_samples" in row.marks and ("beyond_training" in row.marks) == (row.policy == "dms")
        assert row.chance == (0.25 if row.metric == "acc,none" else 0.0)
    # By hand, over documents and their choices, each of which is a request; choices of a token share one pass.
    model, tokenizer = tiny
    dms.set_mode(model, "evict")
    seen = alive = 0
    for line in (folder / "documents.jsonl").read_text().splitlines():
        document = json.loads(line)
        ids = {tuple(tokenizer(document["text"] + choice)["input_ids"][:-1]) for choice in document["choices"]}
        for one in ids:
            with torch.no_grad():
                report = model(torch.tensor([one]), use_cache=True).past_key_values.report(warn=False)
            seen, alive = seen + report.seen, alive + report.alive
    row = next(row for row in rows if row.task == "lm_eval:toy_choice" and row.evict_bias == 0.0)
    assert row.cr == pytest.approx(seen / alive)


def test_a_model_that_takes_no_cache_is_said_to_mask(tiny, folder, merged):
    rows, _ = merged
    model = tiny[0]
    model.dms.takes_cache = False
    try:
        (row,) = run(tiny, folder, tasks=["toy_choice"], policies=("dms",), points=[0.0])
    finally:
        model.dms.takes_cache = True
    same = next(row for row in rows if row.task == "lm_eval:toy_choice" and row.evict_bias == 0.0)
    assert row.memory == "masked" and same.memory == "compacted"
    assert (row.value, row.cr, row.cr_decided) == pytest.approx((same.value, same.cr, same.cr_decided))
    assert row.vs_dense is None


def test_dms_and_dense_are_compared_on_the_same_documents(merged):
    rows, _ = merged
    for row in rows:
        if row.policy == "dense" or row.task == "lm_eval:toy_text":
            assert row.vs_dense is None
            continue
        dense = next(other for other in rows if other.policy == "dense" and other.metric == row.metric)
        assert row.vs_dense.difference == pytest.approx(row.value - dense.value)
        assert row.vs_dense.ci_low <= row.vs_dense.difference <= row.vs_dense.ci_high
        if row.evict_bias == -100.0:
            assert row.vs_dense.difference == 0.0 and row.vs_dense.verdict == "not different"


def test_a_run_goes_on_where_it_was(tiny, folder, merged, monkeypatch):
    rows, out = merged
    saved = json.loads((out / "lm_eval.json").read_text())
    assert {(run["task"], run["evict_bias"]) for run in saved["runs"]} == {(t, b) for t in list(TASKS)[:3] for b in (None, 0.0, -100.0)}
    assert all(run["results"] and run["configs"] for run in saved["runs"]) and saved["settings"]["lm_eval"]
    forwards = []
    handle = tiny[0].register_forward_hook(lambda *_: forwards.append(1))
    try:
        assert run(tiny, folder, out=out, trained_length=20) == rows and not forwards
        (documents := folder / "documents.jsonl").write_text(documents.read_text() + "\n")
        run(tiny, folder, out=out, tasks=["toy_text"], points=[0.0])
        assert forwards
    finally:
        handle.remove()


def test_tasks_under_other_settings_stand_beside_each_other(tiny, folder, tmp_path):
    def runs_after(**given):
        rows = run(tiny, folder, policies=("dense",), points=[], out=tmp_path, **given)
        runs = json.loads((tmp_path / "lm_eval.json").read_text())["runs"]
        assert {row.settings_hash for row in rows} == {runs[-1]["settings_hash"]}
        return {run["task"]: run["n-samples"][run["task"]]["effective"] for run in runs}

    assert runs_after(tasks=["toy_choice"], limit=2) == {"toy_choice": 2}
    assert runs_after(tasks=["toy_generation"], limit=3) == {"toy_choice": 2, "toy_generation": 3}
    assert runs_after(tasks=["toy_choice"], limit=3) == {"toy_generation": 3, "toy_choice": 3}


def test_groups_have_rows(tiny, folder, tmp_path):
    rows = run(tiny, folder, tasks=["toy_group"], points=[0.0], limit=2, out=tmp_path)
    group = {row.policy: row for row in rows if row.task == "lm_eval:toy_group"}
    assert group.keys() == {"dense", "dms"} and group["dense"].metric == "acc,none" and group["dms"].vs_dense is None
    # Of a group the harness has a standard error alone.
    figures = json.loads((tmp_path / "lm_eval.json").read_text())["runs"][1]["results"]["toy_group"]
    width = group["dms"].ci_high - group["dms"].ci_low
    assert width == pytest.approx(2 * 1.96 * figures["acc_stderr,none"]) and figures["acc,none"] == group["dms"].value
    assert {row.task for row in rows} >= {"lm_eval:toy_choice", "lm_eval:toy_generation"}
    assert all(row.num_samples == 2 for row in rows if row.task == "lm_eval:toy_choice")
    # Of its parts one has this metric, with four choices.
    assert group["dense"].chance == 0.25 and group["dense"].num_fewshot == 0


def test_examples_are_as_many_as_asked_for(tiny, folder):
    (row,) = run(tiny, folder, tasks=["toy_choice"], policies=("dense",), num_fewshot=1, limit=2)
    assert row.num_fewshot == 1


def test_what_is_prepared_runs_without_being_checked_again(tiny, folder, tmp_path, monkeypatch):
    prepared = prepare(tiny, folder, tasks=["toy_choice"], points=[], policies=("dense",), limit=2, out=tmp_path)
    assert not list((tmp_path / "done").iterdir())
    monkeypatch.setattr("dms.evaluation.engine.lm_eval._build", None)
    (row,) = prepared.run(context=CONTEXT, out=tmp_path)
    assert row.num_samples == 2 and (tmp_path / "lm_eval.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": ["toy_text", "toy_long"]}, "toy_long': a request has .* up to 400 new"),
        ({"tasks": ["toy_long_choice"]}, "toy_long_choice': a request has .* the model reads 2048"),
        ({"policies": ("dense", "h2o")}, "not h2o: a likelihood task is one forward pass"),
        ({"points": []}, "at least one number"),
        ({"limit": 0}, "limit: .* greater than or equal to 1"),
        ({"tasks": ["toy_fixed"], "num_fewshot": 1}, "toy_fixed' sets num_fewshot to 0 itself"),
        ({"tasks": []}, "no tasks"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(tiny, folder, given, said):
    forwards = []
    handle = tiny[0].register_forward_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(ValueError, match=said):
            run(tiny, folder, **given)
    finally:
        handle.remove()
    assert not forwards


def test_an_unknown_task_is_refused_with_the_nearest(tiny, folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    # The harness's own tasks are thousands of files.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, include_defaults=True: TaskManager(None, include_path, False))
    with pytest.raises(ValueError, match=r"no task 'toy_choise' \(did you mean 'toy_choice'\?\)"):
        run(tiny, folder, tasks=["toy_choise"])


def test_without_the_harness_it_is_said_what_to_install(tiny, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match="pip install 'dms-retrofit\\[evaluate\\]'"):
        run(tiny, folder)


@pytest.mark.slow
def test_the_command_merges_suites_harness_and_chains(save_gated, folder, tmp_path):
    """One call: rows of all three, tables that bear with what the harness does not measure, and a later call that keeps them."""
    from rich.console import Console

    from dms.evaluation.command import evaluate_folder

    model = str(save_gated())
    small = {"suites": ["needle"], "num_documents": 2}
    tasks = LmEvalSettings(tasks=["toy_choice", "toy_group"], include_path=str(folder))
    chains = ScalingSettings(num_problems=2, max_k=2, num_hops=1)
    settings = EvaluationSettings(
        policies=["dense", "dms", "tova"], lengths=[128], evict_bias=[0.0, 1.0], lm_eval=tasks, scaling=chains, **small
    )
    console, out = Console(width=140, record=True, quiet=True), tmp_path / "out"
    result = evaluate_folder(model, settings, out=out, console=console)
    assert {(row.suite, row.policy, row.evict_bias) for row in result.rows} == {
        *(("needle", policy, bias) for policy, bias in settings.points()),
        *((suite, policy, bias) for suite in ("lm_eval", "scaling") for policy, bias in settings.points() if policy != "tova"),
    }
    entries = [row.entries for row in result.rows if row.suite == "needle" and row.policy == "dms"]
    assert entries[0] > entries[1]
    assert any(sentence.startswith("In lm-evaluation-harness at evict_bias +1, dms holds 1/") for sentence in result.to_dict()["words"])
    assert json.loads((out / "rows.json").read_text()) == result.to_dict()
    later = EvaluationSettings(policies=["dense", "dms"], lengths=[96], **small)
    both = evaluate_folder(model, later, out=out, console=console)
    assert both.rows[: len(result.rows)] == result.rows and both.findings[-1] == result.findings[-1]
    assert {row.length for row in both.rows} >= {128, 96}
    # What the harness would refuse is refused before a document is read.
    wrong = later.model_copy(update={"lm_eval": LmEvalSettings(tasks=["toy_chioce"], include_path=str(folder))})
    with pytest.raises(ValueError, match="toy_chioce"):
        evaluate_folder(model, wrong, out=tmp_path / "new", console=console)
    assert not list((tmp_path / "new").glob("rows.json"))

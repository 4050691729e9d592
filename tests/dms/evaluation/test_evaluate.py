"""`dms evaluate`: the same budgets, figures that are those of plain forwards, resuming, and what it refuses to pass over."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from evaluated import make_rows as evaluated_rows
from said import says

from dms.console import make_console
from dms.evaluation import command
from dms.evaluation.command import evaluate_folder, failures
from dms.evaluation.data.tasks import RECALL_TASKS
from dms.evaluation.engine import units
from dms.evaluation.engine.run_end import evaluate_run
from dms.evaluation.engine.scoring import predict
from dms.evaluation.engine.settings import DEFAULT_POLICIES, EvaluationSettings
from dms.evaluation.policies import QUICK_ONES, TRAINING_FREE
from dms.evaluation.policies.rules import H2O
from dms.evaluation.present.findings import Finding, make_findings
from dms.evaluation.stats.rows import Comparison, Mark, ResultRow, Verdict
from dms.evaluation.suites import make_suite
from dms.io import base_models, checkpoint
from dms.modes import set_mode

SMALL = {"suites": ["records", "text"], "lengths": [192], "num_documents": 3, "batch_size": 2, "prefill_chunk": 48, "num_greedy": 3}


def small(**changes):
    return EvaluationSettings(**(SMALL | changes))


def figure(rows, policy, task, metric="accuracy", **where):
    (row,) = [
        row
        for row in rows
        if (row.policy, row.task, row.metric) == (policy, task, metric)
        and all(getattr(row, name) == value for name, value in where.items())
    ]
    return row


@pytest.fixture(scope="module")
def evaluated(gated_folder, tmp_path_factory):
    """(OUT, result) of every policy."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return out, evaluate_folder(str(gated_folder), small(), out=out)


def test_every_policy_has_the_budget_of_dms(evaluated):
    out, result = evaluated
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert rows == result.to_dict()["rows"]
    rows = [ResultRow.from_dict(row) for row in rows]
    assert rows == result.rows
    assert {(row.policy, row.evict_bias) for row in rows} == {("dense", None)} | {(policy, 0.0) for policy in DEFAULT_POLICIES[1:]}
    for task, metric in (("recall", "accuracy"), ("text", "bits_per_byte")):
        dms = figure(rows, "dms", task, metric)
        assert dms.cr > 1.3 and dms.memory == "compacted" and dms.budget is None
        for policy in QUICK_ONES:
            row = figure(rows, policy, task, metric)
            # Rounded in each batch.
            assert row.entries == pytest.approx(dms.entries, abs=0.5) and row.entries == pytest.approx(row.budget)
            assert row.bytes < figure(rows, "dense", task, metric).bytes
            # What a prompt is read with: as many entries again as a part of it, or all of it.
            whole = TRAINING_FREE[policy].reads_whole_prompt
            assert row.peak_entries > 150 if whole else row.peak_entries <= row.budget + SMALL["prefill_chunk"] + 1
    dense = figure(rows, "dense", "recall")
    assert dense.entries == 191 and dense.cr == 1.0 and dense.memory is None and dense.vs_dense is None


def test_dms_with_pages_of_fewer_bits(gated_folder, tmp_path):
    settings = EvaluationSettings(
        suites=["text"], lengths=[192], num_documents=2, num_greedy=1, policies=["dense", "dms"], kv_dtype=["int4", "int8"]
    )
    rows = evaluate_folder(str(gated_folder), settings, out=tmp_path / "out", card=True).rows
    model, eight, four = (figure(rows, policy, "text", "bits_per_byte") for policy in ("dms", "dms_int8", "dms_int4"))
    assert len({row.value for row in (model, eight, four)}) == 3
    assert max(abs(one.value - model.value) for one in (eight, four)) < 0.05 * model.value
    kl = [figure(rows, policy, "text", "kl").value for policy in ("dms", "dms_int8", "dms_int4")]
    assert abs(kl[1] - kl[0]) < abs(kl[2] - kl[0])
    assert four.bytes < eight.bytes < model.bytes and four.cr == pytest.approx(model.cr, rel=0.02) and four.vs_dms is not None
    assert f"| dms_int4 | 0 | {four.cr:.2f} |" in " ".join((gated_folder / "README.md").read_text().split()).replace("  ", " ")


def test_weights_that_are_on_disk(gated_folder, tmp_path):
    """The figures, and what is written beside them, are the same; an evaluation goes on either way."""
    pytest.importorskip("accelerate")
    settings = EvaluationSettings(
        suites=["text"], lengths=[96], num_documents=2, num_greedy=1, policies=["dense", "dms", "expected_attention"]
    )

    def figures(name, **options):
        result = evaluate_folder(str(gated_folder), settings, out=tmp_path / name, **options)
        return [replace(row, step_ms=None, seconds=0.0) for row in result.rows]

    expected = figures("here")
    assert figures("on disk", device_map={"": "disk"}) == expected
    for file in ("settings.json", "profile.json"):
        assert (tmp_path / "on disk" / file).read_text() == (tmp_path / "here" / file).read_text()
    assert figures("here", device_map={"": "cpu", "model.layers.2": "disk"}) == expected


def test_one_pass_takes_nothing_from_pages(gated_folder, tmp_path):
    with pytest.raises(ValueError, match="one_pass with dms_int4: it reads a document in one pass"):
        evaluate_folder(str(gated_folder), EvaluationSettings(suites=["one_pass"], lengths=[96], kv_dtype=["int4"]), out=tmp_path / "out")


def test_gates_on_another_form_of_their_base(gated_folder, tmp_path, capsys):
    """Said in the rows, in settings.json, on the console and on the card."""
    from dms.io.weights import GATES_FILE, base_hash

    half, gates = tmp_path / "half", tmp_path / "gates"
    base_models.load_base("builtin:tiny", "bfloat16", "cpu").save_pretrained(half)
    base_models.load_tokenizer("builtin:tiny").save_pretrained(half)
    gates.mkdir()
    shutil.copyfile(gated_folder / GATES_FILE, gates / GATES_FILE)
    settings = EvaluationSettings(suites=["text"], lengths=[96], num_documents=2, num_greedy=1, policies=["dense", "dms"])
    with pytest.raises(ValueError, match="--other-base"):
        evaluate_folder(str(gates), settings, base=str(half), out=tmp_path / "out")
    with pytest.warns(UserWarning, match="^gates trained on"):
        result = evaluate_folder(str(gates), settings, base=str(half), other_base=True, out=tmp_path / "out", card=True)
    said = f"gates trained on builtin:tiny (hash {base_hash(gated_folder)}), used on {half} (hash {base_hash(half)})"
    assert {row.other_base for row in result.rows} == {said} and {row.model_hash for row in result.rows} == {base_hash(half)}
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["other_base"] == said
    assert says(capsys.readouterr().out, said)
    card = (gates / "README.md").read_text()
    assert f"On another form of the base: {said.replace(str(half), 'half')}." in card


@pytest.mark.parametrize("mode", ["dense", "evict"])
def test_figures_are_those_of_one_forward(mode, evaluated, gated_folder):
    """Reading in parts and decoding step by step gives dense and dms what one pass over the whole document gives."""
    _, result = evaluated
    model, tokenizer = checkpoint.load(gated_folder, dtype="float32"), base_models.load_tokenizer(str(gated_folder))
    set_mode(model, mode)
    policy = "dense" if mode == "dense" else "dms"
    where = {} if mode == "dense" else {"evict_bias": 0.0}

    documents = make_suite("records", tokenizer, length=192, num_documents=3)
    right = predict(model, torch.tensor([d.input_ids for d in documents]), use_cache=mode == "evict").right_BT.tolist()
    correct = [all(right[i][a.start - 1 : a.end - 1]) for i, d in enumerate(documents) for a in d.answers if a.task == "multi_key"]
    row = figure(result.rows, policy, "multi_key", **where)
    assert row.value == sum(correct) / len(correct) and row.num_samples == len(correct)

    windows = make_suite("text", tokenizer, length=192, num_documents=3)
    nll = predict(model, torch.tensor([d.input_ids for d in windows]), use_cache=mode == "evict").nll_BT
    bits = sum(float(nll[i, d.prompt - 1 :].sum()) for i, d in enumerate(windows)) / math.log(2)
    row = figure(result.rows, policy, "text", "bits_per_byte", **where)
    assert row.value == pytest.approx(bits / sum(d.num_bytes for d in windows), rel=1e-4)


def test_agreement_with_dense(evaluated, gated_folder):
    """KL by the logits of two plain forwards; a policy that keeps everything agrees entirely."""
    _, result = evaluated
    model, tokenizer = checkpoint.load(gated_folder, dtype="float32"), base_models.load_tokenizer(str(gated_folder))
    windows = make_suite("text", tokenizer, length=192, num_documents=3)
    ids, sums, agreed, count = torch.tensor([d.input_ids for d in windows]), 0.0, 0, 0
    logits = {}
    for mode in ("dense", "evict"):
        set_mode(model, mode)
        with torch.no_grad():
            logits[mode] = model(ids, use_cache=mode == "evict").logits.double()
    for i, window in enumerate(windows):
        dense, dms = (logits[mode][i, window.prompt - 1 : -1].log_softmax(-1) for mode in ("dense", "evict"))
        sums += float((dense.exp() * (dense - dms)).sum())
        agreed += int((dense.argmax(-1) == dms.argmax(-1)).sum())
        count += len(dense)
    assert figure(result.rows, "dms", "text", "kl", evict_bias=0.0).value == pytest.approx(sums / count, rel=1e-3)
    assert figure(result.rows, "dms", "text", "top1_agreement", evict_bias=0.0).value == pytest.approx(agreed / count)
    assert 0 <= figure(result.rows, "random", "text", "divergence_length", evict_bias=0.0).value <= SMALL["num_greedy"]


@pytest.mark.slow
def test_it_goes_on_where_it_was(evaluated, gated_folder, tmp_path, monkeypatch):
    """A call that is broken off leaves what it had finished; the next reads only what is missing, and ends with the same figures."""
    _, whole = evaluated
    settings, calls = small(policies=["dense", "dms", "tova"]), []
    read = units.read

    def counting(*args, **options):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return read(*args, **options)

    monkeypatch.setattr(units, "read", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(str(gated_folder), settings, out=tmp_path)
    before = len(calls)
    result = evaluate_folder(str(gated_folder), settings, out=tmp_path)
    # Four units of three policies; of the broken one, which is of text, dense is read again, to compare with.
    assert before == 8 and len(calls) - before == 4 * 3 - 7 + 1

    def figures(rows):
        return [replace(row, step_ms=None, seconds=0.0) for row in rows]

    expected = [row for row in whole.rows if row.policy in ("dense", "dms", "tova") and row.evict_bias in (None, 0.0)]
    assert figures(result.rows) == figures(expected)
    # More of the same may be asked for; something else may not.
    with pytest.raises(ValueError, match=r"holds another evaluation: seed was 7 and is 8; name another --out"):
        evaluate_folder(str(gated_folder), small(seed=8), out=tmp_path)
    more = small(policies=["dense", "dms"], suites=["text"], lengths=[96], batch_size=3)
    both = evaluate_folder(str(gated_folder), more, out=tmp_path).rows
    assert figures(both[: len(result.rows)]) == figures(result.rows)
    assert {(row.policy, row.suite) for row in both if row.length == 96} == {("dense", "text"), ("dms", "text")}
    written = json.loads((tmp_path / "settings.json").read_text())
    assert written["lengths"] == [192, 96] and written["policies"] == ["dense", "dms", "tova"]
    # What cannot be measured leaves the folder as it was.
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        evaluate_folder(str(gated_folder), small(text="nowhere.txt"), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_less_time_for_more_rounding(evaluated, gated_folder, tmp_path):
    """In another dtype, and with parts of what is decoded read at once: near the same figures, said in the folder, and not to be mixed with others."""
    _, whole = evaluated
    quicker = small(policies=["dense", "dms"], dtype="bfloat16", decode_chunk=16)
    found = evaluate_folder(str(gated_folder), quicker, out=tmp_path)
    written = json.loads((tmp_path / "settings.json").read_text())
    assert (written["dtype"], written["decode_chunk"]) == ("bfloat16", 16)
    for policy in ("dense", "dms"):
        before, now = (figure(result.rows, policy, "text", "bits_per_byte") for result in (whole, found))
        assert now.value != before.value and now.value == pytest.approx(before.value, rel=0.02)
        assert now.entries_mean == pytest.approx(before.entries_mean, rel=0.02)
    with pytest.raises(ValueError, match="dtype was 'bfloat16' and is 'float32'"):
        evaluate_folder(str(gated_folder), quicker.model_copy(update={"dtype": None}), out=tmp_path)


def test_a_planted_no_op(save_gated, tmp_path):
    """Gates that never evict: the figures are dense's, and it is said."""
    folder = save_gated(std=0.0, offset=50.0)
    result = evaluate_folder(str(folder), small(policies=["dense", "dms", "tova"], suites=["text"]), out=tmp_path)
    assert figure(result.rows, "dms", "text", "kl").value < 1e-6
    assert figure(result.rows, "dms", "text", "kl").marks[0] == "evicted_nothing"
    assert any(line.startswith("evicted_nothing: dms: text at 192") for line in failures(result))


def test_a_planted_leak(gated_folder, tmp_path, monkeypatch):
    """A policy that keeps a fifth more than it was given is found out by what its cache holds."""

    class Leaky(H2O):
        def __init__(self, budget, seed=0):
            super().__init__(round(1.2 * budget), seed)

    monkeypatch.setitem(TRAINING_FREE, "h2o", Leaky)
    result = evaluate_folder(str(gated_folder), small(policies=["dense", "dms", "h2o", "tova"], suites=["text"]), out=tmp_path)
    row = figure(result.rows, "h2o", "text", "kl")
    assert row.entries == pytest.approx(1.2 * row.budget, rel=0.01) and "budget_missed" in row.marks
    assert [line for line in failures(result) if line.startswith("budget_missed")] == ["budget_missed: h2o: text at 192"]


def test_few_samples_and_tasks_that_dense_cannot_do(evaluated):
    _, result = evaluated
    rows = result.rows
    assert all("few_samples" in row.marks for row in rows if row.num_samples < 50)
    # Of 192 tokens, trained at 256.
    assert "beyond_training" not in result.marks
    dense = {row.task: row for row in rows if row.policy == "dense" and row.metric == "accuracy"}
    unable = {task for task, row in dense.items() if "dense_at_chance" in row.marks}
    assert unable >= {task for task, row in dense.items() if row.value == 0.0} and "recall" not in unable
    assert unable == {row.task for row in rows if "dense_at_chance" in row.marks}
    assert any("nothing is shown there" in sentence for sentence in result.to_dict()["words"]) == any(
        not task.startswith("recall") for task in unable
    )


def test_lengths_beyond_training(gated_folder, tmp_path):
    settings = small(policies=["dense", "dms"], suites=["text"], lengths=[320], num_documents=2)
    result = evaluate_folder(str(gated_folder), settings, out=tmp_path)
    assert all(("beyond_training" in row.marks) == (row.policy == "dms") for row in result.rows)
    assert "beyond the length that its gates were trained at" in result.findings[0].heading


def test_findings_say_what_rows_say():
    same = dict.fromkeys(("model_hash", "recipe_hash", "ci_low", "ci_high", "num_samples", "target_cr", "cr_decided", "bytes"))
    same |= {"model": "m", "length": 2048, "cr": 6.5, "memory": None, "seed": 7, "versions": {}, "device": "cpu", "seconds": 1.0}

    def row(policy, task, value, *, vs_dense=None, vs_dms=None, marks=(), metric="accuracy"):
        def difference(found):
            if found is None:
                return None
            return Comparison(difference=found[0], ci_low=found[0] - 0.1, ci_high=found[0] + 0.1, verdict=Verdict(found[1]))

        return ResultRow(
            **same,
            policy=policy,
            task=task,
            metric=metric,
            value=value,
            suite="records",
            evict_bias=0.0,
            marks=tuple(map(Mark, marks)),
            vs_dense=difference(vs_dense),
            vs_dms=difference(vs_dms),
        )

    rows = [
        row("dms", "count", 0.3, vs_dense=(-0.2, "worse")),
        row("dms", "copy", 0.9, vs_dense=(0.0, "not different")),
        row("dms", "kl", 0.02, metric="kl"),
        row("dms", "single", 1.0, vs_dense=(0.0, "not different"), marks=["few_samples"]),
        row("dms", "passage", 0.0, vs_dense=(0.0, "not different"), marks=["dense_at_chance"]),
        row("tova", "count", 0.5, vs_dms=(0.2, "better")),
        row("h2o", "count", 0.9, vs_dms=(0.6, "better"), marks=["budget_missed"]),
        row("tova", "copy", 0.1, vs_dms=(-0.8, "worse")),
        row("tova", "single", 0.0, vs_dms=(-1.0, "worse"), marks=["few_samples"]),
    ]
    (finding,) = make_findings(rows)
    assert (finding.length, finding.evict_bias) == (2048, 0.0)
    assert list(finding.lines) == [
        "At 2048 tokens, dms holds 1/6.50 of the entries.",
        "It loses to dense in count 0.300 (dense 0.500, -0.200 [-0.300, -0.100]).",
        "It is not told apart from dense in copy 0.900 (dense 0.900, +0.000 [-0.100, +0.100]).",
        "Its distance from dense: kl of kl 0.020.",
        "h2o missed the budget, and no comparison with that is told.",
        "At the same budget it loses in count 0.300 to tova 0.500.",
        "At the same budget it is better than every other policy in copy.",
        "Too few samples to say: single.",
        "Dense itself is at chance in passage: nothing is shown there.",
    ]
    assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding
    in_the_mean = {"dms": (4.0, 512.0), "tova": (3.5, 480.0), "h2o": (3.5, 640.0)}
    counted = [
        replace(
            row, cr_mean=in_the_mean[row.policy][0], entries_mean=in_the_mean[row.policy][1], budget=None if row.policy == "dms" else 315.0
        )
        for row in rows
    ]
    (both,) = make_findings(counted)
    assert both.heading == "At 2048 tokens, dms holds 1/6.50 of the entries at the end and 1/4.00 in the mean over positions."
    at_the_end = "The other policies hold as many entries at the end; in the mean over positions it holds 0.80 to 1.07 times theirs."
    assert [sentence for sentence in both.sentences if sentence not in finding.sentences] == [at_the_end]
    (masked,) = make_findings([replace(row, memory="masked") for row in rows])
    assert masked.heading == "At 2048 tokens, dms holds 1/6.50 of the entries, masked: they are hidden and not freed."
    (nothing,) = make_findings([replace(row, marks=(Mark.EVICTED_NOTHING,)) for row in rows])
    assert nothing.sentences[0].startswith("It evicted nothing") and len(nothing.sentences) == 1
    # One task that was too short says nothing of the others.
    (short,) = make_findings([replace(row, marks=(Mark.EVICTED_NOTHING,)) if row.task == "copy" else row for row in rows])
    assert short.sentences[-1] == "It evicted nothing in copy: these figures are those of the dense model."
    assert short.sentences[0] == finding.sentences[0] and not any("copy" in sentence for sentence in short.sentences[:-1])
    beyond = [replace(row, marks=(*row.marks, Mark.BEYOND_TRAINING)) if row.task == "copy" else row for row in rows]
    assert (
        make_findings(beyond)[0].heading
        == "At 2048 tokens, dms holds 1/6.50 of the entries, in part beyond the length that its gates were trained at."
    )


def test_findings_say_which_mixture_is_best_in_how_many_bytes():
    same = dict.fromkeys(("model_hash", "recipe_hash", "ci_low", "ci_high", "num_samples", "target_cr", "cr_decided"))
    same |= {"model": "m", "length": 2048, "cr": 6.5, "memory": None, "seed": 7, "versions": {}, "device": "cpu", "seconds": 1.0}

    def row(policy, bias, kilobytes, recall, bits):
        common = {**same, "policy": policy, "evict_bias": bias, "bytes": 1000 * kilobytes, "suite": "records"}
        return [
            ResultRow(**common, task="recall", metric="accuracy", value=recall),
            ResultRow(**common, task="text", metric="bits_per_byte", value=bits),
        ]

    rows = [
        *row("dense", None, 900, 1.0, 1.0),
        *row("dms", -1.0, 400, 1.0, 1.01),
        *row("dms", 1.0, 200, 0.9, 1.04),
        *row("dms_int4", -1.0, 120, 0.95, 1.03),
        *row("dms_int4", 1.0, 60, 0.9, 1.06),
    ]
    *points, mixtures = make_findings(rows)
    assert [point.evict_bias for point in points] == [-1.0, 1.0] and mixtures.evict_bias is None
    assert "no other beats in as many bytes" in mixtures.heading
    assert mixtures.sentences == (
        "recall: dms_int4 at +1 (60 KB: 0.900), dms_int4 at -1 (120 KB: 0.950), dms at -1 (400 KB: 1.000).",
        "bits per byte of text: dms_int4 at +1 (60 KB: 1.060), dms_int4 at -1 (120 KB: 1.030), dms at -1 (400 KB: 1.010).",
    )
    assert all(finding.evict_bias is not None for finding in make_findings([row for row in rows if row.policy != "dms_int4"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": ["dense", "dms", "h20"]},
            r"policies: 'h20' is unknown \(did you mean 'h2o'\?\); there are dense, dms, dms_int8, dms_fp8, dms_int4, sliding_window",
        ),
        ({"policies": ["dense", "h2o"]}, "get the budget that dms is measured to use; add dms"),
        ({"policies": ["dms"]}, "dense is not among them"),
        ({"suites": ["record"]}, r"suites: 'record' is unknown \(did you mean 'records'\?\)"),
        ({"evict_bias": [math.nan]}, "evict_bias.*finite"),
        ({"evict_bias": []}, "no operating point"),
        ({"lengths": [0]}, "a length below 1"),
        ({"num_document": 3}, r"unknown key 'num_document' \(did you mean 'num_documents'\?\)"),
        ({"scaling": {"stop": ["x"]}}, "name them with problems=FILE.jsonl"),
        ({"scaling": {"problems": "mine.jsonl", "num_hops": 3}}, "num_hops is of the built-in problems"),
        ({"lm_eval": {}}, "key 'tasks' is missing"),
    ],
)
def test_what_settings_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_what_a_folder_refuses(gated_folder, tmp_path):
    with pytest.raises(ValueError, match=r"--lengths has \[4096\] and the model's context is 2048 tokens"):
        evaluate_folder(str(gated_folder), small(lengths=[4096]), out=tmp_path / "out")
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        evaluate_folder(str(gated_folder), small(), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "settings.json").write_text('{"seed": 7, "win')
    with pytest.raises(ValueError, match=r"settings.json is no JSON object, and says nothing of what the folder holds"):
        evaluate_folder(str(gated_folder), small(), out=tmp_path)


def test_other_windows_and_another_text_are_another_evaluation(gated_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a text that is long enough" for number in range(4000)))
    settings = small(suites=["text"], policies=["dense", "dms"], num_documents=2, text=str(text))
    evaluate_folder(str(gated_folder), settings, out=tmp_path / "out")
    before = (tmp_path / "out" / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"holds another evaluation: window was 8 and is 4; name another --out"):
        evaluate_folder(str(gated_folder), settings, window=4, out=tmp_path / "out")
    text.write_text(text.read_text() + "one more line\n")
    with pytest.raises(ValueError, match=r"holds another evaluation: text_hash was '[0-9a-f]{16}' and is"):
        evaluate_folder(str(gated_folder), settings, out=tmp_path / "out")
    assert (tmp_path / "out" / "settings.json").read_text() == before


def test_greedy_decoding_ends_with_the_window(gated_folder, tmp_path):
    settings = small(suites=["text"], policies=["dense", "dms"], num_documents=2, lengths=[96], num_greedy=64)
    row = figure(evaluate_folder(str(gated_folder), settings, out=tmp_path).rows, "dms", "text", "divergence_length")
    assert row.limit == 96 // 8 >= row.value


def test_tasks_of_one_name_in_two_suites_are_two(tmp_path):
    row = next(row for row in evaluated_rows() if row.policy == "dms")
    of_records = replace(row, suite="records", task="chain_6")
    before, now = (replace(row, suite="scaling", task="chain_6", settings_hash=one) for one in "ab")
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [one.to_dict() for one in (of_records, before)]}))
    assert command._with_earlier([now], tmp_path, make_console()) == [of_records, now]


def test_chains_sampled_in_another_way_do_not_stand_beside_these(gated_folder, tmp_path, capsys):
    def scaled(points, **changes):
        given = {"num_problems": 2, "max_k": 2, "max_new_tokens": 4} | changes
        settings = small(suites=[], policies=["dense", "dms"], evict_bias=points, scaling=given)
        evaluate_folder(str(gated_folder), settings, out=tmp_path)
        rows, scaling = (json.loads((tmp_path / name).read_text())["rows"] for name in ("rows.json", "scaling.json"))
        assert {json.dumps(row) for row in rows} == {json.dumps(row) for row in scaling}
        return {row["evict_bias"] for row in rows}

    assert scaled([0.0, 2.0]) == {None, 0.0, 2.0}
    assert scaled([1.0]) == {None, 0.0, 1.0, 2.0}
    assert "other settings" not in capsys.readouterr().out
    assert scaled([1.0], chains_at_once=1) == {None, 0.0, 1.0, 2.0}
    assert "other settings" not in capsys.readouterr().out
    assert scaled([0.0], temperature=0.5) == {None, 0.0}
    assert says(capsys.readouterr().out, "were measured with other settings, and are dropped")
    alone = small(suites=[], policies=["dense"], scaling={"num_problems": 2, "max_k": 2, "max_new_tokens": 4})
    rows = evaluate_folder(str(gated_folder), alone, out=tmp_path / "dense").rows
    assert rows and {row.policy for row in rows} == {"dense"}


def test_documents_that_a_context_does_not_hold_twice(gated_folder, tmp_path):
    settings = small(policies=["dense", "dms", "ada_kvzip"], lengths=[1025])
    with pytest.raises(
        ValueError, match=r"AdaKVzip reads a prompt twice, .* 2048 tokens does not hold twice 1025; give documents of at most 1024"
    ):
        evaluate_folder(str(gated_folder), settings, out=tmp_path / "out")


def test_defaults(tmp_path):
    settings = EvaluationSettings().completed(2048)
    assert settings.lengths == [1024, 2048] and settings.policies == list(DEFAULT_POLICIES) and settings.num_documents == 64
    assert "one_pass" not in settings.suites and EvaluationSettings().completed(10**6).lengths == [4096, 8192]
    # In the order in which they run, and once.
    assert EvaluationSettings(policies=["tova", "dms", "dense", "dms"]).policies == ["dense", "dms", "tova"]
    quick = EvaluationSettings(quick=True, batch_size=3).completed(2048)
    assert (quick.lengths, quick.num_documents, quick.batch_size) == ([1024], 50, 3)
    (tmp_path / "model").mkdir()
    assert command.default_out(tmp_path / "model") == tmp_path / "model-evaluation"
    (tmp_path / "result.json").write_text("{}")
    assert command.default_out(tmp_path / "model") == tmp_path / "evaluation"


def test_the_suite_of_a_runs_end(gated_folder, tmp_path):
    """`one_pass` under `dms evaluate` gives the figures of a run's end, whatever the batches."""
    settings = small(suites=["one_pass"], policies=["dense", "dms", "sliding_window", "tova"])
    result = evaluate_folder(str(gated_folder), settings, out=tmp_path)
    model, tokenizer = checkpoint.load(gated_folder, dtype="float32"), base_models.load_tokenizer(str(gated_folder))
    documents = make_suite("one_pass", tokenizer, length=192, num_documents=3)
    assert figure(result.rows, "dms", "recall").num_samples == sum(a.task in RECALL_TASKS for d in documents for a in d.answers)
    for policy, figures in evaluate_run(model, documents, batch_size=2).figures.items():
        bias = None if policy == "dense" else 0.0
        recall, text = (figure(result.rows, policy, *name, evict_bias=bias) for name in (("recall",), ("text", "bits_per_byte")))
        assert recall.value == figures.recall and recall.cr_decided == figures.cr_decided
        # Budgets are rounded in each batch, here of one document less.
        loose = 0.01 if policy == "sliding_window" else 0.0
        assert recall.cr == pytest.approx(figures.cr, rel=loose, abs=0.0)
        assert text.value == pytest.approx(figures.bits_per_byte, rel=max(loose, 1e-6)) and text.memory == figures.memory
    tova, dms = (figure(result.rows, policy, "recall", evict_bias=0.0) for policy in ("tova", "dms"))
    assert tova.entries == pytest.approx(dms.entries, abs=0.5) and tova.entries == pytest.approx(tova.budget)
    assert tova.vs_dms is not None and tova.reads is None

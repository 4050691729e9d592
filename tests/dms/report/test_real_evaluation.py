"""The report and the card of what `dms evaluate` writes, and that the made-up evaluation of the other tests has the same form."""

import json
import shutil

import evaluated
import pytest

from dms.evaluation.stats.rows import ResultRow
from dms.report.evaluation_card import write_evaluation_card
from dms.report.evidence import read_evidence
from dms.report.page import write_evaluation_page


def read(folder, stem):
    return json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))


def test_evidence_holds_what_was_written(real_evaluation):
    model, folder = real_evaluation
    evidence, written = read_evidence(folder), read(folder, "rows")
    assert sorted(evidence.rows, key=repr) == sorted(map(ResultRow.from_dict, written["rows"]), key=repr)
    assert evidence.scaling and all(row in evidence.rows for row in evidence.scaling)
    assert {row.length for row in evidence.rows} >= {96, 128}
    about = evidence.conditions
    assert (about.model, about.base_name, about.trained_length, about.target_cr) == (str(model), "builtin:tiny", 96, 2.0)
    assert list(about.lengths) == [96, 128] and list(about.evict_bias) == [0.0, 1.0] and about.chat_template is False
    # Sentences of hyper-scaling stand with its figures; the others are findings, those of what was trained apart.
    told = [line for finding in evidence.findings for line in finding.lines]
    assert evidence.scaling_sentences and not set(told) & set(evidence.scaling_sentences) and set(told) <= set(written["words"])
    assert {finding.evict_bias for finding in evidence.findings} == {0.0, 1.0}
    assert [finding.length for finding in evidence.usual_findings()] == [96, 128]
    assert evidence.profile.length == 128 and [point.evict_bias for point in evidence.profile.points] == [0.0, 1.0]
    assert [len(trace.tokens) for trace in evidence.traces] == [128] * len(evidence.traces) and evidence.trace_bias == 0.0
    assert len(evidence.missing) == 2 and "--lm-eval" in evidence.missing[0] and "No training curves" in evidence.missing[1]


def test_the_page_shows_it(real_evaluation, tmp_path):
    _, folder = real_evaluation
    evidence = read_evidence(folder)
    text = write_evaluation_page(evidence, tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len(data["rows"]["values"]) == len(evidence.rows) and data["length"] == 96, "the longest that was trained"
    assert data["profile"] == {
        "points": [
            {key: point[key] for key in ("evict_bias", "layer_indices", "evicted_LH", "cr_LH")}
            for point in read(folder, "profile")["points"]
        ]
    }
    assert data["traces"] == read(folder, "traces")["documents"]
    assert {chart["choices"]["length"] for chart in data["pareto"]} >= {96, 128} and len(data["scaling"]) == 2


def test_the_card_says_it_once(real_evaluation, tmp_path):
    model, folder = real_evaluation
    copy = shutil.copytree(model, tmp_path / "model")
    evidence = read_evidence(folder)
    text = write_evaluation_card(evidence, copy).read_text(encoding="utf-8")
    assert "### Beside dense, at 96 tokens" in text and "### Operating points and other policies, at 128 tokens" in text
    row = next(row for row in evidence.rows if (row.policy, row.task, row.length, row.evict_bias) == ("dms", "recall", 96, 0.0))
    assert f"| recall | {row.num_samples} | " in text and f"{row.value:.4f} [{row.ci_low:.4f}, {row.ci_high:.4f}]" in text
    assert all(text.count(sentence) == 1 for sentence in evidence.scaling_sentences)
    assert "beyond training" in text and "trained at 96 tokens; at " in text
    assert write_evaluation_card(evidence, copy).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("stem", ["rows", "settings", "scaling", "profile", "traces"])
def test_the_made_up_evaluation_has_the_form_of_a_real_one(real_evaluation, tmp_path, stem):
    """Fields that the report reads: settings.json has more, which it leaves."""
    _, folder = real_evaluation
    real, made_up = read(folder, stem), read(evaluated.write_evaluation(tmp_path), stem)
    if stem == "settings":
        assert set(made_up) <= set(real)
        return
    assert set(made_up) == set(real)
    for part in {"rows", "findings", "points", "documents"} & set(real):
        assert fields(made_up[part]) >= fields(real[part])


def fields(items):
    return {name for item in items for name in item}

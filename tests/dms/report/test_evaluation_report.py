"""`dms report`: what it reads, what it refuses, and that charts and pictures show the rows and nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path

import evaluated
import pytest
from said import flat
from typer.testing import CliRunner

from dms.evaluation.present.findings import Finding
from dms.evaluation.stats.rows import Mark
from dms.report import charts
from dms.report.command import MAX_BYTES
from dms.report.evidence import Conditions, Evidence, describe_marks, read_evidence
from dms.report.page import write_evaluation_page
from dms.report.plots import plot_charts
from dms.report.run_metrics import LoggedStep

# What quality is drawn against: fields of rows.
COSTS = ["bytes", "entries_mean", "reads", "step_ms"]


def run(*arguments):
    from dms_train.cli import app

    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def read_data(page):
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return evaluated.write_evaluation(tmp_path_factory.mktemp("report") / "evaluation")


@pytest.fixture
def small(tmp_path):
    """Of one suite and two lengths: pictures take their time."""
    rows = [row for row in evaluated.make_rows() if row.suite == "words" and row.length != 4096]
    return evaluated.write_evaluation(tmp_path / "small", rows=evaluated.rows_file(rows), lm_eval=None)


def test_the_page_is_one_file_that_says_what_was_measured(folder):
    page = write_evaluation_page(read_evidence(folder), folder / "report.html")
    assert page.stat().st_size < MAX_BYTES
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|action)=|@import|url\(|href=\"(?!#)", text), "nothing is fetched"
    for said in (
        "0f3c2a9b1d5e",
        "7b1e9c44aa02",
        "c0ffee0123456789",
        "builtin:tiny",
        "torch 2.13.0",
        "16 tokens, no sinks",
        "not used",
        *(line for finding in read_evidence(folder).findings for line in finding.lines),
        *evaluated.SCALING_SENTENCES,
    ):
        assert said in text, said
    trained, other = (text.index(f"At 1024 tokens at evict_bias {bias}, dms holds") for bias in ("+0", "-2"))
    assert trained < text.index("At other operating points") < other < text.index('class="marks"') < text.index('class="facts"')


def test_a_run_with_its_evaluation(tmp_path):
    folder = evaluated.write_run(tmp_path / "run")
    evidence = read_evidence(folder)
    assert {row.suite for row in evidence.rows} == {"the run's own"} and {row.evict_bias for row in evidence.rows} == {None, 0.0}
    assert evidence.conditions.target_cr == 8.0 and len(evidence.metrics) == 120 and "Only the run's own figures" in evidence.missing[0]
    data = read_data(write_evaluation_page(evidence, tmp_path / "own.html"))
    assert len(data["training"]) == 2 and data["profile"] is None and len(data["rows"]["values"]) == len(evidence.rows)

    evaluated.write_evaluation(folder / "evaluation")
    evidence = read_evidence(folder)
    assert len(evidence.rows) == len(evaluated.make_rows()) and len(evidence.metrics) == 120 and evidence.missing == []
    # Named by itself, the evaluation finds the run around it.
    assert len(read_evidence(folder / "evaluation").metrics) == 120
    evaluated.write_evaluation(folder / "second")
    with pytest.raises(ValueError, match="several evaluations: evaluation, second"):
        read_evidence(folder)
    # Traces that a run left serve where the evaluation has none.
    (folder / "report").mkdir()
    (folder / "evaluation" / "traces.json").rename(folder / "report" / "traces.json")
    assert [trace.title for trace in read_evidence(folder / "evaluation").traces] == [f"records, document {n}" for n in (1, 2, 3)]


def test_what_is_missing_is_said(tmp_path):
    folder = evaluated.write_evaluation(tmp_path / "e", scaling=None, profile=None, traces=None, lm_eval=None)
    text = write_evaluation_page(read_evidence(folder), folder / "report.html").read_text(encoding="utf-8")
    missing = text[text.index("What is not here") :]
    for part in ("No hyper-scaling was run", "--scaling", "No profile", "No traces", "--lm-eval", "No training curves"):
        assert part in missing, part
    assert all(f'<div id="{name}">' not in text for name in ("scaling", "heatmap", "positions", "viewer", "training"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "the evaluation has not ended"),
        ({"rows": None, "settings": None}, "neither rows.json"),
        ({"rows": {"rows": [{"policy": "dms", "task": "recall"}]}}, r"row 0: a result row lacks bytes, "),
        (
            {"rows": {"rows": [{**evaluated.make_rows()[0].to_dict(), "marks": ["of_tomorrow"]}]}},
            r"row 0: 'of_tomorrow' is not a valid Mark",
        ),
        ({"rows": {"words": []}}, "no list of rows"),
        ({"settings": {**evaluated.SETTINGS, "format_version": 2}}, "format_version is 2"),
        ({"profile": {"points": []}}, "format_version is None"),
        ({"profile": {"format_version": 1, "points": []}}, r"profile\.json: .*missing"),
        ({"traces": {"format_version": 1, "documents": [{"tokens": []}]}}, "not a trace of this version"),
        ({"lm_eval": [1]}, "holds a list"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, change, message):
    folder = evaluated.write_evaluation(tmp_path / "e", **change)
    with pytest.raises(ValueError, match=message):
        read_evidence(folder)
    assert not (folder / "report.html").exists()


def test_the_command_writes_a_page_and_pictures(small, tmp_path):
    out = tmp_path / "elsewhere" / "page.html"
    done = run(small, "--out", out)
    assert done.exit_code == 0 and out.is_file()
    pictures = {path.name: path.stat().st_size for path in (out.parent / "report").iterdir()}
    assert set(pictures) == {"pareto_1024.png", "pareto_2048.png", "scaling.png", "eviction.png", "positions.png", "document.png"}
    assert min(pictures.values()) > 10_000
    assert re.search(r"page\.html\(0\.\d\dMB\)and6pictures", flat(done.output))
    assert not (small / "report.html").exists()


def test_the_command_refuses_before_it_writes(small, tmp_path):
    for arguments, message in (
        ([tmp_path / "none"], "is not a folder"),
        ([small, "--out", tmp_path], "a folder; name a file"),
        ([small, "--model", tmp_path], "--card is not set"),
        ([small, "--card", "--model", tmp_path], "config.json is missing"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, ValueError) and message in str(done.exception), message
    assert not (small / "report.html").exists()


def test_pareto_charts_are_the_rows():
    rows = [row for row in evaluated.make_rows() if row.suite != "scaling"]
    found = charts.pareto_charts(rows)
    assert len(found) == len({(r.suite, r.task, r.metric, r.length) for r in rows if r.suite != "lm_eval"})
    for chart in found:
        own = [row for row in rows if all(getattr(row, key) == value for key, value in chart.choices.items())]
        assert sum(len(series.points) for series in chart.series) == len(own)
        for series in chart.series:
            by_point = sorted((row for row in own if row.policy == series.name), key=lambda row: row.evict_bias or 0.0)
            for point, row in zip(series.points, by_point, strict=True):
                assert (point.y, point.low, point.high) == pytest.approx((row.value, row.ci_low, row.ci_high), rel=1e-4)
                assert point.x == pytest.approx({name: getattr(row, name) for name in COSTS}, rel=1e-4)
        assert chart.series[0].name == "dms" and [x.key for x in chart.xs] == COSTS
        dense = [row.value for row in own if row.policy == "dense"]
        assert [line.y for line in chart.references] == pytest.approx(dense, rel=1e-4)
    noted = [point.note for chart in found for series in chart.series for point in series.points if series.name == "random"]
    assert any("budget missed" in note for note in noted)


def test_charts_take_gaps():
    dms, other = [row for row in evaluated.make_rows() if row.task == "recall" and row.length == 1024 and row.evict_bias == 0.0][:2]
    unknown = dict.fromkeys(COSTS)
    assert charts.pareto_charts([replace(dms, **unknown)]) == [], "no cost was measured"
    (chart,) = charts.pareto_charts([replace(dms, **unknown | {"reads": 12.0}), replace(other, value=float("nan"))])
    assert [s.name for s in chart.series] == ["dms"] and [x.key for x in chart.xs] == ["reads"] and chart.references == []
    assert charts.training_charts([LoggedStep(step=1)]) == [] and charts.scaling_charts([]) == []


def test_scaling_charts_are_the_rows():
    rows = evaluated.make_scaling()
    found = charts.scaling_charts(rows)
    assert [chart.choices["metric"] for chart in found] == ["pass", "majority"]
    dense, dms = found[0].series
    assert (dense.name, dms.name) == ("dense", "dms")
    assert [point.note for point in dms.points] == [f"k = {k}" for k in (1, 2, 4, 8, 16)]
    own = [row for row in rows if row.policy == "dms" and row.metric.startswith("pass")]
    assert [point.x["entries_read"] for point in dms.points] == pytest.approx([row.entries_read for row in own], rel=1e-4)
    again = [replace(row, evict_bias=1.0) for row in rows if row.policy == "dms"]
    assert [s.name for s in charts.scaling_charts(rows + again)[0].series] == ["dense", "dms, as trained", "dms, evict_bias +1"]


def test_position_charts_have_the_target_beside_them():
    profile = evaluated.make_profile()
    share, ratio = charts.position_charts(profile, 8.0)
    assert share.references[0].y == pytest.approx(7 / 8) and ratio.references[0].y == 8.0
    assert [series.name for series in ratio.series] == ["evict_bias −2", "as trained", "evict_bias +2"]
    assert [point.y for point in ratio.series[1].points] == profile.points[1].cr_at
    assert share.series[0].points[0].x == {"position": 32}
    assert all(chart.references == [] for chart in charts.position_charts(profile, None))


def test_long_runs_are_thinned_and_keep_their_end():
    metrics = [LoggedStep.from_dict({**row, "kl": 0.02 + row["kl"]}) for row in evaluated.make_metrics(5001)]
    ratio, kl = charts.training_charts(metrics)
    for series in (*ratio.series, *kl.series):
        assert len(series.points) <= 402 and series.points[-1].x == {"step": 5001}
    assert kl.y_log is False
    metrics[0] = replace(metrics[0], kl=3.0)
    assert charts.training_charts(metrics)[1].y_log is True


def test_pictures_draw_the_charts(tmp_path, monkeypatch):
    from dms.report import plots

    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or Path(path))
    rows = [row for row in evaluated.make_rows() if row.length == 2048]
    found = charts.headline_charts(charts.pareto_charts(rows), rows)
    assert [chart.choices["suite"] for chart in found] == list(evaluated.SUITES)
    plot_charts(found, tmp_path / "p.png", "my $model$")
    (figure,) = figures
    assert len(figure.axes) == 20 and figure.axes[0].get_xscale() == "log"
    bars = figure.axes[0].containers
    dms = next(c for c, series in zip(bars, found[0].series, strict=True) if series.name == "dms")
    assert list(dms.lines[0].get_xdata()) == [point.x["bytes"] for point in found[0].series[0].points]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(evaluated.POLICIES)
    with pytest.raises(ValueError, match="no charts"):
        plot_charts([], tmp_path / "none.png")


def test_findings_of_what_was_trained_come_first():
    def usual(*biases):
        findings = [Finding(2048, bias, "At 2048 tokens, dms holds 1/6.90 of the entries.", ("It loses.",)) for bias in biases]
        evidence = Evidence(folder=Path(), conditions=Conditions(), findings=findings)
        return [finding.evict_bias for finding in evidence.usual_findings()]

    assert usual(-2.0, 0.0, 2.0) == [0.0]
    assert usual(2.0) == [2.0], "one operating point alone"
    assert usual(-1.0, 2.0, -1.0) == [-1.0, -1.0], "the nearest to what was trained"
    assert usual(None) == [None] and usual() == []


def test_marks_are_said_the_severe_ones_first():
    rows = evaluated.make_rows()
    lines = describe_marks(rows)
    assert [mark.meaning in line for mark, line in zip((Mark.BUDGET_MISSED, Mark.DENSE_AT_CHANCE), lines, strict=False)] == [True, True]
    assert any(line.startswith("chain_2, all policies") for line in lines) and any(line.startswith("4,096 tokens") for line in lines)
    harness = replace(rows[1], policy="dms", task="lm_eval:local", length=None, marks=(Mark.BEYOND_TRAINING,))
    assert describe_marks([harness]) == [f"lm_eval:local, dms (1 of 1 figures): {Mark.BEYOND_TRAINING.meaning}."]
    assert describe_marks([replace(rows[1], marks=())]) == []


def test_a_suite_is_known_by_its_largest_accuracy(tmp_path):
    shape = next(row for row in evaluated.make_rows() if row.policy == "dms")
    counts = (("recall_q2", 30), ("recall", 131), ("copy", 7), ("multi_key", None))
    rows = [replace(shape, suite="records", metric="accuracy", task=task, num_samples=count) for task, count in counts]
    rows += [replace(shape, suite="text", task="text", metric=metric, num_samples=99) for metric in ("bits_per_byte", "kl")]
    assert charts.headlines(rows) == {"records": ("recall", "accuracy"), "text": ("text", "bits_per_byte")}
    folder = evaluated.write_evaluation(tmp_path / "e", rows=evaluated.rows_file(rows))
    tasks = [(row.task, row.metric) for row in read_evidence(folder).rows]
    assert [task for task, _ in tasks] == ["recall", "copy", "multi_key", "recall_q2", "text", "text"] and tasks[-1] == ("text", "kl")

"""The pictures of a run: right sizes, right shades, right numbers, and a page that survives any token."""

import json
import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from dms.report import (
    DocumentTrace,
    document_picture,
    plot_document,
    plot_eviction,
    plot_lifetimes,
    plot_training,
    plots,
    read_metrics,
    write_document_html,
    write_report,
)
from dms.report.run_metrics import LoggedStep

NASTY = [
    "<b>",
    "</script>",
    "</script ",
    "<!--<script ",
    "<!--",
    "&amp;",
    ' "quoted"',
    "'",
    "\n",
    "\n\n    ",
    "\t",
    "$x$",
    " $amber",
    "@DATA@",
    "\\u003c",
    "é漢\u2028",
    "�",
    "",
    "]]>",
]


def make_trace(tokens=None, answers=((1, 2, True), (3, 5, False))):
    """2 layers (3 and 7) of 2 heads; the first token is evicted by all, the second by none, the third by one of four."""
    tokens = list(NASTY) if tokens is None else tokens
    probs = [[[0.01 * ((7 * t + 3 * h + 5 * i) % 100) for t in range(len(tokens))] for h in range(2)] for i in range(2)]
    for i in range(2):
        for h in range(2):
            probs[i][h][:3] = [0.75 + 0.1 * h, 0.25, 0.9 if (i, h) == (1, 0) else 0.5]
            probs[i][h][-1] = None
    return DocumentTrace(tokens=tokens, evict_prob_LHT=probs, layer_indices=[3, 7], answers=answers)


def make_metrics(num_steps, kl=lambda step: 0.01 * step):
    return [LoggedStep(step=s, kl=kl(s), target_cr=1 + s / 10, cr_decided=1 + s / 9) for s in range(1, num_steps + 1)]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, so that a test can look at what was drawn."""
    figures = []
    save = plots.save

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    for module in (plots, document_picture):
        monkeypatch.setattr(module, "save", keep)
    return figures


@pytest.fixture(autouse=True)
def no_warnings():
    # matplotlib warns of missing glyphs and of layouts that do not fit.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def image(path):
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    assert pixels.std() > 0.02, "an empty picture"
    return pixels


def test_import_is_light():
    code = "import sys, dms.report, dms.report.cards, dms.report.evaluation_card; print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_read_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kl": 0.5, "loss": 2}\n\n{"step": 2, "kl": NaN}\n{"step": 3, "k', encoding="utf-8")
    assert read_metrics(path) == [LoggedStep(step=1, kl=0.5), LoggedStep(step=2)]
    path.write_text('{"step": 1}\n{"step"', encoding="utf-8")
    assert read_metrics(path) == [LoggedStep(step=1)]
    path.write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    assert len(read_metrics(path)) == 2
    path.write_text("", encoding="utf-8")
    assert read_metrics(path) == []


@pytest.mark.parametrize("bad", ['{"step": 2, "k', "[1, 2]", "3"])
def test_read_metrics_refuses_bad_lines(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    # A whole last line, with its line end, is not torn.
    path.write_text(f'{{"step": 1}}\n{bad}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_plot_training(tmp_path, drawn):
    metrics = make_metrics(12)
    pixels = image(plot_training(metrics, tmp_path / "a" / "t.png", "my $model$"))
    assert pixels.shape[:2] == (690, 1200)
    (figure,) = drawn
    compression, kl = figure.axes
    lines = {line.get_label(): line for line in [*compression.lines, *kl.lines]}
    assert lines["target CR"].get_ydata() == pytest.approx([row.target_cr for row in metrics])
    assert lines["achieved CR (decided)"].get_ydata() == pytest.approx([row.cr_decided for row in metrics])
    assert lines["KL"].get_ydata() == pytest.approx([row.kl for row in metrics])
    assert lines["KL"].get_xdata() == pytest.approx(range(1, 13))
    assert compression.get_xlabel() == "optimizer step" and "ratio" in compression.get_ylabel() and "nats" in kl.get_ylabel()
    assert "my $model$" in figure.get_suptitle()


@pytest.mark.parametrize(("factor", "scale"), [(9.5, "linear"), (10.5, "log")])
def test_kl_axis_is_logarithmic_beyond_ten(tmp_path, drawn, factor, scale):
    plot_training(make_metrics(5, kl=lambda step: 1 + (factor - 1) * (step - 1) / 4), tmp_path / "t.png")
    assert drawn[0].axes[1].get_yscale() == scale
    assert ("log" in drawn[0].axes[1].get_ylabel()) == (scale == "log")


def test_plot_training_takes_gaps_zeros_and_long_runs(tmp_path, drawn):
    metrics = make_metrics(120, kl=lambda step: 0.0 if step == 1 else 1.0 if step == 60 else 0.01)
    metrics[3] = LoggedStep.from_dict({**vars(metrics[3]), "cr_decided": math.inf})
    metrics[4] = replace(metrics[4], target_cr=None)
    metrics[5] = replace(metrics[5], kl=None)
    image(plot_training(metrics, tmp_path / "t.png"))
    raw, smooth = drawn[0].axes[1].lines
    assert raw.get_ydata()[59] == 1.0
    assert smooth.get_ydata()[59] == pytest.approx(0.01), "the median ignores one spike"
    with pytest.raises(ValueError, match="no metrics"):
        plot_training([], tmp_path / "none.png")


def test_plot_eviction(tmp_path, drawn):
    rates = [[0.0, 0.254], [1.0, 0.777], [0.5, None], [0.126]]
    pixels = image(plot_eviction(rates, tmp_path / "e.png", ["layer 2", "layer 3", "layer 5", "layer 8"]))
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "25", "100", "78", "50", "–", "13", "–"]
    assert [(text.get_position()) for text in axes.texts][:3] == [(0, 0), (1, 0), (0, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 2", "layer 3", "layer 5", "layer 8"]
    assert axes.images[0].get_clim() == (0, 100)
    colours = [axes.images[0].cmap(axes.images[0].norm(v)) for v in (0, 50, 100)]
    brightness = [sum(colour[:3]) for colour in colours]
    assert brightness == sorted(brightness), "read without colour, more eviction is brighter"
    assert pixels.shape[1] > pixels.shape[0] > 350
    # Text can be read: dark on bright, bright on dark.
    assert axes.texts[0].get_color() == "white" and axes.texts[2].get_color() == "black"


def test_plot_eviction_grows_with_the_model(tmp_path):
    small = image(plot_eviction([[0.5]], tmp_path / "1.png")).shape
    large = image(plot_eviction([[0.1 * (h % 10) for h in range(8)]] * 36, tmp_path / "2.png")).shape
    assert large[0] > 4 * small[0] and large[1] > 1.5 * small[1] and max(large) < 4000


def test_plot_eviction_refuses(tmp_path):
    for rates, names, message in (
        ([[]], None, "no layer"),
        ([], None, "no layer"),
        ([[0.5]], ["a", "b"], "2 layer names"),
        ([[1.5]], None, "outside"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_eviction(rates, tmp_path / "e.png", names)


def test_trace_shares():
    trace = make_trace()
    keep = trace.keep_share_T()
    # The threshold itself is not above the threshold.
    assert keep[:3] == [0.0, 1.0, 0.75] and keep[-1] == 1.0
    assert trace.mean_prob_T()[:2] == pytest.approx([0.8, 0.25]) and trace.mean_prob_T()[-1] is None
    flat = [p for layer in trace.evict_prob_LHT for head in layer for p in head if p is not None]
    assert trace.evicted_share() == pytest.approx(sum(p > 0.5 for p in flat) / len(flat))
    assert "1 of 2 answers right" in trace.summary() and "4 KV heads" in trace.summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_indices": [0]}, "2 layers"),
        ({"tokens": ["a"]}, "layer 3 head 0"),
        ({"tokens": []}, "0 tokens"),
        ({"evict_prob_LHT": [[[1.5] * len(NASTY)], []]}, "1.5 is not a probability"),
        ({"evict_prob_LHT": [[[math.nan] * len(NASTY)], []]}, "nan is not a probability"),
        ({"evict_prob_LHT": [[], []]}, "at least one head"),
        ({"answers": [(3, 5, True), (4, 6, True)]}, "overlaps"),
        ({"answers": [(3, 3, True)]}, "empty"),
        ({"answers": [(3, 99, True)]}, "leaves"),
    ],
)
def test_trace_refuses(change, message):
    good = {"tokens": NASTY, "evict_prob_LHT": make_trace().evict_prob_LHT, "layer_indices": [3, 7], "answers": ()}
    with pytest.raises(ValueError, match=message):
        DocumentTrace(**{**good, **change})


def test_plot_document(tmp_path, drawn):
    pixels = image(plot_document(make_trace(), tmp_path / "d.png"))
    assert 1000 < pixels.shape[1] < 2000 and pixels.shape[0] > 250
    axes = drawn[0].axes[0]
    texts = [text.get_text() for text in axes.texts]
    for token in ("<b>", "</script>", "$x$", " $amber"):
        assert token in texts
    fills = axes.collections[0].get_facecolors()
    # One box a token, but a token with two line ends has three.
    evicted, kept, mixed = (sum(fills[i][:3]) for i in range(3))
    assert kept < mixed < evicted, "kept is darker than evicted"
    assert evicted == pytest.approx(3.0)
    kept_text, evicted_text = axes.texts[1].get_color(), axes.texts[0].get_color()
    assert sum(kept_text) < sum(evicted_text)
    right, wrong = axes.collections[1:3]
    assert len(right.get_segments()) == 1 and len(wrong.get_segments()) == 1
    assert tuple(right.get_edgecolors()[0]) != tuple(wrong.get_edgecolors()[0])
    legend = " ".join(text.get_text() for text in drawn[0].axes[1].texts)
    for part in ("kept by all heads", "evicted by all heads", "answered right", "answered wrong", "1 of 2 answers right"):
        assert part in legend


def test_plot_document_wraps_and_cuts(tmp_path, drawn):
    trace = make_trace([f" w{i:03d}" for i in range(1000)], answers=[(500, 501, True), (990, 995, True)])
    pixels = image(plot_document(trace, tmp_path / "d.png", max_tokens=200))
    axes = drawn[0].axes[0]
    words = [text.get_text() for text in axes.texts if text.get_text().startswith(" w")]
    assert words == [f" w{i:03d}" for i in (*range(100), *range(900, 1000))]
    assert any("800 tokens left out" in text.get_text() for text in axes.texts)
    left, right = axes.get_xlim()
    assert all(left <= text.get_position()[0] <= right - 5 for text in axes.texts if text.get_text().startswith(" w"))
    assert pixels.shape[0] < 1200
    rows = {segment[0][1] for segment in axes.collections[1].get_segments()}
    assert len(axes.collections[1].get_segments()) == len(rows) >= 1


def test_plot_document_sets_long_text_in_two_panels(tmp_path, drawn):
    trace = make_trace([text for i in range(120) for text in (f"line {i}", "\n")], answers=())
    pixels = image(plot_document(trace, tmp_path / "d.png"))
    columns = {text.get_position()[0] for text in drawn[0].axes[0].texts if text.get_text().startswith("line")}
    assert len(columns) == 2 and pixels.shape[0] < 2000
    places = {text.get_position() for text in drawn[0].axes[0].texts if text.get_text().startswith("line")}
    assert len(places) == 120, "no two lines in one place"


def read_data(path):
    """The data that the page's scripts draw, as a browser reads it."""
    text = path.read_bytes().decode("utf-8")
    assert text.count("<script") == text.count("</script") == 2, "only the page's own scripts, whatever the tokens say"
    embedded = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not set("<>&") & set(embedded)
    return json.loads(embedded)


def test_html_round_trips_tokens_and_probabilities(tmp_path):
    trace = make_trace()
    (read,) = read_data(write_document_html(trace, tmp_path / "sub" / "d.html"))["traces"]
    assert read["tokens"] == NASTY and read["layer_indices"] == [3, 7] and read["threshold"] == 0.5
    assert read["answers"] == [[1, 2, True], [3, 5, False]] and read["head_indices"] == [[0, 1], [0, 1]]
    again = DocumentTrace.from_dict(read)
    assert again.tokens == trace.tokens and list(again.answers) == list(trace.answers)
    for given, read in zip(trace.evict_prob_LHT, again.evict_prob_LHT, strict=True):
        for a, b in zip(given, read, strict=True):
            assert [p is None for p in b] == [p is None for p in a]
            assert [p or 0.0 for p in b] == pytest.approx([p or 0.0 for p in a], rel=1e-3)
            assert [p is not None and p > 0.5 for p in a] == [p is not None and p > 0.5 for p in b]


def test_html_keeps_decisions_that_rounding_would_turn(tmp_path):
    probs = [0.50000001, 0.5, 0.49999999, 0.123456789, 0.00001, 0.99999, 0.00012344]
    trace = DocumentTrace(tokens=list("abcdefg"), evict_prob_LHT=[[probs]], layer_indices=[0])
    (read,) = read_data(write_document_html(trace, tmp_path / "d.html"))["traces"]
    assert read["evict_prob"][0][0] == [0.50000001, 0.5, 0.5, 0.1235, 0, 1, 0.0001234]


CLASSES = {"windows": (2, 5), "window": 2, "class_LHT": [["2012", "0011"], ["0100", "2222"]]}


def test_a_trace_of_several_windows_says_until_when(tmp_path, drawn):
    probs = [[[0.9 if digit != "0" else 0.1 for digit in row] for row in layer] for layer in CLASSES["class_LHT"]]
    trace = DocumentTrace(tokens=list("abcd"), evict_prob_LHT=probs, layer_indices=[3, 7], **CLASSES)
    assert trace.class_shares() == [4 / 16, 6 / 16]
    assert trace.summary() == "4 tokens, 4 KV heads: 25 % leave after 2, 38 % after 5 tokens, 38 % stay"
    (read,) = read_data(write_document_html(trace, tmp_path / "d.html"))["traces"]
    assert read["windows"] == [2, 5] and read["classes"] == CLASSES["class_LHT"]
    again = DocumentTrace.from_dict(read)
    assert again.class_LHT == trace.class_LHT and list(again.windows) == [2, 5] and again.window == 2
    assert not {"windows", "classes"} & make_trace().to_dict().keys(), "of one window as earlier versions read it"
    small = trace.fitted(4)
    assert (small.class_LHT, small.evict_prob_LHT) == ([["2012"]], [[probs[0][0]]])
    image(plot_document(trace, tmp_path / "d.png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": ()}, "classes where it has several windows"),
        ({"class_LHT": None}, "classes where it has several windows"),
        ({"class_LHT": [["2012"], ["0100", "2222"]]}, "of different heads"),
        ({"class_LHT": [["2012", "0011"], ["0100", "222"]]}, "layer 7 head 1: classes are 4 digits of 012; given '222'"),
        ({"class_LHT": [["2013", "0011"], ["0100", "2222"]]}, "layer 3 head 0: classes are 4 digits of 012; given '2013'"),
    ],
)
def test_classes_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        DocumentTrace(tokens=list("abcd"), evict_prob_LHT=[[[0.5] * 4] * 2] * 2, layer_indices=[3, 7], **{**CLASSES, **change})


def test_lifetimes_are_drawn_by_layer_and_head(tmp_path, drawn):
    share_LHK = [[[0.25, 0.5], [0.0, 1.0], [0.1, 0.2]], [[1.0, 0.0], [0.3, 0.3], [0.0, 0.0]]]
    image(plot_lifetimes(share_LHK, (16, 1024), tmp_path / "l.png", ["layer 3", "layer 7"]))
    *maps, bar = drawn[0].axes
    assert [axes.get_title() for axes in maps] == ["leave after 16 tokens", "leave after 1,024 tokens", "stay"]
    shown = [[int(text.get_text()) for text in axes.texts] for axes in maps]
    assert shown == [[25, 0, 10, 100, 30, 0], [50, 100, 20, 0, 30, 0], [25, 0, 70, 0, 40, 100]]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["layer 3", "layer 7"]
    assert bar.get_ylabel() == "% of tokens"
    for windows, names in (((16,), None), ((16, 24, 32), None), ((16, 24), ["layer 3"])):
        with pytest.raises(ValueError, match="lifetimes need several windows, a share for each and a name for each layer"):
            plot_lifetimes(share_LHK, windows, tmp_path / "l.png", names)


def test_html_needs_no_network_and_fits_phone_and_dark_mode(tmp_path):
    text = write_document_html(make_trace(), tmp_path / "d.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name of SVG, which nothing is fetched from"
    assert not re.search(r"\b(src|href|action)=|@import|url\(", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert not re.search(r"@[A-Z]+@", text.split('id="data"')[0])


def test_html_writes_lone_surrogates_and_nul(tmp_path):
    trace = make_trace(["a\ud800", "\x00", "b", "c"], answers=())
    assert read_data(write_document_html(trace, tmp_path / "d.html"))["traces"][0]["tokens"] == ["a\ud800", "\x00", "b", "c"]
    image(plot_document(trace, tmp_path / "d.png"))


def test_a_trace_of_a_large_model_is_cut_to_size():
    """The end of the document, and some heads, evenly spaced; everything says what it is."""
    probs = [[[((7 * t + 3 * h + 5 * i) % 100) / 100 for t in range(3000)] for h in range(8)] for i in range(12)]
    tokens, answers = [f" w{t}" for t in range(3000)], [(10, 12, True), (2990, 2995, False)]
    trace = DocumentTrace(tokens=tokens, evict_prob_LHT=probs, layer_indices=list(range(4, 16)), answers=answers, prompt=2900)
    small = trace.fitted(60_000)
    assert len(small.tokens) == 2048 and small.first == 952 and small.tokens[-1] == " w2999" and small.prompt == 2900
    assert list(small.answers) == [(2038, 2043, False)]
    assert (
        small.num_heads * len(small.tokens) <= 60_000 and small.layer_indices == [4, 10, 15] and small.head_indices == [list(range(8))] * 3
    )
    assert small.evict_prob_LHT[1][2] == probs[6][2][952:], "layer 10 is the seventh"
    assert small.left_out == "Shown: the last 2,048 of 3,000 tokens, and 24 of 96 KV heads, from 3 of 12 layers."
    one = trace.fitted(3)
    assert one.num_heads == 1 and len(one.tokens) == 3
    assert trace.fitted(10**9).left_out == "" and trace.fitted(10**9).num_heads == 96
    assert len(json.dumps(small.to_dict())) < 9 * 60_000


def test_traces_that_are_no_traces_are_refused():
    saved = make_trace().to_dict()
    assert DocumentTrace.from_dict(saved).layer_indices == [3, 7]
    for change in ({"colour": 1}, {"evict_prob": [[[2.0] * len(NASTY)] * 2] * 2}, {"head_indices": [[0], [0]]}):
        with pytest.raises(ValueError, match=r"colour|2.0 is not|head_indices"):
            DocumentTrace.from_dict({**saved, **change})
    with pytest.raises(ValueError, match="answers"):
        DocumentTrace.from_dict({key: value for key, value in saved.items() if key != "answers"})


def test_write_report(tmp_path):
    paths = write_report(tmp_path, make_metrics(6), [[0.2, 0.4], [0.6, 0.8]], make_trace(), ["layer 3", "layer 7"])
    assert paths == [
        tmp_path / "report" / name for name in ("training.png", "eviction.png", "document.png", "document.html", "traces.json")
    ]
    for path in paths[:3]:
        image(path)
    assert read_data(paths[3])["traces"] == json.loads(paths[4].read_text(encoding="utf-8"))["documents"]

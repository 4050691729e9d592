"""The report in a real browser: it draws, answers to pointer and keyboard, fits a phone, and asks nothing of anyone."""

import os
import shutil
from dataclasses import replace

import evaluated
import pytest

from dms.report import DocumentTrace, write_document_html
from dms.report.evidence import read_evidence
from dms.report.page import write_evaluation_page


def find_browser():
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, filter(None, names))), None)


@pytest.fixture(scope="module")
def browser():
    missing = None
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "the playwright package is missing: scripts/setup_env.sh dev"
    path = find_browser()
    missing = missing or (None if path else "no Chromium: scripts/setup_browser.sh, or set CHROMIUM=/path/to/chromium")
    if missing and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with sync_playwright() as driver:
        # A container's root has no sandbox, and its /dev/shm may be small.
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report_html(tmp_path_factory):
    run = evaluated.write_run(tmp_path_factory.mktemp("browser") / "run")
    evaluated.write_evaluation(run / "evaluation")
    return write_evaluation_page(read_evidence(run), run / "report.html")


@pytest.fixture
def open_page(browser):
    """`open_page(path, **context)`: a page that fails the test at its end if anything went wrong in it or was asked for elsewhere."""
    contexts, troubles = [], []

    def open_it(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
        page.on("request", lambda request: None if request.url == path.as_uri() else troubles.append(f"asked for: {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert troubles == []


def boxes(page, selector):
    return [element.bounding_box() for element in page.query_selector_all(selector)]


def style_of(page, selector, name):
    return page.eval_on_selector(selector, f"e => getComputedStyle(e)[{name!r}]")


def test_every_figure_is_there_and_has_a_size(open_page, report_html):
    page = open_page(report_html)
    page.wait_for_selector("#training svg.chart")
    counts = {"pareto": 4, "positions": 2, "scaling": 2, "training": 2}
    for name, count in counts.items():
        found = boxes(page, f"#{name} svg.chart")
        assert len(found) == count, name
        assert all(box["width"] > 250 and box["height"] > 150 for box in found), (name, found)
        lines = page.eval_on_selector_all(f"#{name} svg.chart", "all => all.map(s => s.querySelectorAll('path, circle.marker').length)")
        assert all(number > 0 for number in lines), (name, lines)
    assert all(box["width"] > 30 and box["height"] > 15 for box in boxes(page, ".heat td")) and len(boxes(page, ".heat td")) == 8
    # All policies, their intervals, and dense as a line and a point.
    assert page.locator("#pareto svg.chart").first.locator(".marker").count() == 3 * 7 + 1
    assert page.locator("#pareto svg.chart").first.locator("line.bar").count() == 3 * 7 + 1
    assert page.locator("#pareto .legend li").all_inner_texts() == ["dms", *evaluated.POLICIES[2:], "dense"]
    assert page.locator("#scaling text.label").first.text_content().startswith("k = ")
    # Words come before everything else, and marks are not to be overlooked.
    words, marks, first = (boxes(page, s)[0]["y"] for s in ("ul.verdict", ".marks", "section"))
    assert words < marks < first
    assert "At 2048 tokens at evict_bias +0" in page.inner_text("header") and "miss the budget" in page.inner_text(".marks")


@pytest.mark.slow
def test_task_and_length_choose_the_curves(open_page, report_html):
    page = open_page(report_html)
    assert page.locator("#pareto [name=length]").input_value() == "2048", "the longest length of training comes first"
    before = page.inner_html("#pareto svg.chart >> nth=0")
    page.select_option("#pareto [name=length]", "4096")
    page.wait_for_selector("#pareto svg.chart >> nth=2")
    after = page.inner_html("#pareto svg.chart >> nth=0")
    assert before != after
    page.select_option("#pareto [name=task]", label="text, bits per byte")
    assert page.locator("#pareto [name=length]").input_value() == "4096", "the length stays"
    page.wait_for_selector("#pareto figure >> nth=2 >> svg.chart")
    assert "bits per byte" in page.inner_text("#pareto figcaption >> nth=0")
    # A task without costs has no curve, and with other tasks nothing breaks.
    assert "lm_eval" not in page.inner_text("#pareto [name=task]")


@pytest.mark.slow
def test_points_of_a_chart_are_told_by_pointer_and_keyboard(open_page, report_html):
    page = open_page(report_html)
    chart = page.locator("#pareto svg.chart").first
    chart.wait_for()
    chart.focus()
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#pareto .said >> nth=0")
    assert first.startswith("dms: 0.9") and "bytes of the cache" in first and "entries" in first
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#pareto .said >> nth=0") != first
    box = chart.locator(".marker").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "dms: 0.9" in page.inner_text("#pareto .said >> nth=0")


@pytest.mark.slow
def test_the_table_filters_sorts_and_tells(open_page, report_html):
    page = open_page(report_html)
    rows = "#results tbody tr:has(td[tabindex]) th"
    tasks = page.locator(rows).all_inner_texts()
    assert len(tasks) == sum(map(len, evaluated.SUITES.values())) + 1
    assert page.locator("#results thead th").all_inner_texts() == ["task", *evaluated.POLICIES]
    cell = page.locator("#results tr:has(th:text-is('recall')) td").nth(2)
    assert "▼" in cell.inner_text() and "–" in cell.inner_text()
    cell.hover()
    told = page.inner_text("#results .said")
    assert (
        told.startswith("sliding_window, recall, accuracy") and "95 % interval" in told and "worse than dense" in told and "budget" in told
    )

    page.select_option("#results [name=table-suite]", "words")
    assert page.locator(rows).all_inner_texts() == ["common_words", "frequent_words"]
    values = [float(text.split()[0]) for text in page.locator("#results tr:has(th) td:nth-child(3) b").all_inner_texts()]
    page.click("#results thead button:text('dms')")
    down = [float(text) for text in page.locator("#results td:nth-child(3) b").all_inner_texts()]
    assert down == sorted(values, reverse=True) and page.locator("th[aria-sort=descending]").count() == 1
    page.click("#results thead button:text('dms')")
    assert [float(text) for text in page.locator("#results td:nth-child(3) b").all_inner_texts()] == sorted(values)

    page.select_option("#results [name=table-suite]", "")
    before = page.inner_text("#results table")
    page.select_option("#results [name=table-point]", "2")
    assert page.inner_text("#results table") != before
    page.select_option("#results [name=table-length]", "4096")
    assert "dense at chance" in page.inner_text("#results table") and "beyond training" in page.inner_text("#results table")
    # One stop of the tab key, then arrows.
    page.locator("#results td[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    second = page.locator(rows).nth(1).inner_text()
    assert page.inner_text("#results .said").startswith(f"dms, {second}, accuracy")


@pytest.mark.slow
def test_the_heat_map_follows_its_choices(open_page, report_html):
    page = open_page(report_html)
    first = page.locator(".heat td").first
    trained, colour = first.inner_text(), style_of(page, ".heat td", "backgroundColor")
    assert trained == "88 %"
    page.select_option("#heatmap [name=heat-point]", "0")
    assert first.inner_text() == "78 %" and style_of(page, ".heat td", "backgroundColor") != colour
    page.select_option("#heatmap [name=heat-kind]", "cr_LH")
    assert float(first.inner_text()) == pytest.approx(1 / (1 - 0.78 * 0.97), abs=0.05)


def shades(page):
    return page.eval_on_selector_all("#doc .t", "all => all.map(s => getComputedStyle(s).backgroundColor + s.className)")


@pytest.mark.slow
def test_the_viewer_shows_what_a_head_keeps(open_page, report_html):
    page = open_page(report_html)
    trace = evaluated.make_trace(1)
    assert "".join(page.locator("#doc .t").all_text_contents()) == "".join(trace.tokens)
    everything = shades(page)
    page.select_option("[name=view]", "1:0")
    one = shades(page)
    assert one != everything
    # Every token as its gate says: head 0 of layer 1.
    probs = trace.evict_prob_LHT[1][0]
    states = page.eval_on_selector_all("#doc .t", "all => all.map(s => [s.classList.contains('out'), s.classList.contains('win')])")
    for t, (out, window) in enumerate(states):
        in_window = len(probs) - 1 - t <= trace.window
        assert window == in_window and out == (probs[t] > 0.5 and not in_window), t
    page.select_option("[name=view]", "2:1")
    assert shades(page) != one
    assert "layer 2, head 1" in page.inner_text("#summary")


@pytest.mark.slow
def test_the_viewer_tells_of_a_token(open_page, report_html):
    page = open_page(report_html)
    trace = evaluated.make_trace(1)
    page.select_option("[name=view]", "1:0")
    t = next(t for t in range(5, 300) if trace.tokens[t] == " value" and trace.evict_prob_LHT[1][0][t] < 0.5)
    page.locator("#doc .t").nth(t).hover()
    told = page.inner_text("#at")
    assert f"kept, eviction probability {trace.evict_prob_LHT[1][0][t]:.4f}" in told and f"token {t}" in told and '" value"' in told
    # What the others decided, head by head; the chosen one is framed.
    heads = page.eval_on_selector_all("#at i", "all => all.map(e => [e.title, e.className])")
    expected = [p for layer in trace.evict_prob_LHT for p in (head[t] for head in layer)]
    assert [float(title.rsplit(", ", 1)[1]) for title, _ in heads] == pytest.approx(expected, abs=1e-4)
    assert [name for _, name in heads].index("chosen") == 2 and [("evicts" in title) for title, _ in heads] == [p > 0.5 for p in expected]
    page.select_option("[name=view]", "")
    assert f"evicted by {sum(p > 0.5 for p in expected)} of 8 heads" in page.inner_text("#at")
    # The keyboard goes on from there.
    page.locator("#doc").focus()
    page.keyboard.press("ArrowRight")
    assert f"token {t + 1}:" in page.inner_text("#at")


@pytest.mark.slow
def test_the_viewer_reads_on_with_the_slider(open_page, report_html):
    page = open_page(report_html)
    page.select_option("[name=view]", "0:0")
    page.eval_on_selector("[name=read]", "e => { e.value = 100; e.dispatchEvent(new Event('input')) }")
    names = page.eval_on_selector_all("#doc .t", "all => all.map(s => s.className)")
    assert all("unread" in name for name in names[100:]) and not any("unread" in name for name in names[:100])
    assert all("win" in name for name in names[83:100]) and not any("win" in name for name in names[:83])
    probs = evaluated.make_trace(1).evict_prob_LHT[0][0]
    gone = sum(p > 0.5 for p in probs[:83])
    assert f"{100 - gone} alive a head, of which the last 17 in the window (CR {100 / (100 - gone):.2f})" in page.inner_text("#summary")


@pytest.mark.slow
def test_the_viewer_shows_until_when_tokens_stay(open_page, tmp_path):
    windows, num_tokens = (4, 10), 30
    classes = ["".join(str((t * 7 + head) % 3) for t in range(num_tokens)) for head in range(2)]
    probs = [[[0.0 if digit == "0" else 0.9 for digit in row] for row in classes]]
    trace = DocumentTrace(
        tokens=[f" w{t}" for t in range(num_tokens)],
        evict_prob_LHT=probs,
        layer_indices=[5],
        window=4,
        windows=windows,
        class_LHT=[classes],
    )
    page = open_page(write_document_html(trace, tmp_path / "d.html"))
    page.select_option("[name=view]", "0:1")
    for read in (3, 8, 20, num_tokens):
        page.eval_on_selector("[name=read]", f"e => {{ e.value = {read}; e.dispatchEvent(new Event('input')) }}")
        states = page.eval_on_selector_all("#doc .t", "all => all.map(s => s.classList.contains('out'))")
        gone = [t < read and classes[1][t] != "0" and read - 1 - t > windows[int(classes[1][t]) - 1] for t in range(num_tokens)]
        assert states == gone, read
        assert f"{read - sum(gone)} alive a head" in page.inner_text("#summary")
    told = {"0": "stays", "1": "leaves after 4 tokens", "2": "leaves after 10 tokens"}
    page.locator("#doc .t").nth(9).hover()
    assert told[classes[1][9]] in page.inner_text("#at")
    page.select_option("[name=view]", "")
    kinds = sorted(told[row[9]] for row in classes)
    assert all(f"{kind} in {kinds.count(kind)}" in page.inner_text("#at") for kind in kinds) and "of 2 heads" in page.inner_text("#at")


@pytest.mark.slow
def test_the_heat_map_shows_lifetimes(open_page, tmp_path):
    run = evaluated.write_run(tmp_path / "run")
    evaluated.write_evaluation(run / "evaluation")
    evidence = read_evidence(run)
    profile = evidence.profile
    points = [
        replace(point, class_LHK=[[[0.75 * rate, 0.25 * rate] for rate in row] for row in point.evicted_LH]) for point in profile.points
    ]
    shown = replace(evidence, profile=replace(profile, window=[16, 64], points=points))
    page = open_page(write_evaluation_page(shown, run / "report.html"))
    first, rate = page.locator(".heat td").first, profile.usual_point().evicted_LH[0][0]
    for kind, share in (("evicted_LH", rate), ("0", 0.75 * rate), ("1", 0.25 * rate), ("stays", 1 - rate)):
        page.select_option("#heatmap [name=heat-kind]", kind)
        assert first.inner_text() == f"{100 * share:.0f} %"
    assert "share that leaves after 64 tokens" in page.inner_text("#heatmap")


@pytest.mark.slow
def test_the_viewer_changes_documents_and_frames_answers(open_page, report_html):
    page = open_page(report_html)
    assert page.locator("#doc mark.yes").count() == 1 and page.locator("#doc mark.no").count() == 1
    first = page.inner_text("#doc")
    page.select_option("[name=document]", "1")
    assert page.inner_text("#doc") != first and page.locator("#doc .t").count() == 400
    assert page.locator("#doc .decoding").count() == 1


@pytest.mark.slow
def test_dark_mode_is_dark_and_can_be_read(open_page, report_html):
    light, dark = open_page(report_html, color_scheme="light"), open_page(report_html, color_scheme="dark")

    def brightness(colour):
        return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3

    for page, paper_is_bright in ((light, True), (dark, False)):
        page.wait_for_selector("#pareto svg.chart text")
        paper = brightness(style_of(page, "body", "backgroundColor"))
        assert (paper > 200) == paper_is_bright and (paper < 60) != paper_is_bright
        inks = [
            brightness(style_of(page, selector, name))
            for selector, name in (("body", "color"), ("svg.chart text", "fill"), (".said", "color"))
        ]
        read = "all => all.map(e => getComputedStyle(e)[e.style.fill === 'none' ? 'stroke' : 'fill'])"
        markers = page.eval_on_selector_all("#pareto path.marker", read)
        assert len(markers) > 40
        inks += map(brightness, markers)
        assert all(abs(ink - paper) > 60 for ink in inks), (paper, inks)


def test_a_phone_scrolls_down_only(open_page, report_html):
    page = open_page(report_html, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.wait_for_selector("#training svg.chart")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.evaluate("innerWidth") == 390
    # The table is wider, and scrolls within its box, with the task in sight.
    assert page.eval_on_selector("#results .scroll", "e => e.scrollWidth > e.clientWidth + 100")
    page.eval_on_selector("#results .scroll", "e => { e.scrollLeft = 300 }")
    assert boxes(page, "#results tbody th[scope=row]")[0]["x"] >= 0
    sizes = page.eval_on_selector_all("svg.chart text", "all => all.map(t => t.getBoundingClientRect().height)")
    assert min(sizes) >= 10, "labels are as large as on a desk"
    token = page.locator("#doc .t").nth(3)
    token.scroll_into_view_if_needed()
    token.tap()
    assert "token 3:" in page.inner_text("#at") and "eviction probability" in page.inner_text("#at")
    for choice in page.query_selector_all("select"):
        if choice.is_visible():
            assert choice.bounding_box()["height"] >= 30, "fingers need room"


@pytest.mark.slow
def test_a_page_with_little_to_show(open_page, tmp_path):
    """No costs, one operating point, no trace: said, not broken."""
    costs = ("bytes", "reads", "step_ms", "entries", "cr", "ci_low", "ci_high", "num_documents", "vs_dense", "vs_dms")
    rows = [
        replace(row, **dict.fromkeys(costs), value={"dense": 1.0, "dms": float("nan"), "h2o": 0.5}[row.policy])
        for row in evaluated.make_rows()
        if row.task == "recall" and row.length == 1024 and row.evict_bias in (None, 0.0) and row.policy in ("dense", "dms", "h2o")
    ]
    content = {"rows": [row.to_dict() for row in rows], "findings": []}
    folder = evaluated.write_evaluation(
        tmp_path / "few", rows=content, settings={"format_version": 1}, scaling=None, profile=None, traces=None, lm_eval=None
    )
    page = open_page(write_evaluation_page(read_evidence(folder), folder / "report.html"))
    assert page.locator("#results tr:has(th[scope=row]:text-is('recall')) td").all_inner_texts() == ["1.000", "–", "0.500"]
    missing = page.inner_text("ul.missing")
    assert all(word in missing for word in ("--scaling", "profile", "traces", "training curves", "--lm-eval"))
    assert page.locator("#pareto").count() == 0 and page.locator("#viewer").count() == 0


@pytest.mark.slow
def test_the_page_of_one_document(open_page, tmp_path):
    trace = DocumentTrace(tokens=["a", "\r\n", " b\nc", "", "</script>"], evict_prob_LHT=[[[0.9, 0.1, None, 0.6, 0.5]]], layer_indices=[5])
    page = open_page(write_document_html(trace, tmp_path / "d.html"))
    assert page.locator("#doc .t").all_text_contents() == ["a", "\n", " b\nc", "∅", "</script>"]
    assert page.eval_on_selector_all("#doc .t", "all => all.map(s => s.classList.contains('out'))") == [True, False, False, True, False]
    page.locator("#doc .t").nth(2).hover()
    assert "undecided (kept)" in page.inner_text("#at")

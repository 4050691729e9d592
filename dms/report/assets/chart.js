// Charts as SVG from the data of dms/report/charts.py, drawn at the width that they get. Arrow keys and pointers go from point to point.
const MARKERS = {dms: "circle", sliding_window: "square", h2o: "up", tova: "diamond", snapkv: "down", keydiff: "plus", random: "cross", dense: "ring", other: "bar",
  random_attention: "square", expected_attention: "up", kvzip: "diamond", ada_snapkv: "down", ada_expected_attention: "up", ada_kvzip: "diamond"};
const DASHES = {dense: "7 4", line1: "7 3", line2: "2 3", line3: "9 3 2 3", line4: "4 2", random: "2 3", random_attention: "2 3",
  expected_attention: "9 3 2 3", ada_snapkv: "7 3", ada_expected_attention: "7 3", ada_kvzip: "7 3"};
const SHAPES = {
  square: r => `M${-r} ${-r}H${r}V${r}H${-r}Z`, up: r => `M0 ${-r}L${r} ${r}H${-r}Z`, down: r => `M0 ${r}L${r} ${-r}H${-r}Z`,
  diamond: r => `M0 ${-1.3 * r}L${1.2 * r} 0L0 ${1.3 * r}L${-1.2 * r} 0Z`, plus: r => `M${-r} 0H${r}M0 ${-r}V${r}`,
  cross: r => `M${-r} ${-r}L${r} ${r}M${-r} ${r}L${r} ${-r}`, bar: r => `M0 ${-r}V${r}`,
};
const styled = style => getComputedStyle(document.documentElement).getPropertyValue("--c-" + style) ? style : "other";
const colour = style => `var(--c-${styled(style)})`;

function marker(style, x, y, r) {
  const shape = MARKERS[styled(style)] || "circle", place = {transform: `translate(${x} ${y})`, class: "marker"};
  if (shape === "circle" || shape === "ring") {
    return drawn("circle", {...place, r: r, style: `fill:${shape === "ring" ? "var(--paper)" : colour(style)};stroke:${colour(style)};stroke-width:2`});
  }
  const open = shape === "plus" || shape === "cross" || shape === "bar";
  return drawn("path", {...place, d: SHAPES[shape](r), style: open ? `fill:none;stroke:${colour(style)};stroke-width:2.4` : `fill:${colour(style)}`});
}

// Ticks at 1, 2, 5 times a power of ten, on a logarithmic axis too.
function ticks(low, high, log, most) {
  if (log) {
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const step of steps) { const value = step * 10 ** power; if (value >= low * .999 && value <= high * 1.001) found.push(value); }
      if (found.length <= most && found.length > 1) return found;
    }
  }
  const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find(factor => factor * unit >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

function scale(values, log, pad, pixelLow, pixelHigh, bounds) {
  const to = log ? Math.log : x => x, from = log ? Math.exp : x => x;
  let low = to(Math.min(...values)), high = to(Math.max(...values));
  const room = (high - low) * pad || Math.abs(high) * .1 || .1;
  low -= room; high += room;
  if (bounds) { low = Math.max(low, bounds[0]); high = Math.min(high, bounds[1]); }
  return {low: from(low), high: from(high), at: value => pixelLow + (to(value) - low) / (high - low) * (pixelHigh - pixelLow)};
}

function pointText(chart, axis, series, point) {
  const between = known(point.low) && known(point.high) ? ` (${short(point.low, chart.y.unit)} to ${short(point.high, chart.y.unit)})` : "";
  return `${series.name}: ${short(point.y, chart.y.unit)}${between} at ${short(point[axis.key])} · ${axis.label}${point.note ? " · " + point.note : ""}`;
}

function chartFigure(chart, key, title) {
  const axis = chart.xs.find(x => x.key === key) || chart.xs[0];
  const box = element("div"), said = element("p", {class: "said", role: "status"}, "");
  const figure = element("figure", {"data-x": axis.key}, element("figcaption", {}, title || chart.title, element("small", {}, chart.y.label + (chart.y.log ? " (log)" : ""))),
    box, element("p", {class: "axis"}, axis.label + (axis.log ? " (log)" : "")), said);
  let width = 0;
  const redraw = () => {
    const now = Math.floor(box.clientWidth);
    if (now < 50 || now === width) return;
    width = now;
    box.replaceChildren(drawChart(chart, axis, width, said));
  };
  new ResizeObserver(redraw).observe(box);
  return figure;
}

function drawChart(chart, axis, width, said) {
  const height = Math.round(Math.min(380, Math.max(230, width * .66)));
  const left = 50, right = width - 14, top = 10, bottom = height - 24;
  const svg = drawn("svg", {class: "chart", viewBox: `0 0 ${width} ${height}`, height: height, role: "img", tabindex: 0,
    "aria-label": `${chart.title}: ${chart.y.label} against ${axis.label}; arrow keys go from point to point`});
  const usable = p => known(p.y) && known(p[axis.key]) && (!axis.log || p[axis.key] > 0) && (!chart.y.log || p.y > 0);
  const all = chart.series.map(s => ({...s, points: s.points.filter(usable)}));
  const points = all.flatMap(s => s.points);
  if (!points.length) {
    svg.append(drawn("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "not measured"));
    return svg;
  }
  const references = chart.references.filter(r => known(r.y));
  const ends = [...points, ...references].flatMap(p => [p.y, p.low, p.high]).filter(v => known(v) && (!chart.y.log || v > 0));
  const y = scale(ends, chart.y.log, .06, bottom, top, chart.y.unit === "share" ? [-.03, 1.03] : null);
  const x = scale(points.map(p => p[axis.key]), axis.log, chart.series.some(s => s.markers) ? .07 : .01, left, right);

  for (const value of ticks(y.low, y.high, chart.y.log, 6)) {
    svg.append(drawn("line", {class: "grid", x1: left, x2: right, y1: y.at(value), y2: y.at(value)}));
    svg.append(drawn("text", {x: left - 6, y: y.at(value) + 4, "text-anchor": "end"}, short(value)));
  }
  for (const value of ticks(x.low, x.high, axis.log, width < 400 ? 4 : 6)) {
    svg.append(drawn("line", {class: "frame", x1: x.at(value), x2: x.at(value), y1: bottom, y2: bottom + 4}));
    svg.append(drawn("text", {x: x.at(value), y: bottom + 17, "text-anchor": "middle"}, short(value)));
  }
  svg.append(drawn("line", {class: "frame", x1: left, x2: right, y1: bottom, y2: bottom}));

  for (const line of references) {
    if (known(line.low) && known(line.high))
      svg.append(drawn("rect", {x: left, width: right - left, y: y.at(line.high), height: Math.max(1, y.at(line.low) - y.at(line.high)), style: `fill:${colour(line.style)};opacity:.09`}));
    svg.append(drawn("line", {x1: left, x2: right, y1: y.at(line.y), y2: y.at(line.y), style: `stroke:${colour(line.style)};stroke-width:1.5;stroke-dasharray:7 4`}));
  }
  const targets = [];
  // The first stands before the others where they meet.
  for (const series of all.slice().reverse()) {
    const place = p => [x.at(p[axis.key]), y.at(p.y)], stroke = colour(series.style);
    if (series.points.length > 1)
      svg.append(drawn("path", {d: "M" + series.points.map(p => place(p).map(v => v.toFixed(1)).join(" ")).join("L"),
        style: `fill:none;stroke:${stroke};stroke-width:${series.style === "dms" || !series.markers ? 2.2 : 1.4};stroke-linejoin:round;stroke-dasharray:${DASHES[series.style] || "none"}`}));
    for (const point of series.points) {
      const [px, py] = place(point);
      if (known(point.low) && known(point.high))
        svg.append(drawn("line", {class: "bar", x1: px, x2: px, y1: y.at(Math.max(point.low, y.low)), y2: y.at(Math.min(point.high, y.high)), style: `stroke:${stroke};stroke-width:1.4;opacity:.75`}));
      if (series.markers) svg.append(marker(series.style, px, py, 4.6));
      if (series.labels) svg.append(drawn("text", {class: "label", x: px + (px > right - 50 ? -7 : 7), y: py - 7, "text-anchor": px > right - 50 ? "end" : "start"}, point.note));
      targets.push({px: px, py: py, text: pointText(chart, axis, series, point)});
    }
  }
  attachPointer(svg, targets.reverse(), width, said);
  return svg;
}

function attachPointer(svg, targets, width, said) {
  const ring = drawn("circle", {class: "at", r: 8, visibility: "hidden"});
  let at = -1;
  svg.append(ring);
  const show = index => {
    at = (index + targets.length) % targets.length;
    ring.setAttribute("visibility", "visible");
    ring.setAttribute("cx", targets[at].px);
    ring.setAttribute("cy", targets[at].py);
    said.textContent = targets[at].text;
  };
  const nearest = event => {
    const box = svg.getBoundingClientRect(), factor = width / box.width;
    const px = (event.clientX - box.left) * factor, py = (event.clientY - box.top) * factor;
    const distances = targets.map(t => (t.px - px) ** 2 + (t.py - py) ** 2);
    show(distances.indexOf(Math.min(...distances)));
  };
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    show(at < 0 && step < 0 ? targets.length - 1 : at + step);
  });
}

function legend(charts) {
  const seen = new Map();
  for (const chart of charts) for (const s of [...chart.series, ...chart.references]) if (!seen.has(s.name)) seen.set(s.name, s);
  const list = element("ul", {class: "legend"});
  for (const s of seen.values()) {
    const swatch = drawn("svg", {viewBox: "0 0 30 12", "aria-hidden": "true"});
    swatch.append(drawn("line", {x1: 0, x2: 30, y1: 6, y2: 6, style: `stroke:${colour(s.style)};stroke-width:2;stroke-dasharray:${DASHES[s.style] || "none"}`}));
    if (s.markers) swatch.append(marker(s.style, 15, 6, 4.4));
    list.append(element("li", {}, swatch, s.name));
  }
  return list;
}

// Charts of one kind. The reader chooses one by task and length; it is drawn once for each cost.
function chooseCharts(id, charts, preferredLength) {
  const box = document.getElementById(id);
  if (!box || !charts || !charts.length) return;
  const keyOf = c => JSON.stringify([c.choices.suite, c.choices.task, c.choices.metric]);
  const nameOf = c => c.choices.task === c.choices.metric || c.choices.metric === "accuracy" ? c.choices.task : `${c.choices.task}, ${c.y.label}`;
  const choices = element("div", {class: "choices"}), holder = element("div");
  const first = charts.find(c => c.choices.metric === "accuracy") || charts[0];
  const seen = unique(charts.map(keyOf)).map(key => charts.find(c => keyOf(c) === key));
  const task = chooser(choices, "task", "task", seen.map(c => [keyOf(c), nameOf(c), c.choices.suite]), keyOf(first));
  const length = chooser(choices, "document", "length", []);
  const draw = () => {
    const chart = charts.find(c => keyOf(c) === task.value && String(c.choices.length) === length.value);
    holder.replaceChildren(legend([chart]), element("div", {class: "charts"}, ...chart.xs.map(x => chartFigure(chart, x.key, `${chart.choices.task}, by ${x.name}`))));
  };
  const update = () => {
    const lengths = charts.filter(c => keyOf(c) === task.value).map(c => c.choices.length);
    const numbers = lengths.filter(known);
    setOptions(length, lengths.map(value => [String(value), lengthName(value)]), String(numbers.length ? nearestTo(numbers, preferredLength) : lengths[0]));
    draw();
  };
  task.addEventListener("change", update);
  length.addEventListener("change", draw);
  box.append(choices, holder);
  update();
}

function showCharts(id, charts) {
  const box = document.getElementById(id);
  if (!box || !charts || !charts.length) return;
  const holder = element("div", {class: "charts"});
  for (const chart of charts) {
    const figure = chartFigure(chart, chart.xs[0].key);
    figure.append(legend([chart]));
    holder.append(figure);
  }
  box.append(holder);
}

chooseCharts("pareto", data.pareto, data.length);
chooseCharts("scaling", data.scaling, data.length);
showCharts("positions", data.positions);
showCharts("training", data.training);

// The results: tasks down, policies across, at one length and operating point. A cell's details are shown at a pointer, a tap or a key.
(function () {
  const box = document.getElementById("results");
  if (!box || !data.rows) return;
  const rows = data.rows.values.map(values => Object.fromEntries(data.rows.columns.map((name, i) => [name, values[i]])));
  const policies = unique(rows.map(r => r.policy)).sort((a, b) => rank(a) - rank(b));
  const lengths = unique(rows.map(r => r.length).filter(known)).sort((a, b) => a - b);
  const points = unique(rows.map(r => r.evict_bias).filter(known)).sort((a, b) => a - b);
  const suites = unique(rows.map(r => r.suite));
  const SIGNS = {better: "▲", worse: "▼", "not different": "≈"};

  const choices = element("div", {class: "choices"});
  const length = chooser(choices, "document", "table-length", lengths.map(l => [String(l), lengthName(l)]), String(nearestTo(lengths, data.length)));
  const point = chooser(choices, "operating point", "table-point", points.map(p => [String(p), pointName(p)]), String(nearestTo(points, 0)));
  const suite = chooser(choices, "suite", "table-suite", [["", "all"], ...suites.map(s => [s, s])], "");
  const beside = chooser(choices, "differences from", "table-beside", [["vs_dense", "dense"], ["vs_dms", "dms"]], "vs_dense");
  const table = element("table", {class: "results"});
  const said = element("p", {class: "said", role: "status"}, "Point at a figure, tap it, or go to it with the arrow keys to see its interval, samples and costs.");
  let sorted = null;

  // A line may break after an underscore, where words begin.
  function breakable(name) { return name.split(/(?<=_)/).flatMap((part, i) => i ? [element("wbr"), part] : [part]); }
  function rank(policy) { return policy === "dense" ? 0 : policy === "dms" ? 1 : 2; }
  function chosen() {
    return rows.filter(r => (!known(r.length) || String(r.length) === length.value) && (!suite.value || r.suite === suite.value)
      && (!known(r.evict_bias) || String(r.evict_bias) === point.value));
  }
  const unitOf = metric => metric === "accuracy" || metric === "top1_agreement" || /^(pass|majority)@/.test(metric) ? "share" : "figure";
  const lower = metric => metric === "bits_per_byte" || metric === "kl";

  function details(r) {
    const unit = unitOf(r.metric), parts = [`${r.policy}, ${r.task}, ${r.metric} ${short(r.value, unit)}`];
    if (known(r.ci_low) && known(r.ci_high)) parts.push(`95 % interval ${short(r.ci_low, unit)} to ${short(r.ci_high, unit)}`);
    for (const [name, key] of [["dense", "vs_dense"], ["dms", "vs_dms"]]) {
      const d = r[key];
      if (d) parts.push(`${d.verdict} ${d.verdict === "not different" ? "from" : "than"} ${name}: ${signed(d.difference, unit)}` +
        (known(d.ci_low) && known(d.ci_high) ? ` (${signed(d.ci_low, unit)} to ${signed(d.ci_high, unit)})` : ""));
    }
    for (const [name, key] of [["samples", "num_samples"], ["documents", "num_documents"], ["budget", "budget"], ["entries alive", "entries"], ["in the mean", "entries_mean"], ["at most", "peak_entries"],
      ["reads a token", "reads"], ["CR", "cr"], ["CR in the mean", "cr_mean"], ["CR decided", "cr_decided"], ["bytes", "bytes"], ["ms a step", "step_ms"], ["guessing gives", "chance"], ["memory", "memory"]])
      if (known(r[key]) && r[key] !== "") parts.push(`${name} ${typeof r[key] === "number" ? short(r[key]) : r[key]}`);
    for (const mark of r.marks || []) parts.push(`marked: ${data.mark_texts[mark] || mark}`);
    return parts.join(" · ");
  }

  function cell(r, best) {
    if (!r) return element("td", {}, "–");
    const unit = unitOf(r.metric), td = element("td", {tabindex: -1, class: best ? "best" : null}, element("b", {}, short(r.value, unit)));
    if (known(r.ci_low) && known(r.ci_high)) td.append(element("small", {}, `${short(r.ci_low, unit)} – ${short(r.ci_high, unit)}`));
    const d = r[beside.value];
    if (d) td.append(element("small", {class: d.verdict}, `${SIGNS[d.verdict] || "?"} ${signed(d.difference, unit)}`));
    for (const mark of r.marks || []) td.append(element("span", {class: "mark", title: data.mark_texts[mark] || mark}, mark.replaceAll("_", " ")));
    td.row = r;
    return td;
  }

  // A policy's costs are the same for all figures of a suite, which come from the same documents.
  function costs(group) {
    const of = (policy, key) => group.map(r => r.policy === policy ? r[key] : null).find(known);
    const lines = [
      ["entries alive (CR)", policy => known(of(policy, "entries")) ? short(of(policy, "entries")) + (known(of(policy, "cr")) ? ` (${short(of(policy, "cr"))}×)` : "") : known(of(policy, "cr")) ? short(of(policy, "cr")) + "×" : null],
      ["in the mean (CR)", policy => known(of(policy, "entries_mean")) ? short(of(policy, "entries_mean")) + (known(of(policy, "cr_mean")) ? ` (${short(of(policy, "cr_mean"))}×)` : "") : null],
      ["bytes", policy => known(of(policy, "bytes")) ? short(of(policy, "bytes")) : null],
      ["reads a token", policy => known(of(policy, "reads")) ? short(of(policy, "reads")) : null],
      ["ms a step", policy => known(of(policy, "step_ms")) ? short(of(policy, "step_ms")) : null],
    ];
    return lines.map(([name, text]) => [name, policies.map(text)]).filter(([, texts]) => texts.some(known))
      .map(([name, texts]) => element("tr", {class: "cost"}, element("th", {scope: "row"}, name), ...texts.map(t => element("td", {}, t || "–"))));
  }

  function draw() {
    const shown = chosen(), head = element("tr", {}, element("th", {scope: "col"}, "task"));
    for (const policy of policies) {
      const button = element("button", {type: "button", title: "sort by this policy"}, policy, sorted && sorted.policy === policy ? (sorted.down ? " ↓" : " ↑") : "");
      button.addEventListener("click", () => { sorted = sorted && sorted.policy === policy ? (sorted.down ? {policy: policy, down: false} : null) : {policy: policy, down: true}; draw(); });
      head.append(element("th", {scope: "col", "aria-sort": sorted && sorted.policy === policy ? (sorted.down ? "descending" : "ascending") : "none"}, button));
    }
    const body = element("tbody");
    for (const name of unique(shown.map(r => r.suite))) {
      const group = shown.filter(r => r.suite === name);
      const documents = group.map(r => r.num_documents).find(known);
      body.append(element("tr", {class: "suite"}, element("th", {scope: "rowgroup"}, name), element("td", {colspan: policies.length}, known(documents) ? `${documents} documents` : "")));
      let tasks = unique(group.map(r => JSON.stringify([r.task, r.metric])));
      const valueOf = (task, policy) => { const r = group.find(g => JSON.stringify([g.task, g.metric]) === task && g.policy === policy); return r && known(r.value) ? r.value : -Infinity; };
      if (sorted) tasks = tasks.sort((a, b) => (valueOf(b, sorted.policy) - valueOf(a, sorted.policy) || 0) * (sorted.down ? 1 : -1));
      for (const task of tasks) {
        const of = policies.map(policy => group.find(r => JSON.stringify([r.task, r.metric]) === task && r.policy === policy));
        const [taskName, metric] = JSON.parse(task), others = of.filter(r => r && r.policy !== "dense" && known(r.value)).map(r => r.value);
        const best = others.length > 1 ? (lower(metric) ? Math.min(...others) : Math.max(...others)) : null;
        body.append(element("tr", {}, element("th", {scope: "row"}, ...breakable(taskName), metric === "accuracy" ? null : element("small", {}, metric.replaceAll("_", " "))),
          ...of.map(r => cell(r, r && r.policy !== "dense" && r.value === best))));
      }
      body.append(...costs(group));
    }
    table.replaceChildren(element("caption", {hidden: ""}, "Results by task and policy"), element("thead", {}, head), body);
    const first = table.querySelector("td[tabindex]");
    if (first) first.tabIndex = 0;
  }

  function tell(td) { if (td && td.row) said.textContent = details(td.row); }
  table.addEventListener("pointermove", event => tell(event.target.closest("td")));
  table.addEventListener("click", event => tell(event.target.closest("td")));
  table.addEventListener("focusin", event => tell(event.target.closest("td")));
  // One stop of the tab key; arrows go from cell to cell.
  table.addEventListener("keydown", event => {
    const td = event.target.closest("td[tabindex]");
    if (!td || !event.key.startsWith("Arrow")) return;
    const grid = Array.from(table.querySelectorAll("tbody tr")).map(tr => Array.from(tr.children)).filter(cells => cells.some(c => c.row));
    const line = grid.findIndex(cells => cells.includes(td)), column = grid[line].indexOf(td);
    const next = event.key === "ArrowDown" ? (grid[line + 1] || [])[column] : event.key === "ArrowUp" ? (grid[line - 1] || [])[column]
      : event.key === "ArrowRight" ? grid[line][column + 1] : grid[line][column - 1];
    event.preventDefault();
    if (next && next.row) { td.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  });
  for (const select of [length, point, suite, beside]) select.addEventListener("change", draw);
  for (const select of [length, point]) if (select.options.length < 2) select.parentElement.hidden = true;
  box.append(choices, element("div", {class: "scroll"}, table), said);
  draw();
})();

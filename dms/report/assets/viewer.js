// One document, token by token: what all heads, a layer or one head keep once it has been read up to a chosen position.
(function () {
  const box = document.getElementById("viewer"), traces = data.traces;
  if (!box || !traces || !traces.length) return;
  const choices = element("div", {class: "choices"});
  const which = chooser(choices, "document", "document", traces.map((t, i) => [String(i), t.title || "document " + (i + 1)]), "0");
  const view = chooser(choices, "shown", "view", []);
  const upTo = element("input", {type: "range", name: "read", min: 1, step: 1});
  const upToSaid = element("span", {}, "");
  choices.append(element("label", {}, upToSaid, upTo));
  const summary = element("p", {id: "summary"}), leftOut = element("p", {class: "soft"});
  const doc = element("div", {id: "doc", class: "doc", tabindex: 0, "aria-label": "the document; arrow keys go from token to token"});
  const at = element("div", {class: "at-token", id: "at", role: "status"}, "Point at a token, tap it, or go there with the arrow keys.");
  const decoding = element("span", {}, element("span", {class: "t decoding", style: "background:none"}), " decoded one by one from here on.");
  const key = element("p", {class: "soft key"}, element("span", {class: "t"}, "Tinted"), ": kept. ", element("span", {class: "t out", style: "--e:1;--k:0"}, "Struck"),
    ": evicted by all heads shown. ", element("span", {class: "t win"}, "Underlined"), ": still in the window, seen by all. ", element("mark", {}, "Framed"), ": answered right. ",
    element("mark", {class: "no"}, "Dashed"), ": answered wrong. ", decoding);
  let trace = null, spans = [], counts = [], current = -1;
  if (traces.length < 2) which.parentElement.hidden = true;

  function token(text, i) {
    const span = element("span", {class: i === trace.prompt - trace.first && i > 0 ? "t decoding" : "t"});
    const lines = (text || "∅").replaceAll("\r\n", "\n").split("\n");
    lines.forEach((line, n) => { if (n) span.append(element("i", {class: "n"}), "\n"); if (line) span.append(line); });
    if (text && !text.trim()) span.classList.add("blank");
    return span;
  }
  function open() {
    trace = traces[Number(which.value)];
    const opens = new Map(trace.answers.map(([start, end, right]) => [start, [end, right]]));
    spans = trace.tokens.map(token);
    const parts = [];
    for (let i = 0; i < spans.length;) {
      if (!opens.has(i)) { parts.push(spans[i++]); continue; }
      const [end, right] = opens.get(i);
      parts.push(element("mark", {class: right ? "yes" : "no", title: right ? "answered right" : "answered wrong"}, ...spans.slice(i, end)));
      i = end;
    }
    doc.replaceChildren(...parts);
    const options = [["", "all heads"]];
    trace.layer_indices.forEach((layer, l) => {
      options.push([l + ":", `layer ${layer}, all heads`, `layer ${layer}`]);
      trace.head_indices[l].forEach((head, h) => options.push([l + ":" + h, `layer ${layer}, head ${head}`, `layer ${layer}`]));
    });
    setOptions(view, options, "");
    upTo.max = spans.length;
    upTo.value = spans.length;
    current = -1;
    decoding.hidden = !(trace.prompt > trace.first);
    leftOut.textContent = trace.left_out;
    leftOut.hidden = !trace.left_out;
    choose();
  }
  // How long an evicted token stays, by its class: class k, from 1 on, is seen by the windows[k - 1] queries after it.
  const windowsOf = t => t.windows || [known(t.window) ? t.window : -1];
  const classOf = (l, h, i) => trace.classes ? Number(trace.classes[l][h][i]) : Number(trace.evict_prob[l][h][i] !== null && trace.evict_prob[l][h][i] > trace.threshold);
  const staying = c => c === 0 ? "stays" : `leaves after ${windowsOf(trace)[c - 1].toLocaleString("en")} tokens`;
  function heads() {
    const [layer, head] = view.value.split(":"), found = [];
    trace.evict_prob.forEach((rows, l) => rows.forEach((_, h) => {
      if (view.value === "" || (String(l) === layer && (head === "" || String(h) === head))) found.push([l, h]);
    }));
    return found;
  }
  function choose() {
    const shown = heads();
    counts = spans.map((_, i) => {
      const by = [0, ...windowsOf(trace).map(() => 0)];
      let said = 0, sum = 0;
      for (const [l, h] of shown) { const p = trace.evict_prob[l][h][i]; if (p !== null) { said++; sum += p; by[classOf(l, h, i)]++; } }
      return {by: by, out: said - by[0], said: said, mean: said ? sum / said : null, heads: shown.length};
    });
    draw();
  }
  // Heads for which a token is gone once it has been read up to the slider.
  function lostAt(i) {
    const age = Number(upTo.value) - 1 - i;
    return counts[i].by.slice(1).reduce((sum, n, k) => sum + (age > windowsOf(trace)[k] ? n : 0), 0);
  }
  function stateOf(i) {
    const last = Number(upTo.value) - 1;
    if (i > last) return "unread";
    if (known(trace.window) && last - i <= trace.window) return "win";
    return trace.first + i < trace.sinks ? "sink" : "decided";
  }
  function draw() {
    let alive = 0, window = 0, gone = 0;
    const read = Number(upTo.value), number = counts.length ? counts[0].heads : 1;
    spans.forEach((span, i) => {
      const state = stateOf(i), lost = state === "decided" ? lostAt(i) : 0, share = counts[i].said ? lost / counts[i].said : 0;
      span.style.setProperty("--e", share.toFixed(3));
      // A token that only one of eight heads keeps must still look kept.
      span.style.setProperty("--k", ((1 - share) ** .6).toFixed(3));
      span.classList.toggle("out", share === 1);
      span.classList.toggle("win", state === "win");
      span.classList.toggle("unread", state === "unread");
      if (state === "unread") return;
      if (state === "win") window++;
      gone += lost;
      alive += number - lost;
    });
    const position = trace.first + read, percent = 100 * gone / (number * read);
    upToSaid.textContent = `read up to token ${position.toLocaleString("en")}`;
    const right = trace.answers.filter(a => a[2]).length;
    summary.textContent = `${view.selectedOptions[0].textContent}, ${read.toLocaleString("en")} tokens read: ${percent.toFixed(0)} % of the entries evicted, ` +
      `${(alive / number).toFixed(0)} alive a head${window ? `, of which the last ${window} in the window` : ""} (CR ${(number * read / alive).toFixed(2)})` +
      (trace.answers.length ? `; ${right} of ${trace.answers.length} answers right` : "") + ".";
    if (current >= 0) tell(current);
  }
  function tell(i) {
    if (current >= 0) spans[current].classList.remove("at");
    spans[i].classList.add("at");
    current = i;
    const c = counts[i], state = stateOf(i);
    const until = c.by.map((n, k) => n ? `${staying(k)} in ${n}` : null).filter(known);
    const decided = c.mean === null ? "undecided (kept)" : trace.classes
      ? c.heads === 1 ? `${staying(c.by.findIndex(n => n))}, highest eviction probability ${c.mean.toFixed(4)}`
        : `${until.join(", ")} of ${c.said} heads; gone now for ${state === "decided" ? lostAt(i) : 0}`
      : c.heads === 1
      ? `${c.out ? "evicted" : "kept"}, eviction probability ${c.mean.toFixed(4)}`
      : `evicted by ${c.out} of ${c.said} heads, mean eviction probability ${c.mean.toFixed(4)}`;
    const where = state === "win" ? "in the window still; decided: " : state === "unread" ? "not read yet; will be " : state === "sink" ? "a sink, kept whatever is decided: " : "";
    const list = element("div", {class: "heads"});
    const [layerShown, headShown] = view.value.split(":");
    trace.evict_prob.forEach((layer, l) => {
      const group = element("span", {}, "layer " + trace.layer_indices[l]);
      layer.forEach((head, h) => {
        const p = head[i], out = p !== null && p > trace.threshold;
        const chosen = view.value !== "" && String(l) === layerShown && (headShown === "" || String(h) === headShown);
        group.append(element("i", {style: `--e:${out ? 1 : 0}`, class: chosen ? "chosen" : null, title: `head ${trace.head_indices[l][h]}: ${p === null ? "undecided" : (trace.classes ? staying(classOf(l, h, i)) : out ? "evicts" : "keeps") + ", " + p.toFixed(4)}`}));
      });
      list.append(group);
    });
    at.replaceChildren(`${JSON.stringify(trace.tokens[i])}, token ${(trace.first + i).toLocaleString("en")}: ${where}${decided}. By head, filled keeps:`, list);
  }
  const point = event => { const span = event.target.closest(".t"); if (span && doc.contains(span)) tell(spans.indexOf(span)); };
  // Not "pointerover": scrolling by keyboard moves tokens under a pointer that rests.
  doc.addEventListener("pointermove", point);
  doc.addEventListener("click", point);
  doc.addEventListener("keydown", event => {
    const next = {ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: spans.length - 1}[event.key];
    if (next === undefined) return;
    event.preventDefault();
    tell(Math.min(spans.length - 1, Math.max(0, next)));
    spans[current].scrollIntoView({block: "nearest"});
  });
  which.addEventListener("change", open);
  view.addEventListener("change", choose);
  upTo.addEventListener("input", draw);
  // A token's details stay in view beside the document and cover nothing.
  box.append(choices, summary, leftOut, key, element("div", {}, doc, at));
  open();
})();

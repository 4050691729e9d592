// Layers down, KV heads across; with several windows also the share of tokens that leaves by each. The colours are cividis, which differ in brightness as well.
(function () {
  const box = document.getElementById("heatmap"), profile = data.profile;
  if (!box || !profile) return;
  const STOPS = [[0, 32, 76], [53, 69, 108], [102, 105, 112], [148, 142, 119], [202, 186, 106], [255, 234, 70]];
  const windows = profile.windows || [], kinds = [["evicted_LH", windows.length ? "share of tokens that leave" : "share of tokens evicted"]];
  windows.forEach((w, k) => kinds.push([String(k), `share that leaves after ${w.toLocaleString("en")} tokens`]));
  if (windows.length) kinds.push(["stays", "share that stays"]);
  kinds.push(["cr_LH", "compression ratio, window included"]);
  function valuesOf(p) {
    if (p[kind.value]) return p[kind.value];
    if (kind.value === "stays") return p.evicted_LH.map(row => row.map(v => known(v) ? Math.max(0, 1 - v) : v));
    return p.class_LHK.map(layer => layer.map(shares => shares[Number(kind.value)]));
  }
  const choices = element("div", {class: "choices"});
  const point = chooser(choices, "operating point", "heat-point", profile.points.map((p, i) => [String(i), pointName(p.evict_bias)]),
    String(profile.points.findIndex(p => p.evict_bias === nearestTo(profile.points.map(q => q.evict_bias), 0))));
  const kind = chooser(choices, "shown", "heat-kind", kinds, "evicted_LH");
  const table = element("table", {class: "heat"}), key = element("p", {class: "soft"});
  function colourOf(share) {
    const place = Math.min(.9999, Math.max(0, share)) * (STOPS.length - 1), i = Math.floor(place), f = place - i;
    return STOPS[i].map((low, c) => Math.round(low + f * (STOPS[i + 1][c] - low)));
  }
  function draw() {
    const p = profile.points[Number(point.value)], values = valuesOf(p), isShare = kind.value !== "cr_LH";
    const top = isShare ? 1 : Math.max(...values.flat().filter(known)), bottom = isShare ? 0 : 1, columns = Math.max(...values.map(row => row.length));
    const head = element("tr", {}, element("th", {scope: "col"}, "layer"), ...Array.from({length: columns}, (_, h) => element("th", {scope: "col"}, columns > 12 ? String(h) : "head " + h)));
    const rows = values.map((row, i) => element("tr", {}, element("th", {scope: "row"}, String(p.layer_indices[i])), ...row.map((value, h) => {
      if (!known(value)) return element("td", {}, "–");
      const rgb = colourOf(top > bottom ? (value - bottom) / (top - bottom) : 0), dark = .299 * rgb[0] + .587 * rgb[1] + .114 * rgb[2] < 125;
      return element("td", {style: `background:rgb(${rgb});color:${dark ? "#fff" : "#000"}`, title: `layer ${p.layer_indices[i]}, head ${h}`}, isShare ? (100 * value).toFixed(0) + " %" : value.toFixed(1));
    })));
    table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
    const ramp = element("span", {class: "ramp", style: `background:linear-gradient(to right,${STOPS.map(s => `rgb(${s})`).join(",")})`});
    key.replaceChildren(isShare ? "0 % " : "1 ", ramp, isShare ? ` 100 % of the tokens: ${kind.selectedOptions[0].textContent}` : ` ${top.toFixed(1)} tokens seen for each entry alive at the end`);
  }
  for (const select of [point, kind]) select.addEventListener("change", draw);
  if (point.options.length < 2) point.parentElement.hidden = true;
  box.append(choices, element("div", {class: "scroll"}, table), key);
  draw();
})();

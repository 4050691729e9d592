"use strict";
// What all parts of the page share: the data, elements, choices and numbers. Text goes in as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";
function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const unique = list => Array.from(new Set(list));
const known = value => value !== null && value !== undefined;

// Options are [value, text] or [value, text, group]; the chosen one stays chosen where it is still among them.
function setOptions(select, options, preferred) {
  const wanted = options.some(([value]) => value === select.value) ? select.value : preferred;
  select.replaceChildren();
  const groups = new Map();
  for (const [value, text, group] of options) {
    const option = element("option", {value: value}, text);
    if (group === undefined) { select.append(option); continue; }
    if (!groups.has(group)) { groups.set(group, element("optgroup", {label: group})); select.append(groups.get(group)); }
    groups.get(group).append(option);
  }
  if (options.some(([value]) => value === wanted)) select.value = wanted;
}

function chooser(box, label, name, options, preferred) {
  const select = element("select", {name: name});
  setOptions(select, options, preferred);
  box.append(element("label", {}, label, select));
  return select;
}

function short(value, unit) {
  if (!known(value)) return "–";
  if (unit === "share") return value.toFixed(3);
  if (unit === "figure" && Math.abs(value) < 1000) return value.toFixed(Math.abs(value) < 10 ? 4 : 2);
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) if (size >= limit) return Number((value / (letter === "k" ? 1e3 : limit)).toPrecision(3)) + letter;
  return String(size >= 1000 ? Math.round(value) : Number(value.toPrecision(4)));
}

const signed = (value, unit) => (value < 0 ? "−" : "+") + short(Math.abs(value), unit);
const lengthName = length => known(length) ? Number(length).toLocaleString("en") + " tokens" : "any length";
const pointName = bias => bias === 0 ? "as trained (evict_bias 0)" : "evict_bias " + (bias > 0 ? "+" : "−") + Math.abs(bias);
const nearestTo = (list, wanted) => list.reduce((best, value) => Math.abs(value - wanted) < Math.abs(best - wanted) ? value : best, list[0]);

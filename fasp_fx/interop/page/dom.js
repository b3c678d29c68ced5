// Elements, numbers and shapes. Whatever comes from the model is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const STATUSES = {
  prunable: "can be removed exactly",
  approximate: "could be removed, but an operator mixes its channels",
  exempt: "contracted between two activations, so no weight consumes it",
  frozen: "cannot be removed",
};

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const count = (value) => value.toLocaleString("en-US");
const colour = (status) => (Object.hasOwn(STATUSES, status) ? `st-${status}` : "st-other");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const removedShare = (group) => (group.before ? 1 - group.after / group.before : 0);
const percent = (share) => `${(100 * share).toFixed(1)} %`;

// Channels of a group, with its blocks if it has several: 3×64.
const width = (size, blocks) => (blocks > 1 ? `${blocks}×${Number((size / blocks).toFixed(2))}` : String(size));

function widths(group) {
  const before = width(group.before, group.blocks);
  return data.pruned && group.after !== group.before ? `${before}→${width(group.after, group.blocks)}` : before;
}

// The sign of a status: a shape as well as a colour.
function glyph(status, x, y, r) {
  const shapes = {
    prunable: () => svg("circle", { cx: x, cy: y, r }),
    approximate: () => svg("path", { d: `M${x} ${y - r * 1.25}L${x + r * 1.25} ${y}L${x} ${y + r * 1.25}L${x - r * 1.25} ${y}Z` }),
    exempt: () => svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r }),
    frozen: () => svg("path", { d: `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`, class: "cross" }),
  };
  const shape = Object.hasOwn(shapes, status) ? shapes[status]() : svg("circle", { cx: x, cy: y, r, class: "hollow" });
  return svg("g", { class: `glyph ${colour(status)}`, "aria-hidden": "true" }, shape);
}
const sign = (status) => svg("svg", { class: "sign", viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" }, glyph(status, 8, 8, 5));

// Draws again whenever the width that is there for an element changes, and for paper.
const drawings = [];
const PAPER = 690; // pixels between the margins of a page
function drawn(element, draw) {
  let last = 0;
  const update = (wide) => {
    if (Math.abs(wide - last) < 1) return;
    last = wide;
    draw(wide);
  };
  const screen = () => update(Math.floor(element.clientWidth));
  drawings.push({ paper: () => update(PAPER), screen });
  new ResizeObserver(screen).observe(element);
  screen();
  return () => draw(last);
}
window.addEventListener("beforeprint", () => drawings.forEach(({ paper }) => paper()));
window.addEventListener("afterprint", () => drawings.forEach(({ screen }) => screen()));

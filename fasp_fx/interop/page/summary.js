// Title, figures and notes.
document.getElementById("title").textContent = data.title;
document.getElementById("kind").textContent = `fasp_fx · ${data.curves.length ? "what pruning would cost" : data.pruned ? "what was pruned" : "what can be pruned"}`;
document.getElementById("footer").textContent = `Written by fasp_fx ${data.version}. This page is complete in itself and asks no server for anything.`;

document.getElementById("tiles").append(
  ...data.tiles.map((tile) =>
    el("div", { class: "tile", title: tile.help },
      el("span", { class: "label" }, tile.label),
      el("span", { class: "value" }, tile.value),
      el("span", { class: "change" }, [tile.before ? `from ${tile.before}` : "", tile.more].filter(Boolean).join(", ")),
    ),
  ),
);

document.getElementById("said").append(...data.said.flatMap(([what, line]) => [el("dt", {}, what), el("dd", {}, line)]));
document.getElementById("charts-part").hidden = document.getElementById("table-part").hidden = !data.groups.length;
document.getElementById("curves-part").hidden = !data.curves.length;

document.getElementById("statuses").append(
  ...Object.entries(STATUSES)
    .filter(([status]) => data.groups.some((group) => group.status === status))
    .map(([status, meaning]) => el("li", {}, sign(status), el("b", {}, status), ` ${meaning}`)),
);

const more = document.getElementById("more");
if (data.withoutRule.length) {
  more.append(el("div", { class: "card" }, el("h2", {}, "Operators without a rule"), el("p", { class: "lead" }, "Each froze what it touched."),
    el("ul", {}, ...data.withoutRule.map(([name, times]) => el("li", {}, el("code", {}, name), ` ${plural(times, "time")}`)))));
}
if (data.notes.length) more.append(el("div", { class: "card" }, el("h2", {}, "Notes"), el("ul", {}, ...data.notes.map((note) => el("li", {}, note)))));

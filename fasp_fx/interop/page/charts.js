// Channels before and after, a bar for each group of a kind.
const NUMBERS = { left: 46, top: 10, plot: 120, bottom: 30 };

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 1.5, 2, 3, 4, 5, 8, 10].map((step) => step * power).find((step) => step >= value && Number.isInteger(step)) ?? value;
}

const changed = (group) => (data.pruned ? `${count(group.before)} → ${count(group.after)} channels (${percent(removedShare(group))} removed)` : plural(group.before, "channel"));

// One tab stop for a chart; arrows go from bar to bar.
function roving(bars) {
  bars.forEach((bar, index) => {
    bar.setAttribute("tabindex", index ? -1 : 0);
    bar.addEventListener("keydown", (event) => {
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: bars.length - 1 }[event.key];
      if (to === undefined || !bars[to]) return;
      event.preventDefault();
      bars.forEach((other, at) => other.setAttribute("tabindex", at === to ? 0 : -1));
      bars[to].focus();
    });
  });
}

function columnsChart(chart, wide) {
  const { left, top, plot, bottom } = NUMBERS;
  const high = ceiling(Math.max(...chart.bars.map((bar) => data.groups[bar.group].before)));
  const step = (wide - left - 6) / chart.bars.length;
  const y = (value) => top + plot - (plot * value) / high;
  const picture = svg("svg", { width: wide, height: top + plot + bottom, viewBox: `0 0 ${wide} ${top + plot + bottom}`, role: "group", "aria-label": `Channels of ${chart.label} by layer` });
  for (const part of [0, 0.5, 1]) {
    picture.append(svg("path", { d: `M${left} ${y(high * part)}H${wide - 6}`, class: part ? "grid" : "axis" }),
      svg("text", { x: left - 6, y: y(high * part) + 4, "text-anchor": "end", class: "tick" }, count(high * part)));
  }
  const longest = Math.max(...chart.bars.map((bar) => bar.label.length));
  const every = Math.ceil((longest * 6.5 + 8) / step);
  const thick = Math.min(28, Math.max(1, step * 0.72));
  const bars = chart.bars.map((bar, index) => {
    const group = data.groups[bar.group], x = left + index * step + (step - thick) / 2;
    const say = () => [bar.label === group.name ? group.name : `Layer ${bar.label}`, changed(group), `${group.status}${group.reason ? `: ${group.reason}` : ""}`];
    const mark = svg("g", { class: "bar", role: "img", "aria-label": say().join(". "), "data-bar": bar.group },
      svg("rect", { x: left + index * step, y: top, width: step, height: plot, class: "touch" }),
      svg("rect", { x, y: y(group.before), width: thick, height: Math.max(0, y(0) - y(group.before)), class: "was" }),
      data.pruned ? svg("rect", { x, y: y(group.after), width: thick, height: Math.max(0, y(0) - y(group.after)), class: "is" }) : null);
    if (index % every === 0) picture.append(svg("text", { x: left + (index + 0.5) * step, y: top + plot + 14, "text-anchor": "middle", class: "tick" }, bar.label));
    return withTip(mark, say);
  });
  roving(bars);
  picture.append(...bars, svg("text", { x: left + (wide - left) / 2, y: top + plot + 27, "text-anchor": "middle", class: "tick" }, "layer"));
  return picture;
}

// Groups that stand alone have nothing in common but a fraction kept.
function singlesChart(chart) {
  const rows = chart.bars.map((bar) => {
    const group = data.groups[bar.group];
    const gauge = el("span", { class: data.pruned ? "gauge-box" : "" }, el("span"));
    gauge.firstChild.style.width = `${100 * (1 - removedShare(group))}%`;
    const row = el("div", { class: `single ${colour(group.status)}`, role: "img", "aria-label": `${group.name}: ${changed(group)}`, "data-bar": bar.group },
      sign(group.status), el("span", { class: "single-name" }, bar.label), gauge, el("span", { class: "number" }, widths(group)));
    return withTip(row, () => [group.name, changed(group), `${group.status}${group.reason ? `: ${group.reason}` : ""}`]);
  });
  roving(rows);
  return el("div", { class: "singles" }, ...rows);
}

for (const chart of data.charts) {
  const space = el("div", { class: "plot" });
  const card = el("figure", { class: `chart card ${chart.status ? colour(chart.status) : ""}` },
    el("figcaption", {}, chart.status ? sign(chart.status) : null, el("b", {}, chart.label || "Single groups"), chart.status ? ` ${chart.status}` : null), space);
  document.getElementById("charts").append(card);
  if (chart.status) drawn(space, (wide) => wide > 0 && space.replaceChildren(columnsChart(chart, wide)));
  else space.append(singlesChart(chart));
}
document.getElementById("chart-legend").append(
  el("li", {}, el("span", { class: "swatch was" }), el("b", {}, "before")),
  data.pruned ? el("li", {}, el("span", { class: "swatch is" }), el("b", {}, "after")) : "",
  el("li", {}, "channels; point at a bar, or step through a chart with the arrow keys"),
);

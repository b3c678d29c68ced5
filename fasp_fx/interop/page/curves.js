// What removing more and more costs: a table, and a picture of lines and of measured points.
const FRAME = { left: 58, top: 10, plot: 180, bottom: 34, right: 12 };
const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.01 && Math.abs(value) < 1000 ? String(Number(value.toPrecision(2))) : value.toExponential(1));

document.getElementById("rows-part").hidden = !data.rows.length;
const [headings, ...cells] = data.rows;
if (headings) {
  document.getElementById("rows").append(
    el("thead", {}, el("tr", {}, ...headings.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...cells.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, text))))),
  );
}

function picture({ label, lines, dots = [] }, wide) {
  const { left, top, plot, bottom, right } = FRAME;
  const highest = Math.max(...lines.flatMap(([, points]) => points.map((point) => point[1])), ...dots.map(([, value, doubt]) => value + (doubt ?? 0)));
  const high = highest > 0 ? highest : 1, x = (share) => left + (wide - left - right) * share, power = dots.length ? 1 : 2; // costs are squared errors: drawn by their roots, small ones can be told apart
  const y = (value) => top + plot * (1 - (value / high) ** (1 / power));
  const drawing = svg("svg", { width: wide, height: top + plot + bottom, viewBox: `0 0 ${wide} ${top + plot + bottom}`, role: "group", "aria-label": `${label}, by what is removed` });
  for (const part of [0, 0.5, 1]) {
    drawing.append(svg("path", { d: `M${left} ${y(high * part ** power)}H${wide - right}`, class: part ? "grid" : "axis" }),
      svg("text", { x: left - 6, y: y(high * part ** power) + 4, "text-anchor": "end", class: "tick" }, dots.length ? percent(high * part) : short(high * part ** power)));
  }
  for (const part of [0, 0.25, 0.5, 0.75, 1]) drawing.append(svg("text", { x: x(part), y: top + plot + 15, "text-anchor": part === 1 ? "end" : "middle", class: "tick" }, `${100 * part} %`));
  drawing.append(svg("text", { x: (left + wide - right) / 2, y: top + plot + 30, "text-anchor": "middle", class: "tick" }, "removed"));
  const drawn = lines.map(([name, points]) => {
    const d = `M${points.map(([share, value]) => `${x(share).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`;
    const middle = points[Math.floor(points.length / 2)], last = points[points.length - 1];
    const say = () => [name, ...(last[2] ? points : [middle, last]).map(([share, value, words]) => `${percent(share)} removed: ${words ?? short(value)}`)];
    return withTip(svg("g", { class: "line", role: "img", "aria-label": say().join(". ") }, svg("path", { d, class: "hit" }), svg("path", { d, class: "curve" })), say);
  });
  drawn.push(...dots.map(([share, value, doubt]) => {
    const say = () => [`${percent(share)} removed`, `outputs differ by ${percent(value)}${doubt === null ? "" : ` ± ${percent(doubt)}`}`];
    const bar = doubt === null ? null : svg("path", { d: `M${x(share)} ${y(value - doubt)}V${y(value + doubt)}`, class: "doubt" });
    return withTip(svg("g", { class: "line", role: "img", "aria-label": say().join(". ") }, bar, svg("circle", { cx: x(share), cy: y(value), r: 4, class: "dot" })), say);
  }));
  roving(drawn);
  drawing.append(...drawn);
  return drawing;
}

for (const curve of data.curves) {
  const space = el("div", { class: "plot" });
  document.getElementById("curves").append(el("figure", { class: "chart card" }, el("figcaption", {}, el("b", {}, curve.label), curve.dots ? "" : ", root scale"), space));
  drawn(space, (wide) => wide > 0 && space.replaceChildren(picture(curve, wide)));
}

// Rows of layers between the lanes of shared groups. Where things stand was computed beforehand; here they are drawn at the width there is.
const graph = data.graph;
const board = document.getElementById("graph");
const sharedOf = new Map(graph.shared.map((item) => [item.group, item]));
const open = new Set(); // rows that show each of their layers
const full = new Set(); // "row/layer": layers that are shown in full
const LINE = 34, TOP = 38, LANE = 18, CHIP = 24, COMPACT = 38;
const groupsOf = (numbers) => numbers.map((number) => data.groups[number]);

// What is on the board from top to bottom.
function items() {
  const shown = [];
  graph.rows.forEach((row, r) => {
    if (row.layers.length === 1) shown.push({ kind: "layer", row: r, layers: row.layers, label: row.label });
    else if (!open.has(r)) shown.push({ kind: "pattern", row: r, layers: row.layers, label: row.label });
    else {
      shown.push({ kind: "head", row: r, layers: [], label: row.label });
      row.layers.forEach((layer, k) => shown.push({ kind: full.has(`${r}/${k}`) ? "opened" : "compact", row: r, at: k, layers: [layer], label: layer.label }));
    }
  });
  return shown;
}

// The extent of a lane in each item: from its first reader (or writer) to its last.
function laneSpans(shown, side) {
  const role = side === "left" ? "consumes" : "produces";
  const joins = (item, group) => item.layers.some((layer) => layer.nodes.some((node) => node[role].includes(group)));
  return graph.shared.filter((shared) => shared[side] !== null).map((shared) => {
    const at = shown.flatMap((item, index) => (joins(item, shared.group) ? [index] : []));
    return { shared, first: at[0], last: at[at.length - 1], joins: new Set(at) };
  });
}

function measure(wide) {
  const narrow = wide < 560;
  return { wide, narrow, letter: narrow ? 6.2 : 6.8, gap: narrow ? 12 : 34, hub: narrow ? 104 : 152, left: graph.left ? 12 + graph.left * LANE : 6, right: graph.right ? 12 + graph.right * LANE : 6 };
}

function columnsOf(layer, m) {
  const columns = Math.max(3, layer.columns + (layer.columns % 2 ? 0 : 1));
  const hubs = (columns - 1) / 2, chips = hubs + 1;
  const room = m.wide - m.left - m.right - 32 - hubs * m.hub - (columns - 1) * m.gap;
  const chip = Math.max(72, Math.min(190, room / chips));
  const spread = Math.max(0, (room - chip * chips) / (columns - 1));
  const starts = [];
  let x = m.left + 8;
  for (let column = 0; column < columns; column++) {
    starts.push(x);
    x += (column % 2 ? m.hub : chip) + m.gap + spread;
  }
  return { chip, starts, end: x - m.gap - spread };
}

const laneX = (side, lane, wide) => (side === "left" ? 10 + lane * LANE : wide - 10 - lane * LANE);
const heightOf = (y) => TOP + LINE / 2 + y * LINE;

// As much of the end of a name as fits.
function fit(label, room, letter) {
  const letters = Math.max(4, Math.floor((room - 8) / letter));
  if (label.length <= letters) return label;
  const tail = label.split(".").reduceRight((kept, part) => (kept === "" ? part : kept.length + part.length + 2 <= letters ? `${part}.${kept}` : kept), "");
  return tail.length <= letters - 1 ? `…${tail}` : `…${tail.slice(1 - letters)}`;
}

function link(x1, y1, x2, y2, group, extra = "") {
  const bend = x2 > x1 ? (x2 - x1) / 2 : 70;
  const d = y1 === y2 && x2 > x1 ? `M${x1} ${y1}H${x2}` : `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
  return svg("path", { d, class: `link ${colour(data.groups[group].status)} ${extra}`, "data-group": group });
}

function light(groups) {
  board.classList.toggle("focusing", groups.length > 0);
  for (const mark of document.querySelectorAll("[data-group]")) {
    const own = mark.getAttribute("data-group").split(" ").map(Number);
    mark.classList.toggle("lit", own.some((group) => groups.includes(group)));
  }
}
const lit = (element, say, groups) => withTip(element, say, () => light(groups), () => light([]));

// Where a node's line to a shared group runs: beside its own line if it has one at that side, and beside those of other shared groups.
function joinHeight(layer, index, side, group) {
  const groups = layer.nodes[index][side === "left" ? "consumes" : "produces"];
  const own = layer.edges.some(([at, , way]) => at === index && way === (side === "left" ? 1 : 0));
  return heightOf(layer.nodes[index].y) + (own ? 8 : 0) + (groups.indexOf(group) - (groups.length - 1) / 2) * 8;
}

// The weights of a node in every layer that the item stands for.
function nodeOf(item, index) {
  const layers = item.layers;
  const node = layers[0].nodes[index];
  const own = layers[0].edges.filter(([at]) => at === index).map(([, hub, way]) => ({ way, groups: groupsOf(layers.flatMap((layer) => layer.hubs[hub].groups)) }));
  const touched = [...own, ...node.consumes.map((group) => ({ way: 1, groups: [data.groups[group]], group })), ...node.produces.map((group) => ({ way: 0, groups: [data.groups[group]], group }))];
  const names = layers.flatMap((layer) => layer.nodes[index].parameters);
  const say = () => [
    layers.length > 1 ? `${node.label} in ${plural(layers.length, "layer")}` : node.parameters.length > 1 ? node.label : names[0],
    names.length > 1 ? some(names, 4) : "",
    ...touched.map(({ way, groups, group }) => `${way ? "loses columns" : "loses rows"} with ${sharedOf.get(group)?.tag ?? groups[0].name} (${groups[0].status}${groups[0].reason ? `: ${groups[0].reason}` : ""})`),
  ];
  const numbers = [...layers.flatMap((layer) => layer.edges.filter(([at]) => at === index).flatMap(([, hub]) => layer.hubs[hub].groups)), ...node.consumes, ...node.produces];
  return { node, say, numbers };
}

function drawNode(item, index, m, columns, wide) {
  const { node, say, numbers } = nodeOf(item, index);
  const x = columns.starts[node.x], y = heightOf(node.y);
  const alone = !item.layers[0].edges.some(([at]) => at === index);
  const chip = alone ? Math.max(columns.chip, Math.min(node.label.length * m.letter + 10, columns.end - x)) : columns.chip;
  const behind = svg("g");
  const port = (side, numbersThere) =>
    numbersThere.forEach((group) => {
      const py = joinHeight(item.layers[0], index, side, group);
      const lane = laneX(side, sharedOf.get(group)[side], wide), edge = side === "left" ? x : x + chip;
      behind.append(link(Math.min(lane, edge), py, Math.max(lane, edge), py, group), svg("g", { "data-group": group, class: "join" }, glyph(data.groups[group].status, lane, py, 3.5)));
    });
  port("left", node.consumes);
  port("right", node.produces);
  const mark = svg("g", { class: "node", tabindex: 0, role: "img", "aria-label": say().filter(Boolean).join(". "), "data-group": numbers.join(" ") },
    svg("rect", { x, y: y - CHIP / 2, width: chip, height: CHIP, rx: 4 }),
    svg("text", { x: x + chip / 2, y: y + 4, "text-anchor": "middle" }, fit(node.label, chip, m.letter)));
  return { behind, front: lit(mark, say, numbers) };
}

function drawHub(item, index, m, columns) {
  const hub = item.layers[0].hubs[index];
  const numbers = item.layers.flatMap((layer) => layer.hubs[index].groups);
  const groups = groupsOf(numbers), one = groups[0];
  const x = columns.starts[hub.x], y = heightOf(hub.y);
  const text = widths(groups) + (hub.groups.length > 1 ? ` ×${hub.groups.length}` : "");
  const say = () => groupLines(groups);
  const pill = svg("g", { class: `hub ${colour(one.status)}`, tabindex: 0, role: "img", "aria-label": say().filter(Boolean).join(". "), "data-group": numbers.join(" ") },
    svg("rect", { x, y: y - 13, width: m.hub, height: 26, rx: 13, class: "pill" }),
    glyph(one.status, x + 14, y, 4.5),
    svg("text", { x: x + 25 + (m.hub - 34) / 2, y: y + 4, "text-anchor": "middle", textLength: text.length * 6.4 > m.hub - 32 ? m.hub - 32 : null, lengthAdjust: "spacingAndGlyphs" }, text));
  if (data.pruned && one.status === "prunable") {
    const kept = groups.reduce((sum, group) => sum + group.after, 0) / groups.reduce((sum, group) => sum + group.before, 0);
    pill.append(svg("rect", { x: x + 14, y: y + 9, width: m.hub - 28, height: 2.5, class: "gauge" }), svg("rect", { x: x + 14, y: y + 9, width: (m.hub - 28) * kept, height: 2.5, class: "kept" }));
  }
  return lit(pill, say, numbers);
}

// The lanes beside one item, drawn first so that everything else lies on top.
function drawLanes(target, spans, side, index, wide, tall, joinsAt) {
  for (const { shared, first, last, joins } of spans) {
    if (first === undefined || index < first || index > last) continue;
    const x = laneX(side, shared[side], wide);
    const at = joinsAt(shared.group, side);
    const from = index === first ? Math.min(...at) : 0, to = index === last ? Math.max(...at) : tall;
    const group = data.groups[shared.group];
    const lane = svg("path", { d: `M${x} ${from}V${to}`, class: `lane ${colour(group.status)}`, "data-group": shared.group });
    target.append(lit(lane, () => groupLines([group], shared.tag), [shared.group]));
    if (index === first) target.append(svg("text", { x, y: Math.max(12, from - 10), "text-anchor": "middle", class: "lane-name" }, shared.tag));
    if (joins.has(index) && at.compact) target.append(svg("g", { "data-group": shared.group, class: "join" }, glyph(group.status, x, tall / 2, 3.5)));
  }
}

function headOf(item, m) {
  const many = graph.rows[item.row].layers.length;
  const toggle = (text, expanded, change) =>
    el("button", { type: "button", class: "toggle", "aria-expanded": String(expanded), onclick: () => redraw(change, item) }, text);
  const title = item.kind === "opened"
    ? toggle(item.label, true, () => full.delete(`${item.row}/${item.at}`))
    : el("span", { class: "layer-name" }, m.narrow ? item.label.split(".").slice(-2).join(".") : item.label);
  const each = many > 1 && item.kind !== "opened" ? toggle(item.kind === "pattern" ? `${many} alike: show each` : "show as one", item.kind !== "pattern", () => (open.has(item.row) ? open.delete(item.row) : open.add(item.row))) : null;
  const head = el("div", { class: "row-head" }, title, each);
  head.style.left = `${m.left + 8}px`;
  head.style.right = `${m.right + 8}px`;
  return head;
}

function drawDiagram(item, index, spans, m) {
  const layer = item.layers[0];
  const columns = columnsOf(layer, m);
  const wide = Math.max(m.wide, columns.end + m.right + 8);
  const tall = heightOf(layer.height - 1) + LINE / 2 + 10;
  const picture = svg("svg", { class: "layer", width: wide, height: tall, viewBox: `0 0 ${wide} ${tall}`, role: "group", "aria-label": item.label });
  const joinsAt = (group, side) => layer.nodes.flatMap((node, at) => (node[side === "left" ? "consumes" : "produces"].includes(group) ? [joinHeight(layer, at, side, group)] : []));
  for (const side of ["left", "right"]) drawLanes(picture, spans[side], side, index, wide, tall, joinsAt);
  const nodes = layer.nodes.map((_, at) => drawNode(item, at, m, columns, wide));
  picture.append(...nodes.map((node) => node.behind));
  for (const [node, hub, way] of layer.edges) {
    const n = layer.nodes[node], h = layer.hubs[hub], group = h.groups[0];
    const ny = heightOf(n.y), hy = heightOf(h.y), nx = columns.starts[n.x], hx = columns.starts[h.x];
    const line = way ? link(hx + m.hub, hy, nx, ny, group) : link(nx + columns.chip, ny, hx, hy, group);
    line.setAttribute("data-group", item.layers.flatMap((each) => each.hubs[hub].groups).join(" "));
    picture.append(line);
  }
  picture.append(...nodes.map((node) => node.front), ...layer.hubs.map((_, at) => drawHub(item, at, m, columns)));
  return [picture, headOf(item, m)];
}

function drawCompact(item, index, spans, m) {
  const picture = svg("svg", { class: "layer", width: m.wide, height: COMPACT, viewBox: `0 0 ${m.wide} ${COMPACT}`, "aria-hidden": "true" });
  const joinsAt = () => Object.assign([COMPACT / 2], { compact: true });
  for (const side of ["left", "right"]) drawLanes(picture, spans[side], side, index, m.wide, COMPACT, joinsAt);
  if (item.kind === "head") return [picture, headOf(item, m)];
  const key = `${item.row}/${item.at}`;
  const marks = item.layers[0].hubs.map((hub) => {
    const groups = groupsOf(hub.groups), kept = groups.reduce((sum, group) => sum + group.after, 0) / Math.max(1, groups.reduce((sum, group) => sum + group.before, 0));
    const gauge = el("span", { class: `mini ${colour(groups[0].status)}` }, el("span"));
    gauge.firstChild.style.width = `${100 * kept}%`;
    return el("span", { class: "mark" }, sign(groups[0].status), data.pruned ? gauge : null, el("span", {}, widths(groups)));
  });
  const line = el("button", { type: "button", class: "toggle line", "aria-expanded": "false", onclick: () => redraw(() => full.add(key), item) },
    el("span", { class: "layer-name" }, m.narrow ? item.label.split(".").slice(-1)[0] : item.label), ...marks);
  line.style.left = `${m.left + 8}px`;
  line.style.right = `${m.right + 8}px`;
  return [picture, line];
}

function drawGraph(wide) {
  const shown = items(), m = measure(wide);
  board.classList.toggle("narrow", m.narrow);
  const spans = { left: laneSpans(shown, "left"), right: laneSpans(shown, "right") };
  board.replaceChildren(...shown.map((item, index) => {
    const compact = item.kind === "compact" || item.kind === "head";
    const parts = compact ? drawCompact(item, index, spans, m) : drawDiagram(item, index, spans, m);
    return el("div", { class: `row is-${item.kind}`, "data-row": item.row, "data-layer": item.at }, ...parts);
  }));
}

const drawAgain = drawn(board, drawGraph);
function redraw(change, item) {
  change();
  hideTip();
  light([]);
  drawAgain();
  if (!item) return;
  const same = item.at === undefined ? `[data-row="${item.row}"]` : `[data-row="${item.row}"][data-layer="${item.at}"]`;
  board.querySelector(`${same} button`)?.focus();
}

const alike = graph.rows.flatMap((row, r) => (row.layers.length > 1 ? [r] : []));
document.getElementById("open-all").addEventListener("click", () => redraw(() => alike.forEach((r) => {
  open.add(r);
  graph.rows[r].layers.forEach((_, k) => full.add(`${r}/${k}`));
})));
document.getElementById("close-all").addEventListener("click", () => redraw(() => {
  open.clear();
  full.clear();
}));
document.getElementById("open-all").parentElement.hidden = !alike.length;

document.getElementById("shared").append(...graph.shared.map((item) => {
  const group = data.groups[item.group];
  const chip = el("span", { class: `chip ${colour(group.status)}`, tabindex: 0, role: "note", "data-group": item.group },
    sign(group.status), el("b", {}, item.tag), el("span", { class: "chip-name" }, group.name), el("span", { class: "number" }, widths([group])));
  return el("li", {}, lit(chip, () => groupLines([group], item.tag), [item.group]));
}));

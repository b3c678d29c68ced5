// All groups in a table that sorts and filters.
// A name that may break after its dots and underscores.
const breakable = (name) => name.split(/(?<=[._])/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
const line = (name) => el("div", {}, ...breakable(name));
const members = (names) => {
  if (names.length <= 3) return el("td", { class: "names" }, ...names.map(line));
  const rest = el("details", {}, el("summary", {}, `${count(names.length - 3)} more`), ...names.slice(3).map(line));
  return el("td", { class: "names" }, ...names.slice(0, 3).map(line), rest);
};
const error = (value) => (value === null ? "" : typeof value === "number" ? value.toExponential(2) : value);
const numeric = (value, text) => el("td", { class: "number" }, value === null ? "" : text);
const COLUMNS = [
  { name: "Status", value: (group) => Math.max(0, Object.keys(STATUSES).indexOf(group.status)), cell: (group) => el("td", { class: "status" }, sign(group.status), group.status) },
  { name: "Group", value: (group) => group.name, cell: (group) => el("th", { scope: "row", class: "names" }, ...breakable(group.name)) },
  { name: "Lose rows", value: (group) => group.producers[0] ?? null, cell: (group) => members(group.producers) },
  { name: "Lose columns", value: (group) => group.consumers[0] ?? null, cell: (group) => members(group.consumers) },
  { name: data.pruned ? "Before" : "Channels", value: (group) => group.before, number: true, cell: (group) => numeric(group.before, count(group.before)) },
  { name: "After", value: (group) => group.after, number: true, after: true, cell: (group) => numeric(group.after, count(group.after)) },
  { name: "Removed", value: removedShare, number: true, after: true, cell: (group) => numeric(group.before, percent(removedShare(group))) },
  { name: "Blocks", value: (group) => group.blocks, number: true, cell: (group) => numeric(group.blocks, count(group.blocks)) },
  { name: "Error cut", value: (group) => group.cut, number: true, after: true, cell: (group) => numeric(group.cut, error(group.cut)) },
  { name: "Restored", value: (group) => group.restored, number: true, after: true, cell: (group) => numeric(group.restored, error(group.restored)) },
  { name: "Held out", value: (group) => group.heldRestored, number: true, after: true, cell: (group) => numeric(group.heldRestored, error(group.heldRestored)) },
  { name: "Why", value: (group) => group.reason, cell: (group) => el("td", { class: "why" }, ...breakable(group.reason)) },
].filter((column) => data.pruned || !column.after);

const words = new Intl.Collator("en", { numeric: true });
let sorted = { column: null, down: false };

// Numbers by size, text as people count, what is missing last.
function compare(a, b) {
  if (a === null || b === null) return Number(a === null) - Number(b === null);
  const way = sorted.down ? -1 : 1;
  if (typeof a === "number" && typeof b === "number") return way * (a - b);
  return way * words.compare(String(a), String(b));
}

const tableRows = data.groups.map((group, index) => ({
  group,
  index,
  text: [group.status, group.name, group.reason, ...group.producers, ...group.consumers].join(" ").toLowerCase(),
  row: el("tr", { "data-index": index }, ...COLUMNS.map((column) => column.cell(group))),
}));
const body = el("tbody");
const heads = COLUMNS.map((column) => el("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": "none" },
  el("button", { type: "button", onclick: () => sortBy(column) }, column.name)));
document.getElementById("table").append(el("thead", {}, el("tr", {}, ...heads)), body);

function sortBy(column) {
  sorted = { column, down: sorted.column === column && !sorted.down };
  heads.forEach((head, index) => head.setAttribute("aria-sort", COLUMNS[index] !== column ? "none" : sorted.down ? "descending" : "ascending"));
  showRows();
}

function showRows() {
  const wanted = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = tableRows.filter(({ text }) => wanted.every((word) => text.includes(word)));
  if (sorted.column) shown.sort((a, b) => compare(sorted.column.value(a.group), sorted.column.value(b.group)) || a.index - b.index);
  body.replaceChildren(...shown.map(({ row }) => row));
  document.getElementById("count").textContent = `${count(shown.length)} of ${plural(tableRows.length, "group")}`;
}
document.getElementById("filter").addEventListener("input", showRows);
showRows();

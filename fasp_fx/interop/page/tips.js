// What an element has to say when it is pointed at or focused.
const tip = document.getElementById("tip");
let tipped = null;

function hideTip() {
  if (tipped) tipped.removeAttribute("aria-describedby");
  tipped = null;
  tip.hidden = true;
}

function showTip(element, say) {
  hideTip();
  tip.replaceChildren(...say().filter(Boolean).map((line, index) => el(index ? "p" : "strong", {}, line)));
  tip.hidden = false;
  tipped = element;
  element.setAttribute("aria-describedby", "tip");
  const box = element.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth - own.width - 8;
  const below = box.bottom + 8;
  tip.style.left = `${Math.max(8, Math.min(box.left + box.width / 2 - own.width / 2, room))}px`;
  tip.style.top = `${below + own.height < window.innerHeight - 8 ? below : Math.max(8, box.top - own.height - 8)}px`;
}

// `say` gives lines of text: a heading and what follows.
function withTip(element, say, onShow = () => {}, onHide = () => {}) {
  const show = () => {
    showTip(element, say);
    onShow();
  };
  const hide = () => {
    hideTip();
    onHide();
  };
  element.addEventListener("pointerenter", show);
  element.addEventListener("focus", show);
  element.addEventListener("pointerleave", hide);
  element.addEventListener("blur", hide);
  return element;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
window.addEventListener("scroll", hideTip, { passive: true });

// At most so many names, then the number of the others.
function some(names, limit = 6) {
  const rest = names.length - limit;
  return names.slice(0, limit).join(", ") + (rest > 0 ? ` and ${count(rest)} more` : "");
}

const error = (value) => (value === null ? "" : typeof value === "number" ? value.toExponential(2) : value);

// Everything about one group, or about several that are alike.
function groupLines(groups, tag = "") {
  const one = groups[0];
  const many = groups.length > 1;
  const share = groups.map(removedShare);
  const [low, high] = [Math.min(...share), Math.max(...share)];
  const gone = low === high ? percent(low) : `${percent(low)} to ${percent(high)}`;
  const most = (field) => {
    const known = groups.map((group) => group[field]).filter((value) => typeof value === "number");
    return known.length ? error(Math.max(...known)) : "";
  };
  const errors = (cut, restored) => `cut ${most(cut)}${most(restored) ? `, restored ${most(restored)}` : ""}`;
  return [
    `${tag ? `${tag}: ` : ""}${one.name}${many ? ` and ${count(groups.length - 1)} alike` : ""}`,
    `${one.status}${one.reason ? `: ${one.reason}` : `: ${STATUSES[one.status] ?? ""}`}`,
    `${widths(groups).replace("→", " → ")} channels${data.pruned ? `, ${gone} removed` : ""}${one.blocks > 1 ? `; ${count(one.blocks)} blocks lose equal counts` : ""}`,
    one.producers.length ? `lose rows: ${some(one.producers)}` : "",
    one.consumers.length ? `lose columns: ${some(one.consumers)}` : "no weight loses columns",
    most("cut") ? `relative error of the consumers: ${errors("cut", "restored")}` : "",
    most("heldCut") ? `on tokens held out: ${errors("heldCut", "heldRestored")}` : "",
  ];
}

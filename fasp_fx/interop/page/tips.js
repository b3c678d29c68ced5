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
function withTip(element, say) {
  const show = () => showTip(element, say);
  element.addEventListener("pointerenter", show);
  element.addEventListener("focus", show);
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("blur", hideTip);
  return element;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
window.addEventListener("scroll", hideTip, { passive: true });

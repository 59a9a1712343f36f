// Keys of the page. A key clicks the button of its choice, except while a text is written.
const KEYS = { 1: "left", 2: "right", 0: "tie", b: "both_bad", s: "skip" };
let early = ""; // the choice of a key pressed when the pair was there and its button was not
function decide(choice) {
  const button = document.querySelector(`button#${choice}`);
  early = !button && document.querySelector(".side") ? choice : "";
  button?.click();
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const writing = event.target.closest("input, textarea, select, [contenteditable]");
  if (writing) {
    if (event.key === "Escape") writing.blur();
    return;
  }
  const key = event.key.toLowerCase();
  if (key === "c") document.querySelector("#comment textarea, #comment input")?.focus();
  else if (KEYS[key]) decide(KEYS[key]);
  else return;
  event.preventDefault();
});
// A new pair is read from its beginning.
let number = "";
new MutationObserver(() => {
  if (early) decide(early);
  const current = document.querySelector("#number textarea, #number input")?.value ?? "";
  if (current === number) return;
  number = current;
  window.scrollTo(0, 0);
  document.activeElement?.blur();
}).observe(document, { subtree: true, childList: true });

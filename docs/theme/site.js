// What scrolls can be reached by the Tab key, and what the theme makes later gets a name of its own.
const SCROLLS = ".md-typeset__scrollwrap, pre > code";
function complete() {
  for (const part of document.querySelectorAll(SCROLLS)) if (part.tabIndex < 0) part.tabIndex = 0;
  document.querySelectorAll(".md-code__nav").forEach((nav, n) => {
    const name = `Buttons of code block ${n + 1}`;
    if (nav.getAttribute("aria-label") !== name) nav.setAttribute("aria-label", name);
  });
  for (const option of document.querySelectorAll(".md-option[aria-hidden]")) option.tabIndex = -1;
  for (const head of document.querySelectorAll("th:not([role])")) if (!head.textContent.trim()) head.setAttribute("role", "cell");
  document.querySelector(".md-search[role=dialog]:not([aria-label])")?.setAttribute("aria-label", "Search");
}
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
complete();

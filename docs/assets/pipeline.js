// The picture on the landing page: one step's panel at a time. Without this script all seven are shown, and the links
// in the picture lead to them.
(() => {
  const panels = document.querySelector(".panels");
  if (!panels) return;
  const links = [...document.querySelectorAll(".pipeline a[href^='#step-']")];
  const ids = [...panels.querySelectorAll(".panel")].map((panel) => panel.id);

  function show(id) {
    for (const panel of panels.querySelectorAll(".panel")) panel.hidden = panel.id !== id;
    for (const link of links) {
      if (link.getAttribute("href") === `#${id}`) link.setAttribute("aria-current", "step");
      else link.removeAttribute("aria-current");
    }
  }

  function choose(id) {
    show(id);
    history.replaceState(null, "", `#${id}`);
    const panel = document.getElementById(id);
    if (panel.getBoundingClientRect().top > window.innerHeight - 120) panel.scrollIntoView();
  }

  function step(link, by) {
    const drawing = links.filter((other) => other.ownerSVGElement === link.ownerSVGElement);
    drawing[(drawing.indexOf(link) + by + drawing.length) % drawing.length].focus();
  }

  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  for (const link of links) {
    const id = link.getAttribute("href").slice(1);
    link.addEventListener("click", (event) => {
      event.preventDefault();
      choose(id);
    });
    link.addEventListener("keydown", (event) => {
      if (event.key === " " || event.key === "Enter") choose(id);
      else if (event.key in moves) step(link, moves[event.key]);
      else return;
      event.preventDefault();
    });
  }
  const asked = () => (ids.includes(location.hash.slice(1)) ? location.hash.slice(1) : null);
  window.addEventListener("hashchange", () => asked() && show(asked()));
  panels.classList.add("one-at-a-time");
  show(asked() ?? ids[0]);
})();

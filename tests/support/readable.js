// What somebody could not read of the page as it stands, a sentence for each fault: what is cut off or sticks out of the
// article, broken lines of code, letters under 9 px, and what hardly differs from its ground. test_site.py calls it for each width and scheme.
async ({ phone, scheme }) => {
  const SMALLEST = 9; // pixels of a letter's font, in figures and elsewhere
  const PICTURE = 797; // pixels: pictures are drawn 8 inches wide, in letters of 6.5 points or more, and points are 1/72 inch
  const TEXT = 4.5, LARGE = 3; // contrasts, as WCAG 2 has them; in figures and from 24 px on (bold: 18.66) that of large text
  const LINK = 24; // pixels to hit

  document.body.dataset.mdColorScheme = { light: "default", dark: "slate" }[scheme]; // what the theme's switch does
  const article = document.querySelector("article");
  for (const fold of article.querySelectorAll("details")) fold.open = true;
  for (const panel of article.querySelectorAll(".panel")) panel.hidden = false;
  const faults = [];
  const about = (e, what) => {
    const kind = e.getAttribute("class")?.trim().replace(/\s+/g, ".");
    faults.push(`${e.localName}${kind ? `.${kind}` : ""} ${what}: ${(e.textContent.trim() || e.alt || "").slice(0, 60)}`);
  };

  // --- too wide -------------------------------------------------------------------------------------------------------

  // On a phone, tables, pictures, formulas and drawings made of letters may be moved about in their boxes.
  function widths() {
    const page = document.documentElement.scrollWidth - innerWidth;
    if (page > 0) about(document.body, `is ${page} px too wide`);
    const scrolls = (e) => !["visible", "clip"].includes(getComputedStyle(e).overflowX);
    const column = phone ? innerWidth : article.getBoundingClientRect().right; // the theme lets code touch a phone's edge
    const printed = "pre:is([style], .columns)";
    const box = (e) => e.matches(printed) || e.querySelector(`table, img, math, ${printed}`);
    const moves = (e) => phone && (box(e) || e.closest(".language-text"));
    const inside = (e) => e !== article && (scrolls(e) || inside(e.parentElement));
    for (const e of article.querySelectorAll(":not(svg *, math *, code *)")) {
      const inner = e.scrollWidth - e.clientWidth, outer = Math.round(e.getBoundingClientRect().right - column);
      if (e.clientWidth > 1 && inner > 1 && scrolls(e) && !moves(e)) about(e, `cuts off ${inner} px`);
      if (outer > 5 && !inside(e)) about(e, `sticks out by ${outer} px`);
    }
    for (const picture of article.querySelectorAll("img[src$='.png'], img[src^='data:image/png']"))
      if (picture.clientWidth < PICTURE) about(picture, `is ${picture.clientWidth} px wide, too small for its letters`);
    for (const code of phone ? [] : article.querySelectorAll("pre > code")) {
      const { paddingTop, paddingBottom, lineHeight } = getComputedStyle(code);
      const shown = (code.clientHeight - parseFloat(paddingTop) - parseFloat(paddingBottom)) / parseFloat(lineHeight);
      const broken = Math.round(shown) - code.textContent.trimEnd().split("\n").length;
      if (code.checkVisibility() && broken > 0) about(code, `breaks ${broken} lines`);
    }
    for (const numbers of article.querySelectorAll(".linenos pre")) {
      const off = numbers.offsetHeight - numbers.closest("tr").querySelector(".code pre").offsetHeight;
      if (numbers.checkVisibility() && Math.abs(off) > 1) about(numbers, `ends ${off} px off its code`);
    }
    for (const heading of article.querySelectorAll("h1, h2, h3, h4")) {
      const words = document.createRange();
      words.selectNodeContents(heading);
      if (heading.lastElementChild?.matches(".headerlink, .anchor-link")) words.setEndBefore(heading.lastElementChild);
      const gap = Math.round(heading.getBoundingClientRect().bottom - words.getBoundingClientRect().bottom);
      if (gap > parseFloat(style(heading).fontSize)) about(heading, `ends ${gap} px below its words`);
    }
    for (const button of phone ? article.querySelectorAll("pre > .md-code__nav > button") : []) {
      const code = button.closest("pre").querySelector("code");
      if (button.checkVisibility() && liesUnder(code, button)) about(code, "lies under its copy button");
    }
    for (const link of article.querySelectorAll("svg a")) {
      const { width, height } = link.getBoundingClientRect();
      if (link.checkVisibility() && Math.min(width, height) < LINK) about(link, `is hard to hit, ${width} × ${height} px`);
    }
  }

  // Letter by letter, since spaces at a line's end hang out of it.
  function liesUnder(code, button) {
    const { left, bottom } = button.getBoundingClientRect(), walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    const letter = document.createRange();
    while (walker.nextNode())
      for (const { index } of walker.currentNode.data.matchAll(/\S/g)) {
        letter.setStart(walker.currentNode, index);
        letter.setEnd(walker.currentNode, index + 1);
        const { right, top } = letter.getBoundingClientRect();
        if (top > bottom - 2) return false;
        if (right > left + 1) return true;
      }
    return false;
  }

  // --- colours --------------------------------------------------------------------------------------------------------

  const remember = (compute) => {
    const known = new Map();
    return (key) => known.get(key) ?? known.set(key, compute(key)).get(key);
  };
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const colour = remember((css) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = css;
    pixel.fillRect(0, 0, 1, 1);
    const [r, g, b, alpha] = pixel.getImageData(0, 0, 1, 1).data;
    return [r, g, b, alpha / 255];
  });
  const style = remember((e) => getComputedStyle(e));
  const parent = (e) => e.parentElement ?? e.getRootNode().host;
  const opacity = remember((e) => Number(style(e).opacity) * (parent(e) ? opacity(parent(e)) : 1));
  const over = (ink, ground, alpha = ink[3]) => [0, 1, 2].map((i) => ink[i] * alpha + ground[i] * (1 - alpha));
  const ground = remember((e) => (e ? over(colour(style(e).backgroundColor), ground(parent(e))) : [255, 255, 255]));
  const painted = (e, how, under) =>
    over(colour(style(e)[how]), under, colour(style(e)[how])[3] * (style(e)[`${how}Opacity`] ?? 1) * opacity(e));

  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  function contrast(...colours) {
    const [dark, bright] = colours.map(luminance).sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  }

  // --- drawings -------------------------------------------------------------------------------------------------------

  const SHAPES = ["rect", "circle", "path", "polygon"];
  const shapesOf = (root) =>
    [...root.querySelectorAll(SHAPES.map((name) => `:is([role=img], [role=group]) ${name}`))].filter(
      (shape) => !shape.closest("marker") && shape.checkVisibility(),
    );

  // What lies in a drawing under the middle of an element: the last filled shape before it that has the point in it.
  function beneath(e) {
    const { x, y, width, height } = e.getBoundingClientRect();
    let found = ground(parent(e.ownerSVGElement));
    for (const shape of shapesOf(e.ownerSVGElement.parentNode)) {
      if (!(shape.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING)) break;
      const point = new DOMPoint(x + width / 2, y + height / 2).matrixTransform(shape.getScreenCTM().inverse());
      if (style(shape).fill !== "none" && shape.isPointInFill(point)) found = painted(shape, "fill", found);
    }
    return found;
  }

  // A drawing in a file is looked into as well: for that time a copy of it lies on the picture, as wide. The file asks
  // for the visitor's wish, and is answered with the scheme.
  async function drawingOf(picture) {
    const copy = document.createElement("div"), wish = "(prefers-color-scheme:dark)";
    const drawn = await (await fetch(picture.src)).text();
    copy.attachShadow({ mode: "open" }).innerHTML = drawn.replaceAll(wish, scheme === "dark" ? "all" : "not all");
    copy.style = `position: absolute; width: ${picture.clientWidth}px`;
    copy.shadowRoot.firstElementChild.style = "width: 100%; height: auto";
    picture.after(copy);
    return copy;
  }

  // --- too small, too pale --------------------------------------------------------------------------------------------

  function letters(root) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT, (node) =>
      node.data.trim() ? NodeFilter.FILTER_ACCEPT : NodeFilter.FILTER_REJECT,
    );
    const elements = new Map(); // of code, where thousands of words have a dozen looks, one word of each
    while (walker.nextNode()) {
      const e = walker.currentNode.parentElement;
      elements.set(e.matches("pre:not([style]) span[class]") ? e.className : e, e);
    }
    for (const e of elements.values()) {
      const { width, height } = e.getBoundingClientRect();
      const seen = e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && width > 1 && height > 1;
      if (!seen || e.closest("title, desc, option")) continue;
      const drawn = e.ownerSVGElement, matrix = drawn && e.getScreenCTM();
      const size = parseFloat(style(e).fontSize) * (drawn ? Math.hypot(matrix.a, matrix.b) : 1);
      if (size < SMALLEST) about(e, `has letters of ${size.toFixed(1)} px`);
      const under = drawn ? beneath(e) : ground(e);
      const got = contrast(painted(e, drawn ? "fill" : "color", under), under);
      const large = drawn || size >= 24 || (size >= 18.66 && style(e).fontWeight >= 700);
      if (got < (large ? LARGE : TEXT)) about(e, `has letters of a contrast of ${got.toFixed(2)}`);
    }
  }

  // Each shape stands out by its line or by its filling.
  function shapes(root) {
    for (const shape of shapesOf(root)) {
      const under = beneath(shape), ways = ["fill", "stroke"].filter((how) => style(shape)[how] !== "none");
      const got = Math.max(...ways.map((how) => contrast(painted(shape, how, under), under)));
      if (got < LARGE && !shape.matches(".paper")) about(shape, `has a contrast of ${got.toFixed(2)}`);
    }
  }

  const drawings = await Promise.all([...article.querySelectorAll("img[src$='.svg']")].map(drawingOf));
  widths();
  for (const root of [article, ...drawings.map((copy) => copy.shadowRoot)]) {
    letters(root);
    shapes(root);
  }
  for (const copy of drawings) copy.remove();
  return [...new Set(faults)];
}

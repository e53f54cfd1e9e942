// The figures in the notebooks' pages that can be moved: thresholds to drag, an outlier, the bits of a byte. Each fills
// the element that its notebook has for it. Pointer and keyboard do the same; quantise.js computes what is shown.
(() => {
  const { quantise, relative, short, add } = quantising;
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = { thresholds, outlier, byte };
  for (const [name, draw] of Object.entries(figures)) {
    const root = document.getElementById(`figure-${name}`);
    if (root) draw(root);
  }

  // The figure's parts in order: name, attributes, text.
  function fill(root, parts) {
    root.replaceChildren();
    return parts.map(([name, attributes, text = ""]) => {
      const part = name === "svg" ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
      for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
      part.textContent = text;
      root.append(part);
      return part;
    });
  }

  // --- thresholds: one block of 64 normal weights, each a tick in the colour of its code ----------------------------------

  function thresholds(root) {
    const weights = data("normal-weights"), nf4 = data("codebooks").nf4;
    const label = "Sixteen values, the fifteen thresholds between them, and 64 scaled weights";
    const [axis, told, back] = fill(root, [
      ["svg", { class: "axis", viewBox: "0 0 640 132", role: "group", "aria-label": label }],
      ["p", { "aria-live": "polite" }],
      ["button", { type: "button" }, "back to the midpoints"],
    ]);
    const x = (value) => 320 + 300 * value;
    let moved = [...nf4.thresholds];

    function update() {
      const { rows } = quantise(weights, { ...nf4, thresholds: moved }, weights.length);
      const best = quantise(weights, nf4, weights.length).rows;
      told.textContent = `error |W - W4| / |W| = ${short(relative(rows))}; with the midpoints ${short(relative(best))}`;
      for (const old of axis.querySelectorAll(".still")) old.remove();
      add(axis, "path", { class: "still base", d: "M20 62H620" });
      for (const value of nf4.values) add(axis, "path", { class: "still value", d: `M${x(value)} 52V72` });
      for (const { scaled, code } of rows)
        add(axis, "path", { class: `still tick ${code % 2 ? "odd" : "even"}`, d: `M${x(scaled)} 36V50` });
      for (const value of [-1, 0, 1]) add(axis, "text", { class: "still", x: x(value), y: 126 }, String(value));
      add(axis, "text", { class: "still", x: 320, y: 16 }, "weights by code   | values   ● thresholds to drag");
      moved.forEach((threshold, i) => {
        handles[i].setAttribute("transform", `translate(${x(threshold)} 0)`);
        handles[i].setAttribute("aria-valuenow", threshold.toFixed(4));
      });
    }

    // A threshold stays between its two values.
    function move(i, to) {
      moved[i] = Math.fround(Math.min(Math.max(to, nf4.values[i]), nf4.values[i + 1]));
      update();
    }

    function handle(i) {
      const [low, high] = [nf4.values[i].toFixed(4), nf4.values[i + 1].toFixed(4)];
      const name = `threshold ${i}`, limits = { "aria-valuemin": low, "aria-valuemax": high };
      const grip = add(axis, "g", { role: "slider", tabindex: 0, "aria-label": name, ...limits });
      add(grip, "path", { class: "threshold", d: "M0 34V98" });
      add(grip, "circle", { class: "grip", cy: i % 2 ? 98 : 80 });
      grip.addEventListener("pointerdown", (event) => grip.setPointerCapture(event.pointerId));
      grip.addEventListener("pointermove", (event) => {
        if (!grip.hasPointerCapture(event.pointerId)) return;
        move(i, (new DOMPoint(event.clientX, 0).matrixTransform(axis.getScreenCTM().inverse()).x - 320) / 300);
      });
      grip.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 0.01, ArrowUp: 0.01, ArrowLeft: -0.01, ArrowDown: -0.01 }[event.key];
        if (by) event.preventDefault(), move(i, moved[i] + by);
      });
      return grip;
    }

    const handles = moved.map((_, i) => handle(i));
    back.addEventListener("click", () => ((moved = [...nf4.thresholds]), update()));
    update();
  }

  // --- an outlier: two blocks of 16 weights, the sixth of which is the reader's -------------------------------------------

  function outlier(root) {
    const normal = data("normal-weights"), nf4 = data("codebooks").nf4, SIZE = 16, PLACE = 5;
    const weights = Array.from({ length: 2 * SIZE }, (_, i) => normal[2 * ((13 * i) % 32)]);
    const label = "Two blocks of sixteen weights, each weight with what it decodes to";
    const [caption, slider, told, plot] = fill(root, [
      ["label", { for: "outlier-weight" }, "weight 5"],
      ["input", { id: "outlier-weight", type: "range", min: 0, max: 20, step: 0.1, value: 1 }],
      ["p", { "aria-live": "polite" }],
      ["svg", { class: "axis", viewBox: "0 0 640 220", role: "img", "aria-label": label }],
    ]);
    const x = (i) => 20 + 19 * i + (i >= SIZE ? 12 : 0), y = (value) => 110 - 38 * Math.min(value, 2.5);

    function update() {
      weights[PLACE] = Math.fround(Number(slider.value));
      caption.textContent = `weight 5 is ${slider.value}`;
      const { rows } = quantise(weights, nf4, SIZE);
      const about = (block) =>
        `${block.filter((row) => row.decoded === 0).length} of ${SIZE - 1} became 0, their error ${short(relative(block))}`;
      const first = rows.filter((_, i) => i < SIZE && i !== PLACE);
      told.textContent = `Beside it: ${about(first)}. In the next block: ${about(rows.slice(SIZE, 2 * SIZE - 1))}.`;
      plot.replaceChildren();
      add(plot, "path", { class: "base", d: `M10 110H630M${x(SIZE) - 15} 10V205` });
      add(plot, "text", { x: 320, y: 216 }, "● weight   — decoded");
      rows.forEach(({ weight, decoded }, i) => {
        add(plot, "path", { class: "off", d: `M${x(i)} ${y(weight)}V${y(decoded)}` });
        add(plot, "circle", { class: "dot", cx: x(i), cy: y(weight), r: 4 });
        add(plot, "path", { class: "off", d: `M${x(i) - 7} ${y(decoded)}h14` });
      });
    }
    slider.addEventListener("input", update);
    update();
  }

  // --- a byte of the dynamic map: sign, zeros, a one, a fraction -----------------------------------------------------------

  function byte(root) {
    const map = data("dynamic-map").values; // ascending: 127 below zero, 0, 127 above, 1
    const bits = [0, 1, 0, 1, 0, 0, 0, 0];
    const buttons = bits.map((_, i) => ["button", { type: "button", class: "bit", "aria-label": `bit ${7 - i}` }]);
    const parts = fill(root, [...buttons, ["p", { "aria-live": "polite" }]]), told = parts.pop();

    function update() {
      const one = bits.indexOf(1, 1), zeros = (one < 0 ? 8 : one) - 1, wide = 7 - one;
      parts.forEach((button, i) => {
        const part = i === 0 ? "sign" : i === one ? "one" : one < 0 || i < one ? "zero" : "fraction";
        button.innerHTML = `${bits[i]}<small>${part}</small>`;
        button.setAttribute("aria-pressed", String(Boolean(bits[i])));
        button.dataset.part = part;
      });
      if (one < 0) {
        told.textContent = `no one at all: ${bits[0] ? "1, the largest" : "0"}`;
        return;
      }
      const fraction = parseInt(bits.slice(one + 1).join("") || "0", 2);
      const rank = 2 ** wide - 1 + fraction, code = bits[0] ? 126 - rank : 128 + rank;
      told.textContent =
        `${zeros} zeros: ${zeros ? `divided by ${10 ** zeros}` : "as it is"}; step ${fraction} of ${2 ** wide} from 0.1 to 1. ` +
        `The value is ${Number(map[code].toPrecision(7))}, number ${code} of the sorted 256.`;
    }
    parts.forEach((button, i) => button.addEventListener("click", () => ((bits[i] ^= 1), update())));
    update();
  }
})();

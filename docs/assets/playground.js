// The playground: weights to type or drag, and what quantise.js makes of them.
(() => {
  const root = document.getElementById("playground-form"); // the heading is #playground
  if (!root) return;
  const { scales, quantise, quantiseScales, relative, hex, exact, short, add } = quantising;
  const at = (id) => document.getElementById(id);
  const [books, map] = ["codebooks", "dynamic-map"].map((id) => JSON.parse(at(id).textContent));
  const BLOCKSIZES = [4, 8, 16, 32, 64, 128];
  const MOST = 256, SLIDERS = 32;

  // --- in and out -------------------------------------------------------------------------------------------------

  function read(text) {
    const words = text.split(/[\s,;]+/).filter(Boolean);
    const wrong = words.find((word) => !Number.isFinite(Math.fround(Number(word))));
    if (wrong !== undefined) return { problem: `“${wrong}” is no finite fp32 number.` };
    if (words.length === 0) return { problem: "Type at least one weight." };
    if (words.length > MOST) return { problem: `${words.length} weights are more than the ${MOST} that fit here.` };
    const given = ["mean", "distance"].map((id) => at(id));
    if (at("double").checked && !given.every((field) => field.validity.valid))
      return { problem: "The mean and the largest distance are numbers from 0 to 3.4e38, or empty." };
    const [offset, largest] = given.map((field) => (field.value ? Math.fround(field.value) : undefined));
    return { weights: words.map((word) => Math.fround(Number(word))), offset, largest };
  }

  function update() {
    const { weights, offset, largest, problem } = read(at("weights").value);
    at("problem").textContent = problem ?? "";
    at("weights").setAttribute("aria-invalid", String(Boolean(problem)));
    root.classList.toggle("stale", Boolean(problem)); // what is shown is of the weights before
    if (problem) return;
    const book = books[at("book").value], second = books[at("second").value];
    const blocksize = Number(at("blocksize").value);
    const absmax = scales(weights, blocksize);
    const nested = at("double").checked && quantiseScales(absmax, map, offset, largest);
    const compute = (book) => quantise(weights, book, blocksize, absmax, nested ? nested.decoded : absmax);
    const result = compute(book), beside = second && compute(second);
    for (const [name, wanted] of [["nested", nested], ["second", second]])
      for (const part of root.querySelectorAll(`.${name}`)) part.hidden = !wanted;
    if (nested) showNested(nested, result.rows, quantise(weights, book, blocksize).rows);
    if (second) at("codes2").textContent = beside.rows.map((row) => hex(row.code, 1)).join(" ");
    at("absmax").textContent = result.absmax.map(exact).join(" ");
    at("codes").textContent = result.rows.map((row) => hex(row.code, 1)).join(" ");
    at("packed").textContent = result.packed.map((byte) => hex(byte, 2)).join(" ");
    const share = result.absmax.length / weights.length;
    at("bits").textContent =
      `${short(4 + 32 * share)}: the code 4, the scale the rest; with double quantisation ` +
      `${short(4 + 8 * share + (32 * share) / 256)} (in blocks of 64: 4.5 and 4.127)`;
    const worst = Math.max(...result.rows.map((row) => Math.abs(row.decoded - row.weight)));
    at("error").textContent = `|W - W4| / |W| = ${short(relative(result.rows))}, largest ${short(worst)}`;
    at("others").textContent = Object.entries(books)
      .map(([name, other]) => `${name} ${short(relative(compute(other).rows))}`)
      .join(", ");
    at("rows").replaceChildren(...result.rows.map((row, i) => tableRow(row, i, blocksize, beside?.rows[i])));
    drawAxis(book, result.rows, second);
    showSliders(weights);
  }

  function showNested({ offset, largest, codes, decoded }, rows, exactly) {
    at("level").textContent = `${exact(offset)} ${exact(largest)}`;
    at("bytes").textContent = codes.map((code) => hex(code, 2)).join(" ");
    at("scales").textContent = decoded.map(exact).join(" ");
    const most = Math.max(...rows.map((row, i) => Math.abs(row.decoded - exactly[i].decoded)));
    at("change").textContent =
      `decoded weights by up to ${short(most)}; ` +
      `|W - W4| / |W| from ${short(relative(exactly))} to ${short(relative(rows))}`;
  }

  function tableRow(row, i, blocksize, beside) {
    const line = document.createElement("tr");
    if (i && i % blocksize === 0) line.className = "block-start";
    line.insertCell().textContent = i;
    for (const [name, number] of [["weight", row.weight], ["scaled", row.scaled]]) addNumber(line, name, number);
    line.insertCell().textContent = hex(row.code, 1);
    for (const [name, number] of [["value", row.value], ["decoded", row.decoded]]) addNumber(line, name, number);
    addNumber(line, "error", row.decoded - row.weight);
    if (beside) {
      line.insertCell().textContent = hex(beside.code, 1);
      addNumber(line, "decoded2", beside.decoded);
      addNumber(line, "error2", beside.decoded - beside.weight);
    }
    return line;
  }

  // Four digits to read, nine to point at.
  function addNumber(line, name, number) {
    const cell = line.insertCell();
    cell.className = name;
    cell.title = exact(number);
    cell.textContent = short(number);
  }

  // --- the picture: values (a second codebook below), thresholds between them, weights -----------------------------

  function drawAxis(book, rows, second) {
    const axis = at("axis");
    const x = (value) => 320 + 300 * value;
    axis.replaceChildren();
    add(axis, "path", { class: "base", d: "M20 62H620" });
    for (const threshold of book.thresholds)
      add(axis, "path", { class: "threshold", d: `M${x(threshold)} 34V72` });
    const foot = second ? 62 : 72;
    for (const value of new Set(book.values)) add(axis, "path", { class: "value", d: `M${x(value)} 52V${foot}` });
    for (const value of new Set(second?.values)) add(axis, "path", { class: "value beside", d: `M${x(value)} 62V74` });
    for (const row of rows) {
      add(axis, "path", { class: "weight", d: `M${x(row.scaled)} 50l-4 -10h8z` });
    }
    for (const [value, anchor] of [[-1, "-1"], [0, "0"], [1, "1"]]) add(axis, "text", { x: x(value), y: 88 }, anchor);
    add(axis, "text", { x: 320, y: 16 }, "▼ scaled weights   | values   ┆ thresholds");
  }

  // --- sliders --------------------------------------------------------------------------------------------------------

  let largest = 2;

  function showSliders(weights) {
    const list = at("sliders");
    const shown = Math.min(weights.length, SLIDERS);
    if (!list.matches(":active")) largest = Math.max(2, ...weights.slice(0, shown).map((weight) => Math.abs(weight)));
    while (list.children.length > shown) list.lastElementChild.remove();
    while (list.children.length < shown) list.append(newSlider(list.children.length));
    [...list.children].forEach((item, i) => {
      const slider = item.firstElementChild;
      if (Number(slider.max) !== largest) Object.assign(slider, { min: -largest, max: largest, step: largest / 200 });
      if (slider !== document.activeElement) slider.value = weights[i];
      slider.setAttribute("aria-valuetext", short(weights[i]));
    });
  }

  function newSlider(i) {
    const item = document.createElement("li");
    const slider = document.createElement("input");
    slider.type = "range";
    slider.setAttribute("aria-label", `weight ${i}`);
    slider.addEventListener("input", () => {
      const words = at("weights").value.split(/[\s,;]+/).filter(Boolean);
      words[i] = String(Number(Number(slider.value).toFixed(4)));
      at("weights").value = words.join(" ");
      update();
    });
    item.append(slider, String(i));
    return item;
  }

  // --- examples -------------------------------------------------------------------------------------------------------

  function normal(count) {
    const draw = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
    return Array.from({ length: count }, () => Number(draw().toFixed(2)));
  }

  function put(weights) {
    at("weights").value = weights.join(" ");
    update();
  }

  const START = [0.31, -0.87, 0.05, 1.42, -0.12, 0.66, -1.1, 0.24, 0.9, -0.35, 0.02, -0.58, 0.47, -0.03, 1.05, -0.71];
  at("book").append(...Object.keys(books).map((name) => new Option(`${name}: ${books[name].about}`, name)));
  at("second").append(...Object.keys(books).map((name) => new Option(name, name)));
  at("blocksize").append(...BLOCKSIZES.map((size) => new Option(String(size), String(size))));
  at("book").value = "nf4";
  at("blocksize").value = "8";
  at("normal").addEventListener("click", () => put(normal(16)));
  at("outlier").addEventListener("click", () => put(normal(16).map((weight, i) => (i === 3 ? 8 : weight))));
  at("zeros").addEventListener("click", () => put(normal(16).map((weight, i) => (i < 8 ? 0 : weight))));
  const FIELDS = ["weights", "book", "second", "blocksize", "double", "mean", "distance"];
  for (const id of FIELDS) at(id).addEventListener("input", update);
  put(START);
  if (["normal", "outlier", "zeros"].includes(location.hash.slice(1))) at(location.hash.slice(1)).click();
})();

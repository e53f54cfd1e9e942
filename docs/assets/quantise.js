// What the playground and the figures in the notebooks share: refq4's quantise, pack and decode, numbers as text, and
// elements of a drawing. Every operation is rounded to fp32 by Math.fround, as the Python reference rounds it
// (refq4/reference.py); tests/docs/test_site.py compares the two bit for bit.
const quantising = (() => {
  // The largest magnitude of each block, fp32.
  function scales(weights, blocksize) {
    const absmax = [];
    for (let start = 0; start < weights.length; start += blocksize)
      absmax.push(Math.max(...weights.slice(start, start + blocksize).map(Math.abs)));
    return absmax;
  }

  // clamp(x * (1/absmax), -1, 1); zero where 1/absmax is no number.
  function scale(x, absmax) {
    const inverse = Math.fround(1 / absmax);
    if (!Number.isFinite(inverse)) return 0;
    return Math.min(Math.max(Math.fround(x * inverse), -1), 1);
  }

  // How many thresholds lie below it says which value it gets.
  const code = (book, scaled) => book.order[book.thresholds.filter((threshold) => scaled > threshold).length];

  // Two codes a byte, the first in the high nibble; an odd one out is followed by the code of 0.0.
  function pack(book, codes) {
    const bytes = [];
    for (let i = 0; i < codes.length; i += 2) bytes.push((codes[i] << 4) | (codes[i + 1] ?? code(book, 0)));
    return bytes;
  }

  // The codes are those of the exact scales; ``stored`` is what the scales are when the weights are decoded.
  function quantise(weights, book, blocksize, absmax = scales(weights, blocksize), stored = absmax) {
    const rows = weights.map((weight, i) => {
      const block = Math.floor(i / blocksize);
      const scaled = scale(weight, absmax[block]);
      const chosen = code(book, scaled);
      const decoded = Math.fround(book.values[chosen] * stored[block]);
      return { weight, scaled, code: chosen, value: book.values[chosen], decoded };
    });
    return { absmax, rows, packed: pack(book, rows.map((row) => row.code)) };
  }

  // Double quantisation of up to 256 scales: each minus the mean of all, in codes of the 8-bit map. In a layer, the mean
  // (``offset``) and the largest distance from it are of more scales than are here: then they are given.
  function quantiseScales(absmax, map, offset, largest) {
    offset ??= Math.fround(absmax.reduce((sum, x) => sum + x, 0) / absmax.length);
    const distances = absmax.map((x) => Math.fround(x - offset));
    largest ??= scales(distances, 256)[0];
    const { rows } = quantise(distances, map, 256, [largest]);
    const decoded = rows.map((row) => Math.fround(row.decoded + offset));
    return { offset, largest, codes: rows.map((row) => row.code), decoded };
  }

  function relative(rows) {
    const norm = (pick) => Math.hypot(...rows.map(pick));
    return norm((row) => row.decoded - row.weight) / (norm((row) => row.weight) || 1);
  }

  const hex = (number, digits) => number.toString(16).padStart(digits, "0");
  const exact = (x) => (Object.is(x, -0) ? "-0" : x === 0 ? "0" : x.toPrecision(9)); // nine digits tell fp32 numbers apart
  const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-4 ? x.toExponential(2) : x.toFixed(4));

  const NS = "http://www.w3.org/2000/svg";

  function add(parent, name, attributes, text) {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  return { scales, quantise, quantiseScales, relative, hex, exact, short, add };
})();

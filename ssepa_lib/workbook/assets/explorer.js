// The explorers: arithmetic on arrays first, then what draws on canvases. No dependency, no network.

// ---------------------------------------------------------------- arithmetic
// A matrix is { codes, scales, top, n }: entry (i, j) = codes[i·n + j] · scales[i] / top.

export function row(matrix, i) {
  const { codes, scales, top, n } = matrix, out = new Float32Array(n), unit = scales[i] / top;
  for (let j = 0; j < n; j++) out[j] = codes[i * n + j] * unit;
  return out;
}

export function column(matrix, j) {
  const { codes, scales, top, n } = matrix, out = new Float32Array(n);
  for (let i = 0; i < n; i++) out[i] = (codes[i * n + j] * scales[i]) / top;
  return out;
}

// One step of propagation: matrix × map.
export function propagate(matrix, map) {
  const { codes, scales, top, n } = matrix, out = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    let sum = 0;
    for (let j = 0, at = i * n; j < n; j++) sum += codes[at + j] * map[j];
    out[i] = (sum * scales[i]) / top;
  }
  return out;
}

// (1/K) Σ w_k x_k over K arrays of equal length.
export function mix(arrays, weights) {
  const out = new Float32Array(arrays[0].length);
  arrays.forEach((x, k) => {
    const w = weights[k] / arrays.length;
    if (w) for (let i = 0; i < out.length; i++) out[i] += w * x[i];
  });
  return out;
}

// Bilinear, pixel centres at one half, as torch's interpolate without align_corners.
export function resize(map, [h, w], [H, W]) {
  if (h === H && w === W) return map;
  const axis = (from, to) => Array.from({ length: to }, (_, i) => {
    const at = Math.max(0, ((i + 0.5) * from) / to - 0.5), low = Math.min(Math.floor(at), from - 1);
    return [low, Math.min(low + 1, from - 1), at - low];
  });
  const out = new Float32Array(H * W), across = axis(w, W);
  axis(h, H).forEach(([y0, y1, f], y) => {
    for (let x = 0; x < W; x++) {
      const [x0, x1, g] = across[x];
      const up = map[y0 * w + x0] * (1 - g) + map[y0 * w + x1] * g;
      const down = map[y1 * w + x0] * (1 - g) + map[y1 * w + x1] * g;
      out[y * W + x] = up * (1 - f) + down * f;
    }
  });
  return out;
}

export const lowest = (map) => map.reduce((a, b) => Math.min(a, b), Infinity);
export const highest = (map) => map.reduce((a, b) => Math.max(a, b), -Infinity);
export const total = (map) => map.reduce((a, b) => a + b, 0);

// Min-max to 0..1, as labels.cam.normalise_cam.
export function normalise(map) {
  const low = lowest(map), range = highest(map) - low + 1e-5;
  return map.map((x) => (x - low) / range);
}

export function quantile(map, q) {
  const sorted = Float32Array.from(map).sort(), at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

// Strongest class 1..C above `high`, 0 up to and including `low`, 255 (ignored) between.
export function threshold(maps, high, low = high) {
  const out = new Uint8Array(maps[0].length);
  for (let i = 0; i < out.length; i++) {
    let best = 0;
    for (let c = 1; c < maps.length; c++) if (maps[c][i] > maps[best][i]) best = c;
    const value = maps[best][i];
    out[i] = value > high ? best + 1 : value > low ? 255 : 0;
  }
  return out;
}

// Intersection over union of one class; pixels whose mask is 255 do not count.
export function iou(labels, mask, id = 1) {
  let both = 0, either = 0;
  for (let i = 0; i < mask.length; i++) {
    if (mask[i] === 255) continue;
    const a = labels[i] === id, b = mask[i] === id;
    both += a && b;
    either += a || b;
  }
  return either ? both / either : NaN;
}

// The best of the thresholds 0.01 … 0.99 for a map in 0..1: [IoU, threshold].
export function bestThreshold(map, mask) {
  const inside = new Float64Array(101), outside = new Float64Array(101);
  for (let i = 0; i < mask.length; i++) {
    if (mask[i] !== 255) (mask[i] ? inside : outside)[Math.min(100, Math.max(0, Math.ceil(map[i] * 100)))]++;
  }
  const size = total(inside);
  let hit = inside[100], wrong = outside[100], best = [-1, 0];
  for (let t = 99; t > 0; t--) {  // pixels above t/100 lie in the bins after t
    const found = hit / (size + wrong);
    if (found > best[0]) best = [found, t / 100];
    hit += inside[t];
    wrong += outside[t];
  }
  return best;
}

// Which blocks FSR hides: `activation`, `edges` and the random `order` have one number per block.
export function hidden({ activation, edges, order }, ratio, selection, low, high) {
  const doubt = activation.map((a) => a > low && a < high ? 1 : 0);
  const key = selection === "edge" ? edges : selection === "random" ? order : order.map((o, i) => o + doubt[i]);
  const count = Math.ceil(ratio * order.length), out = new Uint8Array(order.length);
  Array.from(key.keys()).sort((a, b) => key[b] - key[a]).slice(0, count).forEach((i) => (out[i] = 1));
  return { blocks: selection === "strict" ? out.map((m, i) => m & doubt[i]) : out, doubt };
}

// Bytes of one step: what the encoder keeps for the backward pass, and the maps of each strategy.
export function stepBytes({ side, batch, layers, heads, width, patch, prefix, value, scale, flip }) {
  const patches = Math.round(side / patch) ** 2, rows = batch * (patches + prefix), stream = 4 * rows * width;
  const block = 2 * stream + 16 * rows + 14 * rows * width * value + 4 * rows * heads, pixels = 3 * side * side;
  const copies = value === 4 ? 0 : value * (layers * 12 * width ** 2 + Math.floor((width * pixels) / patches));
  const map = batch * (flip ? 2 : 1) * (Math.round((side * scale) / patch) ** 2 + prefix) ** 2 * value;
  const kept = layers * block + stream + 8 * rows + batch * pixels * value + copies;
  return { kept, maps: { stack_heads: layers * heads * map, stack_layers: layers * map, matrix_free: 0 } };
}

// Side of the largest image, a multiple of the patch, whose step fits into so many bytes.
export function largestSide(sizes, strategy, budget) {
  let side = 0;
  for (; side + sizes.patch <= 16384; side += sizes.patch) {
    const { kept, maps } = stepBytes({ ...sizes, side: side + sizes.patch });
    if (kept + maps[strategy] > budget) break;
  }
  return side;
}

// ---------------------------------------------------------------- drawing
const STYLE = `.ssx{--fg:#1b1b1b;--bg:#fff;--soft:#59606a;--line:#9aa0a6;--hot:#0b5fa5;--key:#eef1f4;
font:14px/1.45 system-ui,sans-serif;color:var(--fg);background:var(--bg);padding:.6rem;box-sizing:border-box}
.ssx.dark{--fg:#e8e8e8;--bg:#17181a;--soft:#b0b6bd;--line:#6f757c;--hot:#7cc4ff;--key:#2e3135}
.ssx *{box-sizing:border-box}.ssx .row{display:flex;flex-wrap:wrap;gap:.4rem .9rem;align-items:center;margin:.35rem 0}
.ssx .panels{display:flex;flex-wrap:wrap;gap:.8rem;align-items:flex-end}
.ssx figure{margin:0;width:min(var(--w),calc(50% - .4rem));min-width:8.5rem}.ssx figure.wide{width:min(100%,24rem)}
.ssx figcaption{font-size:13px;margin-bottom:.2rem;min-height:1.4em}.ssx canvas{width:100%;display:block;border-radius:2px}
.ssx canvas[tabindex]{cursor:crosshair;touch-action:pan-y}
.ssx :focus-visible{outline:3px solid var(--hot);outline-offset:2px}
.ssx button{font:inherit;color:inherit;background:var(--key);border:1px solid var(--line);border-radius:4px;padding:.1rem .5rem;min-width:2rem;min-height:1.8rem;cursor:pointer}
.ssx button[aria-pressed=true]{background:var(--hot);border-color:var(--hot);color:var(--bg);font-weight:600}
.ssx .group{display:flex;flex-wrap:wrap;gap:.25rem;align-items:center}.ssx .group>span,.ssx label>span{color:var(--soft)}
.ssx label{display:flex;gap:.4rem;align-items:center}.ssx input{flex:1 1 6rem;min-width:5rem;max-width:14rem;accent-color:var(--hot);margin:0}
.ssx output{min-width:2.6em;font-variant-numeric:tabular-nums}.ssx p{margin:.35rem 0;max-width:60rem}.ssx .soft{color:var(--soft);font-size:13px}
.ssx .bar{height:.7rem;width:9rem;border:1px solid var(--line)}
.ssx .sliders{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.2rem 1rem}
.ssx .chip{display:inline-block;width:.8em;height:.8em;border:1px solid var(--line);margin-right:.25em}`;
const MARK = "#00e5ff";

function h(tag, props = {}, ...kids) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) typeof v === "string" ? node.setAttribute(k, v) : (node[k] = v);
  node.append(...kids);
  return node;
}

const percent = (x) => !Number.isFinite(x) ? "–" : x > 0 && x < 0.005 ? "below 1 %" : `${Math.round(100 * x)} %`;
const short = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(+x.toPrecision(2)));
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const opacity = (v) => 0.9 * Math.sqrt(v);  // a low value leaves the image visible

function ramp(anchors) {
  const known = anchors.map(rgb), last = known.length - 1;
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * last, k = Math.min(Math.floor(at), last - 1), f = at - k;
    return known[k].map((c, j) => c + f * (known[k + 1][j] - c));
  });
}

function picture(source, changed) {
  const image = new Image(), grey = document.createElement("canvas");
  image.onload = () => {
    grey.width = image.naturalWidth;
    grey.height = image.naturalHeight;
    const pen = grey.getContext("2d");
    pen.drawImage(image, 0, 0);
    const pixels = pen.getImageData(0, 0, grey.width, grey.height), d = pixels.data;
    for (let i = 0; i < d.length; i += 4) d[i] = d[i + 1] = d[i + 2] = (d[i] + d[i + 1] + d[i + 2]) / 3;
    pen.putImageData(pixels, 0, 0);
    changed();
  };
  image.src = source;
  return { image, grey };
}

function tile(values, [rows, columns], colour) {
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = rows;
  const pen = small.getContext("2d"), pixels = pen.createImageData(columns, rows);
  for (let i = 0; i < values.length; i++) pixels.data.set(colour(values[i]), 4 * i);
  pen.putImageData(pixels, 0, 0);
  return small;
}

class View {
  constructor(model, el) {
    const spec = model.get("spec"), raw = model.get("blob") ?? new Uint8Array();
    const bytes = raw instanceof Uint8Array ? raw : new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength);
    Object.assign(this, { model, spec, el, data: {}, off: [] });
    for (const [name, { at, count, type }] of Object.entries(spec.parts)) {
      const kind = { f4: Float32Array, u2: Uint16Array, u1: Uint8Array }[type];
      this.data[name] = new kind(bytes.slice(at, at + count * kind.BYTES_PER_ELEMENT).buffer);
    }
    this.lut = ramp(spec.colours);
    this.root = h("section", { class: "ssx", "aria-label": spec.title });
    // JupyterLab's shortcuts without a modifier would take digits and arrow keys away from the explorer. It looks
    // for this attribute above the element in focus too late, after that element itself.
    const guard = (e) => this.root.contains(e.target) &&
      e.target.toggleAttribute("data-lm-suppress-shortcuts", !(e.ctrlKey || e.metaKey || e.altKey));
    addEventListener("keydown", guard, true);
    this.off.push(() => removeEventListener("keydown", guard, true));
    el.append(h("style", {}, STYLE), this.root);
    this.theme();
  }
  // JupyterLab says its theme on the body (of the page around a frame as well); otherwise the system's counts.
  theme() {
    let bodies = [document.body];
    try { if (parent !== window) bodies.push(parent.document.body); } catch { /* another origin */ }
    const system = matchMedia("(prefers-color-scheme: dark)");
    const apply = () => {
      const told = bodies.map((b) => b.dataset.jpThemeLight).find(Boolean);
      this.root.classList.toggle("dark", told ? told === "false" : system.matches);
      this.draw?.();
    };
    const watch = new MutationObserver(apply);
    for (const b of bodies) watch.observe(b, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
    system.addEventListener("change", apply);
    this.off.push(() => (watch.disconnect(), system.removeEventListener("change", apply)));
    apply();
  }
  listen(...names) {
    for (const name of names) {
      const call = () => this.draw();
      this.model.on(`change:${name}`, call);
      this.off.push(() => this.model.off(`change:${name}`, call));
    }
  }
  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
    this.draw();
  }
  add(...nodes) { this.root.append(...nodes); return nodes[0]; }
  panels(width) { return this.add(h("div", { class: "panels", style: `--w:${width}` })); }
  panel(into, title, ratio = 1) {
    const canvas = h("canvas", { role: "img", "aria-label": title }), caption = h("figcaption", {}, title);
    canvas.width = 600;
    canvas.height = Math.round(canvas.width / ratio);
    into.append(h("figure", {}, caption, canvas));
    return { canvas, caption };
  }
  status() { return this.add(h("p", { role: "status", "aria-live": "polite" })); }
  note(text) { return this.add(h("p", { class: "soft" }, text)); }
  buttons(label, names, pick) {
    const nodes = names.map((name, i) => h("button", { type: "button", onclick: () => pick(i) }, name));
    const node = h("div", { class: "group", role: "group", "aria-label": label }, h("span", {}, label), ...nodes);
    return { node, press: (i) => nodes.forEach((b, k) => b.setAttribute("aria-pressed", String(k === i))) };
  }
  slider(label, [min, max, step], value, change, digits = 2) {
    const shown = h("output"), input = h("input", { type: "range", "aria-label": label });
    Object.assign(input, { min, max, step, value });
    const show = (v) => { input.value = v; shown.textContent = (+v).toFixed(digits); };
    input.oninput = () => { show(input.value); change(+input.value); };
    show(value);
    return { node: h("label", {}, h("span", {}, label), input, shown), show, input };
  }
  scale(unit) {
    const stops = Array.from({ length: 17 }, (_, i) => {
      const v = i / 16, c = this.lut[Math.round(255 * v)].map((x) => Math.round(x * opacity(v) + 128 * (1 - opacity(v))));
      return `rgb(${c})`;
    });
    const low = h("span"), high = h("span"), bar = h("span", { class: "bar" });
    bar.style.background = `linear-gradient(90deg,${stops})`;
    this.add(h("div", { class: "row soft" }, low, bar, high, h("span", {}, unit)));
    return (a, b) => { low.textContent = short(a); high.textContent = short(b); };
  }
  heat(canvas, source, map, size, [low, high], smooth = true) {
    const pen = canvas.getContext("2d"), { width, height } = canvas, range = high - low || 1;
    pen.imageSmoothingEnabled = true;
    pen.clearRect(0, 0, width, height);
    if (source) pen.drawImage(source, 0, 0, width, height);
    pen.imageSmoothingEnabled = smooth;
    const shade = (x) => {
      const v = Math.min(1, Math.max(0, (x - low) / range));
      return [...this.lut[Math.round(255 * v)], 255 * opacity(v)];
    };
    pen.drawImage(tile(map, size, shade), 0, 0, width, height);
  }
  // Class ids over the image; 255 is hatched by a light grey.
  labels(canvas, source, ids, size) {
    const pen = canvas.getContext("2d"), palette = this.spec.palette.map(rgb);
    pen.imageSmoothingEnabled = true;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (source) pen.drawImage(source, 0, 0, canvas.width, canvas.height);
    pen.imageSmoothingEnabled = false;
    const shade = (id) => (id === 0 ? [0, 0, 0, 0] : id === 255 ? [255, 255, 255, 190] : [...palette[(id - 1) % palette.length], 190]);
    pen.drawImage(tile(ids, size, shade), 0, 0, canvas.width, canvas.height);
  }
  outline(canvas, patch, [rows, columns], colour = MARK, dash = [], label = "") {
    const pen = canvas.getContext("2d"), w = canvas.width / columns, t = canvas.height / rows;
    const x = (patch % columns) * w, y = Math.floor(patch / columns) * t;
    for (const [c, width] of [["#000", 7], [colour, 3.5]]) {
      pen.strokeStyle = c;
      pen.lineWidth = width;
      pen.setLineDash(c === colour ? dash : []);
      pen.strokeRect(x, y, w, t);
    }
    pen.setLineDash([]);
    if (+label) this.write(pen, label, x + w / 2, y + t / 2 + 9);
    else if (label) this.write(pen, label, Math.min(Math.max(x + w / 2, 8 * label.length), canvas.width - 8 * label.length), y > 40 ? y - 8 : y + t + 26);
  }
  write(pen, text, x, y) {
    pen.font = "600 24px system-ui,sans-serif";
    pen.textAlign = "center";
    pen.lineWidth = 5;
    pen.strokeStyle = "#000";
    pen.strokeText(text, x, y);
    pen.fillStyle = "#fff";
    pen.fillText(text, x, y);
    pen.textAlign = "left";
  }
  // Lines over x; `cursor` is marked. Values are 0..1 unless `range` says otherwise.
  chart(canvas, xs, lines, cursor, label, range = [0, 1]) {
    canvas.parentNode.classList.add("wide");
    const pen = canvas.getContext("2d"), { width, height } = canvas, style = getComputedStyle(this.root);
    const [left, right, top, bottom] = [70, width - 20, 20, height - 62], last = xs[xs.length - 1] || 1;
    const x = (v) => left + ((right - left) * (v - xs[0])) / (last - xs[0] || 1);
    const y = (v) => bottom - ((bottom - top) * (v - range[0])) / (range[1] - range[0] || 1);
    pen.clearRect(0, 0, width, height);
    pen.font = "24px system-ui,sans-serif";
    pen.fillStyle = pen.strokeStyle = style.color;
    pen.lineWidth = 1.5;
    pen.strokeRect(left, top, right - left, bottom - top);
    pen.textAlign = "right";
    for (const v of range) pen.fillText(short(v), left - 8, y(v) + 8);
    pen.textAlign = "center";
    for (const v of [xs[0], last]) pen.fillText(v, Math.min(x(v), width - 30), bottom + 28);
    pen.fillText(label, (left + right) / 2, bottom + 54);
    pen.setLineDash([4, 6]);
    pen.beginPath();
    pen.moveTo(x(cursor), top);
    pen.lineTo(x(cursor), bottom);
    pen.stroke();
    lines.forEach(({ name, values }, i) => {
      pen.strokeStyle = this.spec.palette[[4, 5, 2][i]];
      pen.lineWidth = 4;
      pen.setLineDash([[], [14, 8], [4, 6]][i]);
      pen.beginPath();
      values.forEach((v, k) => v !== null && Number.isFinite(v) && pen.lineTo(x(xs[k]), y(v)));
      pen.stroke();
      if (!name) return;
      const at = top + 30 + 32 * i, from = right - 40 - pen.measureText(name).width;
      pen.beginPath();
      pen.moveTo(from - 60, at - 8);
      pen.lineTo(from - 10, at - 8);
      pen.stroke();
      pen.textAlign = "left";
      pen.fillText(name, from, at);
    });
    pen.setLineDash([]);
    pen.textAlign = "left";
  }
  // Mouse, touch and arrow keys choose a patch of a canvas.
  choose(canvas, [rows, columns], get, put, keys = () => false) {
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
      const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
      if (x >= 0 && y >= 0 && x < columns && y < rows) put(y * columns + x);
    };
    canvas.onpointerdown = (event) => { canvas.focus({ preventScroll: true }); at(event); };
    canvas.onpointermove = (event) => event.buttons && at(event);
    canvas.onkeydown = (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (step) {
        const y = Math.floor(get() / columns) + step[0], x = (get() % columns) + step[1];
        if (x >= 0 && y >= 0 && x < columns && y < rows) put(y * columns + x);
      } else if (!keys(event.key.toLowerCase())) return;
      event.preventDefault();
      event.stopPropagation();
    };
  }
}

// ---------------------------------------------------------------- one function per kind
const KINDS = {};

KINDS.microscope = (v) => {
  const { spec, data, model } = v, [rows, columns] = spec.grid, n = rows * columns, mixed = spec.weights ? 1 : 0;
  const matrix = (k) => ({ codes: data.codes.subarray(k * n * n, (k + 1) * n * n), scales: data.scales.subarray(k * n, (k + 1) * n), top: 255, n });
  const source = picture(spec.image, () => v.draw());
  let gives = false, pinned = null;
  const layer = () => spec.layers.indexOf(model.get("layer"));
  const line = (patch) => {
    const read = gives ? column : row, k = layer();
    return k >= mixed ? read(matrix(k - mixed), patch) : mix(spec.weights.map((_, m) => read(matrix(m), patch)), spec.weights);
  };
  const where = (p) => `${spec.names[p] ? spec.names[p] + ", " : ""}patch ${p} (row ${Math.floor(p / columns)}, column ${p % columns})`;
  const into = v.panels("17rem"), main = v.panel(into, ""), product = data.cam && v.panel(into, ""), second = v.panel(into, "");
  const layers = v.buttons("layer", spec.layers.map((k) => (k === null ? "all" : String(k))), (i) => v.set("layer", spec.layers[i]));
  const sides = v.buttons("view", ["receives from", "gives to"], (i) => { gives = !!i; v.draw(); });
  const pin = h("button", { type: "button", onclick: () => { pinned = pinned === null ? model.get("patch") : null; v.draw(); } });
  const limits = v.scale("weight of one patch (the scale ends at the 99th percentile)");
  v.add(h("div", { class: "row" }, layers.node, sides.node, pin));
  const status = v.status(), terms = v.note("");
  v.note("Click or drag, or use the arrow keys on the image. Digits choose a layer, A all layers, G the view, P pins the patch.");
  const key = (k) => {
    const at = k === "a" ? spec.layers.indexOf(null) : /^\d$/.test(k) ? spec.layers.indexOf(+k) : -1;
    if (at >= 0) v.set("layer", spec.layers[at]);
    else if (k === "g") { gives = !gives; v.draw(); }
    else if (k === "p") pin.click();
    else return false;
    return true;
  };
  v.choose(main.canvas, spec.grid, () => model.get("patch"), (p) => v.set("patch", p), key);
  const stat = (name, patch) => data[name][layer() * n + patch];
  const words = (patch) => {
    if (gives) return `It gives ${short(stat("given", patch))} in total; 1 would be as much as an average patch receives.`;
    const said = [];
    const own = data.own ? stat("own", patch) : NaN;
    if (Number.isFinite(own)) said.push(`${percent(own)} of what it receives from patches comes from ${data.object[patch] ? "its own object" : "the background, like itself"}`);
    said.push(`it attends to about ${Math.round(Math.exp(stat("entropy", patch)))} of ${n} patches, ${short(stat("distance", patch))} patches away on average`);
    if (spec.prefix) said.push(`${percent(1 - stat("received", patch))} comes from the class token`);
    return said.join("; ") + ".";
  };
  v.draw = () => {
    const patch = model.get("patch"), shown = line(patch), other = pinned === null ? null : line(pinned);
    const top = Math.max(quantile(shown, 0.99), other ? quantile(other, 0.99) : 0, 1e-9);
    v.heat(main.canvas, source.grey, shown, spec.grid, [0, top], false);
    for (const p of Object.keys(spec.names)) if (+p !== patch) v.outline(main.canvas, +p, spec.grid, "#fff", [6, 6], spec.names[p]);
    v.outline(main.canvas, patch, spec.grid, MARK, [], spec.names[patch] ?? "");
    limits(0, top);
    main.caption.textContent = gives ? "where the framed patch gives to" : "where the framed patch receives from";
    if (product) {
      const parts = row({ codes: shown, scales: [1], top: 1, n }, 0).map((a, j) => a * data.cam[j]);
      v.heat(product.canvas, source.grey, data.cam, spec.grid, [0, Math.max(highest(data.cam), 1e-9)], false);
      const five = gives ? [] : Array.from(parts.keys()).filter((p) => parts[p] > 0).sort((a, b) => parts[b] - parts[a]).slice(0, 5);
      five.forEach((p, i) => v.outline(product.canvas, p, spec.grid, MARK, [], String(i + 1)));
      product.caption.textContent = "the CAM, 0 to its maximum; framed: the largest terms";
      const sum = total(parts);
      const said = five.map((p, i) => `${i + 1}. patch ${p}, ${short(shown[p])} × ${short(data.cam[p])} = ${short(parts[p])}`);
      terms.textContent = gives ? "" : `Refined value ${short(sum)}, the sum of weight × CAM over all patches. ` +
        (said.length ? `The largest terms: ${said.join("; ")}.` : "No term is above 0.");
    }
    second.canvas.parentNode.hidden = pinned === null;
    if (other) {
      v.heat(second.canvas, source.grey, other, spec.grid, [0, top], false);
      v.outline(second.canvas, pinned, spec.grid, "#ffb000", [], "");
      second.caption.textContent = `pinned: ${where(pinned)}`;
    }
    pin.textContent = pinned === null ? "pin this patch" : "unpin";
    layers.press(layer());
    sides.press(+gives);
    const name = model.get("layer") === null ? "All layers" : `Layer ${model.get("layer")}`;
    status.textContent = `${where(patch)}. ${name}: ${words(patch)}`;
    main.canvas.setAttribute("aria-label", `${spec.title}: ${where(patch)}`);
  };
  v.listen("patch", "layer");
};

KINDS.mixer = (v) => {
  const { spec, data, model } = v, [rows, columns] = spec.grid, n = rows * columns, K = spec.depth, size = spec.size;
  const products = (i) => Array.from({ length: K }, (_, k) => data.products.subarray((i * K + k) * n, (i * K + k + 1) * n));
  const area = size[0] * size[1], masks = data.masks && ((i) => data.masks.subarray(i * area, (i + 1) * area));
  const sources = spec.images.map((s) => picture(s, () => v.draw()));
  const into = v.panels(spec.images.length > 3 ? "11rem" : "15rem");
  const shown = spec.images.map((_, i) => v.panel(into, `image ${i + 1}`));
  const limits = v.scale("refined map, min-max per image");
  const put = (w) => v.set("weights", w);
  const presets = Object.keys(spec.presets), choice = v.buttons("preset", presets, (i) => put(spec.presets[presets[i]].slice()));
  v.add(h("div", { class: "row" }, choice.node));
  const grid = v.add(h("div", { class: "sliders" }));
  const sliders = Array.from({ length: K }, (_, k) => {
    const s = v.slider(`layer ${k}`, [0, spec.most, 0.05], 1, (x) => put(model.get("weights").map((w, j) => (j === k ? x : w))));
    grid.append(s.node);
    return s;
  });
  const cut = v.slider("background threshold", [0.05, 0.95, 0.05], spec.background, () => v.draw());
  v.add(h("div", { class: "row" }, cut.node));
  const status = v.status();
  v.note("Weights act relative to each other: their mean is taken as 1. Digits jump to the slider of a layer, arrow keys move it.");
  v.root.onkeydown = (event) => {
    const s = /^\d$/.test(event.key) && sliders[+event.key];
    if (s) { s.input.focus(); event.preventDefault(); }
  };
  const lines = (i, map) => {
    if (!masks) return "";
    const mask = masks(i), [best, at] = bestThreshold(map, mask);
    return `IoU ${percent(iou(threshold([map], +cut.input.value), mask))} (best ${percent(best)} at ${at.toFixed(2)})`;
  };
  v.draw = () => {
    const weights = model.get("weights"), mean = total(weights) / K || 1, scores = [];
    shown.forEach((panel, i) => {
      const map = normalise(resize(mix(products(i), weights.map((w) => w / mean)), spec.grid, size));
      v.heat(panel.canvas, sources[i].grey, map, size, [0, 1]);
      const text = lines(i, map);
      if (masks) scores.push(iou(threshold([map], +cut.input.value), masks(i)));
      let said = [text];
      if (data.parts) {
        const part = data.parts.subarray(i * area, (i + 1) * area), sums = [0, 0, 0];
        for (let p = 0; p < area; p++) sums[part[p]] += map[p];
        const all = total(sums) || 1;
        said.push(`head ${percent(sums[1] / all)}, body ${percent(sums[2] / all)}, ground ${percent(sums[0] / all)}`);
      }
      if (masks) said.push(`floor ${percent(quantile(map.filter((_, p) => masks(i)[p] === 0), 0.5) / Math.max(highest(map), 1e-9))}`);
      panel.caption.textContent = said.filter(Boolean).join("; ") || `image ${i + 1}`;
      panel.canvas.setAttribute("aria-label", `refined map of image ${i + 1}: ${panel.caption.textContent}`);
    });
    limits(0, 1);
    sliders.forEach((s, k) => s.show(weights[k]));
    const same = presets.findIndex((p) => spec.presets[p].every((w, k) => Math.abs(w - weights[k]) < 1e-6));
    choice.press(same);
    const name = same < 0 ? "Your own weights" : `Preset ${presets[same]}`;
    status.textContent = `${name}: ${weights.map((w) => (w / mean).toFixed(2)).join(", ")} for layers 0 to ${K - 1}` +
      (scores.length ? `; mean IoU of the shown images ${percent(total(scores) / scores.length)} at threshold ${(+cut.input.value).toFixed(2)}.` : ".");
  };
  v.listen("weights");
};

KINDS.thresholds = (v) => {
  const { spec, data, model } = v, area = spec.size[0] * spec.size[1], source = picture(spec.image, () => v.draw());
  let kind = 0;
  const maps = () => spec.classes.map((_, c) => {
    const at = (kind * spec.classes.length + c) * area;
    return Float32Array.from(data.maps.subarray(at, at + area), (x) => x / 255);
  });
  const into = v.panels("17rem"), map = v.panel(into, ""), label = v.panel(into, "labels"), truth = data.mask && v.panel(into, "ground truth");
  const limits = v.scale("map, 0 to 1");
  const which = v.buttons("map", spec.kinds, (i) => { kind = i; v.draw(); });
  const put = (high, low) => v.set("thresholds", [high, low]);
  const high = v.slider("object above", [0, 1, 0.05], 0, (x) => put(x, Math.min(x, model.get("thresholds")[1])));
  const low = v.slider("background up to", [0, 1, 0.05], 0, (x) => put(Math.max(x, model.get("thresholds")[0]), x));
  v.add(h("div", { class: "row" }, spec.kinds.length > 1 ? which.node : "", high.node, low.node));
  const legend = h("div", { class: "row soft" });
  spec.classes.forEach((name, i) => {
    const chip = h("span", { class: "chip" });
    chip.style.background = spec.palette[i % spec.palette.length];
    legend.append(h("span", {}, chip, name));
  });
  const white = h("span", { class: "chip" });
  white.style.background = "#fff";
  legend.append(h("span", {}, white, "ignored"));
  v.add(legend);
  const status = v.status();
  v.note("Values between the two thresholds are in doubt and ignored; with equal thresholds nothing is.");
  v.draw = () => {
    const [top, bottom] = model.get("thresholds"), values = maps(), ids = threshold(values, top, bottom);
    const best = values.reduce((a, b) => a.map((x, i) => Math.max(x, b[i])));
    v.heat(map.canvas, source.grey, best, spec.size, [0, 1]);
    map.caption.textContent = spec.kinds[kind] + (values.length > 1 ? ", maximum over the classes" : "");
    v.labels(label.canvas, source.image, ids, spec.size);
    if (truth) v.labels(truth.canvas, source.image, data.mask, spec.size);
    limits(0, 1);
    high.show(top);
    low.show(bottom);
    which.press(kind);
    const share = (test) => percent(ids.filter(test).length / area);
    const scores = data.mask ? values.map((_, c) => iou(ids, data.mask, c + 1)).filter(Number.isFinite) : [];
    status.textContent = `${spec.kinds[kind]}: ${share((x) => x && x < 255)} object, ${share((x) => x === 255)} ignored, ${share((x) => !x)} background` +
      (scores.length ? `; IoU ${percent(total(scores) / scores.length)}, where ignored pixels count as not found.` : ".");
  };
  v.listen("thresholds");
};

KINDS.propagation = (v) => {
  const { spec, data, model } = v, [rows, columns] = spec.grid, n = rows * columns, source = picture(spec.image, () => v.draw());
  const matrix = { codes: data.codes, scales: data.scales, top: 65535, n };
  let drop = false, series = [], key = "";
  const into = v.panels("18rem"), main = v.panel(into, ""), curve = v.panel(into, "", 1.5);
  const limits = v.scale("map, min-max");
  const begin = v.buttons("start from", ["the CAM", "one patch"], (i) => { drop = !!i; v.draw(); });
  const step = v.slider("steps", [0, spec.steps, 1], 0, (x) => v.set("step", x), 0);
  v.add(h("div", { class: "row" }, begin.node, step.node));
  const status = v.status();
  v.note("Click the image, or use the arrow keys on it, to let a drop of value spread from one patch.");
  v.choose(main.canvas, spec.grid, () => model.get("patch"), (p) => { drop = true; v.set("patch", p); });
  const follow = () => {
    const now = drop ? model.get("patch") : "cam";
    if (now === key) return;
    key = now;
    let map = drop ? Float32Array.from({ length: n }, (_, i) => +(i === now)) : data.cam;
    series = [];
    for (let t = 0; t <= spec.steps; t++, map = propagate(matrix, map)) {
      const spread = highest(map) - lowest(map), full = normalise(resize(map.map((x) => x / (highest(map) || 1)), spec.grid, spec.size));
      series.push({ map, full, spread, best: data.mask && !drop ? bestThreshold(full, data.mask)[0] : null });
    }
  };
  v.draw = () => {
    follow();
    const t = model.get("step"), now = series[t], start = series[0].spread || 1;
    v.heat(main.canvas, source.grey, now.full, spec.size, [0, 1]);
    if (drop) v.outline(main.canvas, model.get("patch"), spec.grid);
    main.caption.textContent = `after ${t} ${t === 1 ? "step" : "steps"}`;
    const lines = [{ name: "contrast left", values: series.map((s) => s.spread / start) }];
    if (now.best !== null) lines.push({ name: "best IoU", values: series.map((s) => s.best) });
    v.chart(curve.canvas, series.map((_, i) => i), lines, t, "steps");
    curve.caption.textContent = lines.length > 1 ? "solid: contrast left; dashed: IoU at the best threshold" : "contrast left";
    limits(0, 1);
    step.show(t);
    begin.press(+drop);
    const from = drop ? `One drop at patch ${model.get("patch")}` : "The CAM";
    status.textContent = `${from} after ${t} ${t === 1 ? "step" : "steps"}: ${percent(now.spread / start)} of the contrast between patches is left` +
      (now.best === null ? "." : `; IoU at the best threshold ${percent(now.best)}.`);
  };
  v.listen("step", "patch");
};

KINDS.timeline = (v) => {
  const { spec, data, model } = v, source = picture(spec.image, () => v.draw()), names = Object.keys(spec.maps);
  const into = v.panels("13rem"), shown = names.map((name) => v.panel(into, name));
  const limits = v.scale("maps, 0 to 1");
  const step = v.slider("snapshot", [0, spec.steps.length - 1, 1], 0, (x) => v.set("step", x), 0);
  const terms = Object.keys(spec.history.terms), chart = terms.length && v.panel(v.panels("24rem"), "", 2);
  let term = 0;
  const choice = v.buttons("loss", terms, (i) => { term = i; v.draw(); });
  v.add(h("div", { class: "row" }, step.node), terms.length ? choice.node : "");
  const status = v.status();
  v.draw = () => {
    const i = model.get("step"), at = spec.steps[i];
    names.forEach((name, k) => {
      const { size, labels } = spec.maps[name], area = size[0] * size[1], part = data[name].subarray(i * area, (i + 1) * area);
      if (labels) v.labels(shown[k].canvas, source.image, part, size);
      else v.heat(shown[k].canvas, source.grey, Float32Array.from(part, (x) => x / 255), size, [0, 1]);
    });
    limits(0, 1);
    step.show(i);
    let said = "";
    if (chart) {
      const xs = spec.history.step, values = spec.history.terms[terms[term]], known = values.filter((x) => x !== null);
      v.chart(chart.canvas, xs, [{ name: "", values }], at, "training step", [Math.min(0, lowest(known)), highest(known)]);
      chart.caption.textContent = terms[term];
      let near = 0;
      xs.forEach((x, k) => { if (values[k] !== null && x <= at) near = k; });
      said = values[near] === null ? "" : `; ${terms[term]} ${short(values[near])}`;
      choice.press(term);
    }
    status.textContent = `Snapshot ${i + 1} of ${spec.steps.length}, after training step ${at}${said}.`;
  };
  v.listen("step");
};

KINDS.masks = (v) => {
  const { spec, data, model } = v, [rows, columns] = spec.grid, source = picture(spec.image, () => v.draw());
  const kinds = ["random", "loose", "strict", "edge"];
  let kind = 1;
  const into = v.panels("17rem"), map = v.panel(into, ""), view = v.panel(into, "what the student sees");
  const limits = v.scale("activation of a block");
  const choice = v.buttons("selection", kinds, (i) => { kind = i; v.draw(); });
  const ratio = v.slider("share masked", [0, 1, 0.05], spec.ratio, () => v.draw());
  const put = (low, high) => v.set("thresholds", [low, high]);
  const low = v.slider("uncertain above", [0, 1, 0.05], 0, (x) => put(x, Math.max(x, model.get("thresholds")[1])));
  const high = v.slider("and below", [0, 1, 0.05], 0, (x) => put(Math.min(x, model.get("thresholds")[0]), x));
  v.add(h("div", { class: "row" }, choice.node, ratio.node, low.node, high.node));
  const status = v.status();
  v.draw = () => {
    const [from, to] = model.get("thresholds"), share = +ratio.input.value;
    const { blocks, doubt } = hidden(data, share, kinds[kind], from, to);
    const edge = kinds[kind] === "edge", shown = edge ? data.edges : data.activation;
    v.heat(map.canvas, source.grey, shown, spec.grid, [0, edge ? highest(shown) : 1], false);
    map.caption.textContent = edge ? "image gradient of each block" : "auxiliary activation; framed: uncertain blocks";
    if (!edge) doubt.forEach((d, i) => d && v.outline(map.canvas, i, spec.grid));
    const pen = view.canvas.getContext("2d"), w = view.canvas.width / columns, t = view.canvas.height / rows;
    pen.drawImage(source.image, 0, 0, view.canvas.width, view.canvas.height);
    blocks.forEach((b, i) => {
      if (!b) return;
      pen.fillStyle = "#7a7a7a";
      pen.fillRect((i % columns) * w, Math.floor(i / columns) * t, w, t);
      if (doubt[i]) v.outline(view.canvas, i, spec.grid);
    });
    limits(0, edge ? highest(shown) : 1);
    low.show(from);
    high.show(to);
    choice.press(kind);
    const count = total(blocks), unsure = total(doubt), both = blocks.filter((b, i) => b && doubt[i]).length;
    status.textContent = `${kinds[kind]}: ${count} of ${blocks.length} blocks are hidden; ${unsure} blocks are uncertain, ${both} of them hidden.`;
  };
  v.listen("thresholds");
};

KINDS.heads = (v) => {
  const { spec, data, model } = v, [rows, columns] = spec.grid, n = rows * columns, K = spec.layers.length, H = spec.heads;
  const source = picture(spec.image, () => v.draw());
  const layer = () => Math.max(0, spec.layers.indexOf(model.get("layer")));
  const matrix = (i) => ({ codes: data.codes.subarray(i * n * n, (i + 1) * n * n), scales: data.scales.subarray(i * n, (i + 1) * n), top: 255, n });
  const pick = (k, head) => { model.set("head", head); v.set("layer", spec.layers[k]); };
  const into = v.panels("20rem"), main = v.panel(into, ""), dots = v.panel(into, "entropy of every head; the chosen one is filled", 1.5);
  const all = v.panel(into, "every head of the patch: a column per layer, a line per head", K / H);
  for (const panel of [dots, all]) panel.canvas.parentNode.classList.add("wide");
  const limits = v.scale("weight of one patch in the large map (the scale ends at the 99th percentile)");
  const status = v.status();
  v.note("Point at a dot or click a small map to choose a head, click the large map to choose a patch; arrow keys do the same.");
  v.choose(main.canvas, spec.grid, () => model.get("patch"), (p) => v.set("patch", p));
  v.choose(all.canvas, [H, K], () => model.get("head") * K + layer(), (i) => pick(i % K, Math.floor(i / K)));
  const place = (k, head) => {
    const { width, height } = dots.canvas, x = 60 + ((width - 80) * (k + 0.5 + 0.6 * ((head + 0.5) / H - 0.5))) / K;
    return [x, height - 40 - ((height - 70) * data.entropy[k * H + head]) / spec.limit];
  };
  dots.canvas.onpointermove = dots.canvas.onpointerdown = (event) => {
    const box = dots.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * dots.canvas.width) / box.width, y = ((event.clientY - box.top) * dots.canvas.height) / box.height;
    for (let k = 0; k < K; k++) for (let head = 0; head < H; head++) {
      const [a, b] = place(k, head);
      if (Math.hypot(a - x, b - y) < 16 && (k !== layer() || head !== model.get("head"))) return pick(k, head);
    }
  };
  const end = (map) => Math.max(quantile(map, 0.99), 1e-12);
  v.draw = () => {
    const patch = model.get("patch"), k = layer(), head = model.get("head"), chosen = k * H + head, map = row(matrix(chosen), patch);
    v.heat(main.canvas, source.grey, map, spec.grid, [0, end(map)], false);
    v.outline(main.canvas, patch, spec.grid, MARK, [], spec.names[patch] || "");
    main.caption.textContent = `layer ${spec.layers[k]}, head ${head}: from where ${spec.names[patch] || `patch ${patch}`} receives`;
    limits(0, end(map));
    let pen = all.canvas.getContext("2d");
    const w = all.canvas.width / K, t = all.canvas.height / H;
    pen.imageSmoothingEnabled = false;
    for (let i = 0; i < K * H; i++) {
      const values = row(matrix(i), patch), top = end(values), x = Math.floor(i / H) * w, y = (i % H) * t;
      const shade = (c) => [...v.lut[Math.round(255 * Math.min(1, c / top))], 255];
      pen.drawImage(tile(values, spec.grid, shade), x + 2, y + 2, w - 4, t - 4);
    }
    pen.strokeStyle = MARK;
    pen.lineWidth = 5;
    pen.strokeRect(k * w + 2, head * t + 2, w - 4, t - 4);
    pen = dots.canvas.getContext("2d");
    const { width, height } = dots.canvas, ink = getComputedStyle(v.root).color;
    pen.clearRect(0, 0, width, height);
    pen.font = "22px system-ui,sans-serif";
    pen.fillStyle = pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(60, 30, width - 80, height - 70);
    pen.textAlign = "right";
    pen.fillText(short(spec.limit), 54, 38);
    pen.fillText("0", 54, height - 36);
    pen.textAlign = "center";
    for (let i = 0; i < K; i++) pen.fillText(spec.layers[i], 60 + ((width - 80) * (i + 0.5)) / K, height - 12);
    pen.lineWidth = 3;
    for (let i = 0; i < K * H; i++) {
      pen.strokeStyle = pen.fillStyle = spec.palette[(i % H) % spec.palette.length];
      pen.beginPath();
      pen.arc(...place(Math.floor(i / H), i % H), i === chosen ? 11 : 7, 0, 7);
      i === chosen ? pen.fill() : pen.stroke();
    }
    const said = [`entropy ${data.entropy[chosen].toFixed(2)} of at most ${spec.limit.toFixed(2)} nats`, `${short(data.distance[chosen])} patches away on average`];
    if (spec.prefix) said.push(`${percent(data.class_mass[chosen])} to the class token`);
    if (data.own) said.push(`${percent(data.own[chosen * n + patch])} of what this patch receives comes from its own object`);
    status.textContent = `Layer ${spec.layers[k]}, head ${head}: ${said.join("; ")}.`;
  };
  v.listen("patch", "layer", "head");
};

KINDS.memory = (v) => {
  const { spec } = v, names = { stack_heads: "every head", stack_layers: "head means", matrix_free: "matrix-free" };
  let value = 4, large = true;
  const chart = v.panel(v.panels("40rem"), "", 2.4);
  chart.canvas.parentNode.classList.add("wide");
  const redraw = () => v.draw();
  const sliders = Object.fromEntries(Object.entries(spec.sliders).map(([name, [label, range, start]]) => [name, v.slider(label, range, start, redraw, 0)]));
  const bytes = v.buttons("numbers of", ["4 bytes", "2 bytes"], (i) => { value = i ? 2 : 4; v.draw(); });
  const pass = v.buttons("maps of", ["scale 1", "scale 1.5 and flip"], (i) => { large = !!i; v.draw(); });
  v.add(h("div", { class: "sliders" }, ...Object.values(sliders).map((s) => s.node)), h("div", { class: "row" }, bytes.node, pass.node));
  const status = v.status();
  v.note(`Width ${spec.width}, patches of ${spec.patch} pixels. Weights, optimizer and the other losses come on top.`);
  v.draw = () => {
    const chosen = Object.fromEntries(Object.entries(sliders).map(([name, s]) => [name, +s.input.value]));
    const sizes = { ...chosen, width: spec.width, patch: spec.patch, prefix: spec.prefix, value, scale: large ? 1.5 : 1, flip: large };
    const { kept, maps } = stepBytes(sizes), budget = chosen.budget * 1e9, pen = chart.canvas.getContext("2d");
    const { width, height } = chart.canvas, left = 150, room = width - left - 90, top = Math.max(budget, kept + maps.stack_heads);
    const x = (size) => left + (room * size) / top, style = getComputedStyle(v.root), said = [];
    pen.clearRect(0, 0, width, height);
    pen.font = "22px system-ui,sans-serif";
    Object.entries(names).forEach(([strategy, name], i) => {
      const y = 14 + (i * (height - 50)) / 3, thick = (height - 50) / 3 - 18, end = x(kept + maps[strategy]);
      pen.fillStyle = spec.palette[4];
      pen.fillRect(left, y, x(kept) - left, thick);
      pen.fillStyle = spec.palette[0];
      pen.fillRect(x(kept), y, end - x(kept), thick);
      pen.fillStyle = style.color;
      pen.textAlign = "right";
      pen.fillText(name, left - 10, y + thick / 2 + 8);
      pen.textAlign = "left";
      pen.fillText(((kept + maps[strategy]) / 1e9).toPrecision(3), end + 8, y + thick / 2 + 8);
      said.push(`${name} ${((kept + maps[strategy]) / 1e9).toPrecision(3)} GB, at most ${largestSide(sizes, strategy, budget)} pixels`);
    });
    pen.strokeStyle = style.color;
    pen.lineWidth = 2.5;
    pen.setLineDash([10, 6]);
    pen.beginPath();
    pen.moveTo(x(budget), 4);
    pen.lineTo(x(budget), height - 34);
    pen.stroke();
    pen.setLineDash([]);
    pen.textAlign = "center";
    pen.fillText(`${chosen.budget} GB`, Math.min(x(budget), width - 40), height - 10);
    bytes.press(value === 2 ? 1 : 0);
    pass.press(+large);
    chart.caption.textContent = "blue: kept by the encoder for the backward pass; orange: maps of the affinity; in GB";
    chart.canvas.setAttribute("aria-label", said.join("; "));
    status.textContent = `${said.join("; ")}. Dashed: the memory that you have.`;
  };
};

function render({ model, el }) {
  let view = null;
  const close = () => view?.off.forEach((stop) => stop());
  const open = () => {
    close();
    el.replaceChildren();
    view = null;
    const here = model.get("blob")?.byteLength ?? 0, parts = Object.values(model.get("spec").parts);
    if (parts.some(({ at, count, type }) => at + count * +type[1] > here)) {
      el.append(h("p", { role: "status" }, "The data of this explorer is not there yet; run its cell again if it does not come."));
      return;
    }
    view = new View(model, el);
    KINDS[view.spec.kind](view);
    view.draw();
  };
  if (!model.frozen) el.classList.add("ssepa-live");
  for (const name of ["spec", "blob"]) model.on(`change:${name}`, open);
  open();
  return () => { close(); for (const name of ["spec", "blob"]) model.off(`change:${name}`, open); };
}

// A page of its own, without a kernel: the state and the data lie in two script elements.
function freeze() {
  const read = (id) => document.getElementById(id).textContent;
  const blob = Uint8Array.from(atob(read("blob")), (c) => c.charCodeAt(0));
  const state = { ...JSON.parse(read("state")), blob }, model = {
    frozen: true, get: (k) => state[k], set: (k, x) => (state[k] = x), on() {}, off() {}, save_changes() {},
  };
  render({ model, el: document.body });
  const fit = () => { if (window.frameElement) frameElement.style.height = `${document.body.scrollHeight}px`; };
  new ResizeObserver(fit).observe(document.body);
  fit();
}

export default { render };

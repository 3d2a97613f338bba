// The page for people: asks the server about pictures, one request each, and compares their scores
// with a threshold that people can move on the page.
"use strict";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 4; // requests under way
const SOURCES = { // of the server's threshold
  model: "the model's own", rate: "set for a false-reject rate", value: "set by hand",
};
const state = { model: null, threshold: 0, items: [], queue: [], running: 0, large: -1 };
const TOKEN = "clsnf token"; // in the tab's own storage
// Also those that the server does not read: it says what to do about them.
const PICTURE = /\.(png|jpe?g|bmp|tiff?|webp|p[bgnp]m|hei[cf]|avif|gif|jp2|jxl|jfif)$/i;
const PAUSE = 300; // milliseconds without a change after which outlines are drawn anew

// ---- models ----

async function json(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...options.headers };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 && !options.headers?.Authorization) {
    await askForToken(token);
    return json(path, options);
  }
  const content = await answer.json()
    .catch(() => ({ error: `the server answered ${answer.status}` }));
  if (answer.ok) return content;
  const { status } = answer, retry = answer.headers.get("Retry-After");
  throw Object.assign(new Error(content.error), { status, retry });
}

// ---- the token for asking ----

let asked = null; // one dialog for all requests that wait for the token

function askForToken(refused) {
  if (refused !== sessionStorage.getItem(TOKEN)) return Promise.resolve(); // another one since
  asked ??= new Promise((done, failed) => {
    const dialog = $("asking"), input = $("asking-token");
    $("asking-problem").textContent =
      refused ? "The server does not know this token. Is it typed as it was given to you?" : "";
    dialog.onclose = () => {
      asked = null;
      if (dialog.returnValue !== "given") failed(new Error("no token was given"));
      else { sessionStorage.setItem(TOKEN, input.value.trim()); input.value = ""; done(); }
    };
    dialog.returnValue = "";
    dialog.showModal();
    input.select();
  });
  return asked;
}

// ---- the model ----

async function start() {
  try {
    const { models } = await json("v1/models");
    $("category").replaceChildren(...models.map((m) => new Option(m.category, m.category)));
    const wanted = decodeURIComponent(location.hash.slice(1));
    if (models.some((m) => m.category === wanted)) $("category").value = wanted;
    await choose($("category").value);
  } catch (error) {
    $("summary").textContent = `The server can't be asked: ${error.message}`;
  }
}

async function choose(category) {
  const found = await json(`v1/models/${encodeURIComponent(category)}`);
  if ($("category").value !== category) return; // another one was chosen meanwhile
  state.model = found;
  history.replaceState(null, "", `#${encodeURIComponent(category)}`);
  const model = state.model;
  const headline = ["image_auroc", "pixel_ap", "au_pro"];
  const metrics = Object.keys(model.figures).filter((name) => headline.includes(name));
  const facts = [
    ["trained on", `${model.trained_on.images} good pictures`],
    ["backbone", model.trained_on.backbone],
    ["version", model.version],
    ["input", `${model.image_size[1]} × ${model.image_size[0]} pixels`],
    ...metrics.map((name) => [name.replace("_", " "), model.figures[name].toFixed(3)]),
  ];
  const terms = facts.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  $("facts").replaceChildren(...terms.flat());
  for (const item of state.items) { // the pictures stay, and the other model is asked about them
    Object.assign(item, { category, answer: null, problem: null, overlay: null, drawn: null });
  }
  state.queue = state.items.map((item) => ({ item, again: false }));
  move(model.threshold.value);
  pump();
}

// ---- threshold ----

const normals = () => state.model?.validation_scores ?? [];
const answered = () => state.items.filter((item) => item.answer);
const verdict = (item) => (item.answer.score > state.threshold ? "defect" : "good");

function move(value) {
  state.threshold = value;
  draw();
  redrawSoon();
}

function domain() {
  const all = [...normals(), ...answered().map((i) => i.answer.score), state.model.threshold.value];
  const low = Math.min(...all), high = Math.max(...all);
  const margin = Math.max(0.15 * (high - low), 0.01);
  return [Math.max(0, low - margin), Math.min(1, high + margin)];
}

function draw() {
  if (!state.model) return;
  const [low, high] = domain(), slider = $("threshold");
  slider.min = low; slider.max = high; slider.value = state.threshold;
  $("threshold-value").textContent = state.threshold.toFixed(4);
  const n = normals().length, above = normals().filter((s) => s > state.threshold).length;
  const own = Math.abs(state.threshold - state.model.threshold.value) < 1e-9;
  const { value, source } = state.model.threshold;
  $("threshold-text").textContent =
    `${above} of ${n} normal pictures lie above. ` +
    (own
      ? `This is the server's threshold (${SOURCES[source]}).`
      : `The server's is ${value.toFixed(4)}.`);
  $("reset").disabled = own;
  chart(low, high);
  cards();
}

function chart(low, high) {
  const width = 320, floor = 122, bins = 32, parts = [];
  const share = (s) => (s - low) / (high - low), x = (s) => 8 + share(s) * (width - 16);
  const line = x(state.threshold), counts = new Array(bins).fill(0);
  for (const s of normals()) counts[Math.min(bins - 1, Math.floor(share(s) * bins))]++;
  const tallest = Math.max(1, ...counts), step = (width - 16) / bins;
  const beyond = Math.max(0, width - 8 - line);
  parts.push(shape("rect", { class: "above", x: line, y: 0, width: beyond, height: floor }));
  counts.forEach((count, i) => {
    if (!count) return;
    const height = (count / tallest) * 84, place = { x: 8 + i * step + 0.5, y: floor - height };
    parts.push(shape("rect", { class: "normal", ...place, width: step - 1, height }));
  });
  const rows = new Map();
  for (const item of answered()) { // dots above the bars, stacked where they would cover each other
    const at = x(item.answer.score), slot = Math.round(at / 6), row = rows.get(slot) ?? 0;
    rows.set(slot, row + 1);
    const cy = 30 - Math.min(row, 4) * 6;
    parts.push(shape("circle", { class: verdict(item), cx: at, cy, r: 3.2 }));
  }
  parts.push(shape("line", { class: "axis", x1: 8, x2: width - 8, y1: floor, y2: floor }));
  for (const value of [low, (low + high) / 2, high]) {
    const anchor = value === low ? "start" : value === high ? "end" : "middle";
    const place = { x: x(value), y: floor + 14, "text-anchor": anchor };
    parts.push(shape("text", place, value.toFixed(2)));
  }
  parts.push(shape("line", { class: "line", x1: line, x2: line, y1: 0, y2: floor + 4 }));
  $("chart").replaceChildren(...parts);
  const least = Math.min(...normals()).toFixed(3), most = Math.max(...normals()).toFixed(3);
  $("chart-text").textContent =
    `Scores of ${normals().length} normal pictures from ${least} to ${most}; ` +
    `threshold ${state.threshold.toFixed(3)}.`;
}

// ---- pictures ----

function add(files) {
  const category = state.model?.category;
  const pictures = [...files].filter((f) => f.type.startsWith("image/") || PICTURE.test(f.name));
  if (!category || !pictures.length) {
    $("summary").textContent =
      category ? "There are no pictures among those files." : "Choose a category first.";
    return;
  }
  for (const file of pictures) {
    const name = file.webkitRelativePath || file.name, picture = URL.createObjectURL(file);
    const empty = { overlay: null, drawn: null, answer: null, problem: null, visible: false };
    const item = { file, category, name, picture, ...empty };
    state.items.push(item);
    state.queue.push({ item, again: false });
  }
  if (matchMedia("(max-width: 52rem)").matches) $("results").scrollIntoView();
  draw();
  pump();
}

function pump() {
  while (state.running < AT_ONCE && state.queue.length) {
    state.running++;
    inspect(state.queue.shift()).finally(() => { state.running--; draw(); pump(); });
  }
}

// Asks about a picture; `again`: only for its overlay, at the threshold and size shown now.
async function inspect({ item, again }) {
  const { category } = item, { threshold } = state, size = Math.ceil(sizeShown(item) / 100) * 100;
  const meant = () => state.items.includes(item) && item.category === category;
  if (!meant() || (again && !isStale(item))) return;
  const query = new URLSearchParams({ map: "overlay", size });
  if (again) query.set("threshold", threshold); // a try: the server does not count it
  const path = `v1/models/${encodeURIComponent(category)}/inspect?${query}`;
  const headers = { "Content-Type": "application/octet-stream" };
  for (;;) {
    try {
      const answer = await json(path, { method: "POST", body: item.file, headers });
      if (!meant()) return;
      item.overlay = `data:image/png;base64,${answer.map.base64}`;
      item.drawn = { size, threshold: again ? threshold : answer.threshold };
      delete answer.map;
      if (!again) item.answer = answer;
      redrawSoon(); // the threshold may have moved meanwhile
    } catch (error) {
      if (error.status === 429 && meant()) { // full: ask again when it says so
        await new Promise((done) => setTimeout(done, 1000 * (Number(error.retry) || 1)));
        continue;
      }
      if (again) item.drawn = { size, threshold }; // the overlay of before stays
      else if (meant()) item.problem = error.message.replace("the image", item.file.name);
    }
    return;
  }
}

// ---- overlays as the screen shows them ----

function sizeShown(item) {
  const large = $("large").open && shown()[state.large] === item;
  const place = large ? $("large-overlay").parentElement : item.card?.image;
  const pixels = Math.max(place?.clientWidth || 184, large ? 0 : place?.clientHeight || 0);
  return Math.ceil(pixels * devicePixelRatio);
}

function isStale(item) {
  if (!item.answer || !item.drawn) return false;
  const most = Math.max(item.answer.width, item.answer.height);
  const small = item.drawn.size < 0.8 * Math.min(sizeShown(item), most);
  return small || Math.abs(item.drawn.threshold - state.threshold) > 1e-9;
}

let timer = null;

function redrawSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const enlarged = $("large").open ? shown()[state.large] : null;
    const seen = state.items.filter((item) => item.visible || item === enlarged);
    const queued = new Set(state.queue.map(({ item }) => item));
    const stale = seen.filter((item) => isStale(item) && !queued.has(item));
    state.queue.push(...stale.map((item) => ({ item, again: true })));
    pump();
  }, PAUSE);
}

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) target.item.visible = isIntersecting;
  redrawSoon();
}, { rootMargin: "200px" });

function clear() {
  for (const item of state.items) URL.revokeObjectURL(item.picture);
  watcher.disconnect();
  state.items = []; state.queue = [];
  $("cards").replaceChildren();
  draw();
}

// ---- results ----

function shown() {
  const show = $("show").value;
  const wanted = (item) => show === "all" || (item.answer && verdict(item) === show);
  const items = state.items.filter(wanted), score = (item) => item.answer?.score ?? -1;
  return $("order").value === "score" ? [...items].sort((a, b) => score(b) - score(a)) : items;
}

function cards() {
  const items = shown(), list = $("cards");
  for (const item of items) item.card ??= card(item);
  const wanted = items.map((item) => item.card.node);
  const same = wanted.length === list.children.length;
  if (!same || wanted.some((node, i) => node !== list.children[i])) list.replaceChildren(...wanted);
  for (const item of items) update(item);
  const done = answered(), defects = done.filter((i) => verdict(i) === "defect").length;
  const problems = state.items.filter((i) => i.problem).length;
  const waiting = state.items.length - done.length - problems, words = [];
  if (done.length) words.push(`${defects} with a defect`, `${done.length - defects} good`);
  if (problems) words.push(`${problems} can't be read`);
  if (waiting) words.push(`${waiting} to go`);
  $("summary").textContent = words.join(", ") || "No pictures yet.";
  $("progress").hidden = !waiting;
  $("progress").max = state.items.length; $("progress").value = state.items.length - waiting;
  $("table").disabled = !(done.length + problems); $("clear").disabled = !state.items.length;
  if ($("large").open) enlarge(state.large);
}

function card(item) {
  const image = element("img", { src: item.picture, alt: "", loading: "lazy" });
  const button = element("button", { type: "button", "aria-label": `Enlarge ${item.name}` }, image);
  const text = element("div", {});
  button.addEventListener("click", () => {
    $("large").showModal();
    enlarge(shown().indexOf(item));
  });
  const node = element("li", { class: "card" }, button, text);
  node.item = item;
  watcher.observe(node);
  return { node, image, button, text, now: null };
}

function update(item) {
  const { node, image, button, text } = item.card;
  const source = item.overlay ?? item.picture;
  if (image.src !== source) image.src = source;
  const now = item.problem ? `!${item.problem}`
    : item.answer ? `${verdict(item)} ${item.answer.version} ${item.answer.score}` : "waiting";
  if (item.card.now === now) return;
  item.card.now = now;
  node.className = `card ${item.answer ? verdict(item) : ""}`;
  button.hidden = Boolean(item.problem);
  if (item.problem) {
    text.replaceChildren(
      element("span", { class: "name" }, item.name),
      element("p", { class: "problem" }, item.problem),
    );
  } else if (item.answer) {
    image.alt = `${item.name} with its heat map`;
    const a = item.answer;
    text.replaceChildren(
      element("span", { class: "name", title: item.name }, item.name), element("br", {}),
      element("span", { class: `verdict ${verdict(item)}` }, verdict(item)), " ",
      element("span", { class: "score" }, `score ${a.score.toFixed(4)}`), element("br", {}),
      element("span", { class: "reading" }, a.reading),
    );
  } else {
    text.replaceChildren(
      element("span", { class: "name" }, item.name), element("br", {}),
      element("span", { class: "reading" }, "waits …"),
    );
  }
}

function enlarge(index) {
  const items = shown();
  if (!items.length) { $("large").close(); return; }
  state.large = (index + items.length) % items.length;
  const item = items[state.large], a = item.answer;
  $("large-title").textContent = item.name;
  $("large-text").textContent = a
    ? `${verdict(item)}: score ${a.score.toFixed(4)}, threshold ${state.threshold.toFixed(4)}; ` +
      `${a.reading} (p = ${a.p_value.toFixed(3)}); ${a.width} × ${a.height} pixels; ` +
      `${a.milliseconds.total.toFixed(0)} ms`
    : item.problem ?? "waits …";
  $("large-picture").src = item.picture; $("large-picture").alt = item.name;
  $("large-overlay").src = item.overlay ?? item.picture;
  $("large-overlay").alt = `${item.name} with its heat map`;
  if (isStale(item)) redrawSoon();
}

// Spreadsheets run texts that start like a formula, so those get an apostrophe before them. Excel
// takes UTF-8 for another code without a byte-order mark.
function table() {
  const cell = (value) => {
    if (typeof value === "number") return String(value);
    const text = String(value ?? ""), safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return `"${safe.replaceAll('"', '""')}"`;
  };
  const head = "name,category,version,score,threshold,verdict,p_value,problem";
  const rows = state.items.filter((item) => item.answer || item.problem).map((item) => {
    const { version, score, p_value } = item.answer ?? {};
    const judged = item.answer ? [version, score, state.threshold, verdict(item), p_value]
      : [null, null, null, null, null];
    return [item.name, item.category, ...judged, item.problem].map(cell).join(",");
  });
  const text = `\ufeff${[head, ...rows].join("\r\n")}\r\n`;
  const href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  const link = element("a", { href, download: `${state.model.category}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ---- keeping a threshold ----

async function keep(method) {
  const token = $("token").value.trim();
  if (!token) {
    $("keeping-problem").textContent = "Type the token. Whoever runs the server knows it.";
    return;
  }
  const body = method === "PUT" ? JSON.stringify({ value: state.threshold }) : undefined;
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
  const path = `v1/models/${encodeURIComponent(state.model.category)}/threshold`;
  try {
    state.model = await json(path, { method, body, headers });
    $("keeping").close();
    move(state.model.threshold.value);
  } catch (error) {
    $("keeping-problem").textContent = error.status === 401
      ? "The server does not know this token. Is it typed as it was given to you?"
      : error.message;
  }
}

// ---- small helpers ----

function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  return entries.length ? (await Promise.all(entries.map(filesIn))).flat() : [...transfer.files];
}

async function filesIn(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) { // a reader gives at most a hundred entries at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    found.push(...some);
  }
  found.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  return (await Promise.all(found.map(filesIn))).flat();
}

// ---- what people do ----

$("category").addEventListener("change", (e) => {
  choose(e.target.value).catch((error) => { $("summary").textContent = error.message; });
});
$("threshold").addEventListener("input", (e) => move(Number(e.target.value)));
$("reset").addEventListener("click", () => move(state.model.threshold.value));
for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", (e) => { add(e.target.files); e.target.value = ""; });
}
for (const id of ["show", "order"]) $(id).addEventListener("change", draw);
$("clear").addEventListener("click", clear);
$("table").addEventListener("click", table);
$("close").addEventListener("click", () => $("large").close());
$("previous").addEventListener("click", () => enlarge(state.large - 1));
$("next").addEventListener("click", () => enlarge(state.large + 1));
$("large").addEventListener("keydown", (e) => {
  if (e.key === "ArrowLeft") enlarge(state.large - 1);
  if (e.key === "ArrowRight") enlarge(state.large + 1);
});
$("keep").addEventListener("click", () => {
  $("keeping-category").textContent = state.model.category;
  $("keeping-value").textContent = state.threshold.toFixed(4);
  $("keeping-problem").textContent = "";
  $("keeping").showModal();
});
$("keeping-form").addEventListener("submit", (e) => { e.preventDefault(); keep("PUT"); });
$("keeping-own").addEventListener("click", () => keep("DELETE"));
$("keeping-cancel").addEventListener("click", () => $("keeping").close());
$("asking-form").addEventListener("submit", (e) => {
  e.preventDefault();
  $("asking").close("given");
});
$("asking-cancel").addEventListener("click", () => $("asking").close());
addEventListener("resize", redrawSoon);
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (e) => { e.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, () => $("drop").classList.remove("over"));
}
document.addEventListener("drop", async (e) => {
  e.preventDefault();
  add(await dropped(e.dataTransfer));
});

start();

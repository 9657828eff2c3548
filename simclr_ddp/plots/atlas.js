"use strict";
// The script of an atlas; atlas.py writes its data. Points are in map units (0 to 65535), the canvas in device pixels.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const n = data.numbers.length;
// Petroff 2021 (arXiv 2107.02270): ten colours that people with colour vision deficiencies can tell apart.
const COLOURS = "#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadd".split(" ");
const RAMP = "#440154 #472d7b #3b528b #2c728e #21918c #28ae80 #5ec962 #addc30 #fde725".split(" "); // viridis
// Corners, size and angle of each shape; groups beyond the ten colours take the next shape.
const SHAPES = [[0, 1, 0], [4, 1.25, Math.PI / 4], [3, 1.45, -Math.PI / 2], [4, 1.3, 0], [3, 1.45, Math.PI / 2]];
const DARK = "#1d2430", DIMMED = "#dfe3e9";
const PICTURES = 250; // largest number of images in view that are drawn as pictures

const unpack = (text, kind) => new kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const neighbours = unpack(data.neighbours, n > 65535 ? Uint32Array : Uint16Array); // [n * k]
const cosines = unpack(data.cosines, Uint16Array); // [n * k], -1 to 1 in steps
const k = neighbours.length / n;
const maps = data.maps.map((map) => ({ name: map.name, points: unpack(map.points, Uint16Array) })); // x, y, x, y ...
const colourings = data.colourings.map((c) => ({ ...c, values: unpack(c.values, Uint16Array) }));
const sheets = data.sheets.map((source) => Object.assign(new Image(), { onload: redraw, src: source }));

const canvas = $("map"), pen = canvas.getContext("2d");
let points = maps[0].points, colouring = colourings[0];
let centre = [32767, 32767], scale = 0.01; // of the view: in map units, and in pixels per unit
let hovered = -1, selected = -1; // images; -1: none
let matches = null, group = -1; // images that the search found, or null; group that the legend selects, or -1
let visited = new Set(), waiting = 0, fitted = false;

const nameOf = (i) => data.names ? data.names[i] : `image ${data.numbers[i]}`;
const x = (i) => (points[2 * i] - centre[0]) * scale + canvas.width / 2;
const y = (i) => (centre[1] - points[2 * i + 1]) * scale + canvas.height / 2;
const neighboursOf = (i) => Array.from(neighbours.subarray(i * k, i * k + k));
const lit = (i) => (matches === null || matches.has(i)) && (group < 0 || colouring.values[i] === group);
const number = (value) => value.toLocaleString("en");
const valueOf = (c, i) => c.names ? c.names[c.values[i]] : rounded(c.low + (c.high - c.low) * c.values[i] / 65535);
const rounded = (value) => String(Number(value.toPrecision(3)));
const fact = (c, i) => `${c.title}: ${valueOf(c, i)}`;
const element = (tag, values = {}) => Object.assign(document.createElement(tag), values);
const whole = () => 0.94 * Math.min(canvas.width, canvas.height) / 65535; // the scale that shows everything
const reach = () => Math.max(radius(), 8 * devicePixelRatio) * 1.5; // of the pointer

function radius() {
  const r = 0.22 * Math.sqrt(canvas.width * canvas.height / n * scale / whole());
  return Math.max(1.1 * devicePixelRatio, Math.min(7 * devicePixelRatio, r));
}

function ramp(t) {
  const place = t * (RAMP.length - 1), low = Math.min(Math.floor(place), RAMP.length - 2);
  const channel = (colour, c) => parseInt(RAMP[colour].slice(1 + 2 * c, 3 + 2 * c), 16);
  const mixed = [0, 1, 2].map((c) => channel(low, c) * (1 - place + low) + channel(low + 1, c) * (place - low));
  return `rgb(${mixed.map(Math.round)})`;
}

// Points of one style are drawn together: a group, or one of 64 steps of the ramp.
const styleOf = (i) => colouring.names ? colouring.values[i] : colouring.values[i] >> 10;
const colourOf = (style) => colouring.names ? COLOURS[style % COLOURS.length] : ramp(style / 63);
const shapeOf = (style) => colouring.names ? SHAPES[Math.floor(style / COLOURS.length) % SHAPES.length] : SHAPES[0];

function trace(pen, [corners, size, angle], x, y, r) {
  if (!corners && r < 2.2) { pen.rect(x - r, y - r, 2 * r, 2 * r); return; } // as good, and much faster
  if (!corners) { pen.moveTo(x + r, y); pen.arc(x, y, r, 0, 7); return; }
  for (let c = 0; c <= corners; c++) {
    const turn = angle + 2 * Math.PI * c / corners;
    pen[c ? "lineTo" : "moveTo"](x + size * r * Math.cos(turn), y + size * r * Math.sin(turn));
  }
}

function drawPicture(pen, i, left, top, side) { // false if its sheet is not decoded yet
  const place = i % data.columns ** 2, sheet = sheets[Math.floor(i / data.columns ** 2)], s = data.side;
  if (!sheet.complete) return false;
  pen.drawImage(sheet, place % data.columns * s, Math.floor(place / data.columns) * s, s, s, left, top, side, side);
  return true;
}

function show(target, i) { // the picture of image i on a canvas of its own
  target.dataset.image = i;
  target.width = target.height = data.side;
  const draw = () => {
    if (target.dataset.image !== String(i)) return; // meanwhile it shows another image
    if (!drawPicture(target.getContext("2d"), i, 0, 0, data.side)) setTimeout(draw, 50);
  };
  draw();
}

function redraw() { waiting ||= requestAnimationFrame(draw); }

function draw() {
  waiting = 0;
  const styles = new Map(), dimmed = [], r = radius(), edge = 20 * devicePixelRatio;
  let shown = 0;
  for (let i = 0; i < n; i++) {
    const px = x(i), py = y(i);
    if (px < -edge || py < -edge || px > canvas.width + edge || py > canvas.height + edge) continue;
    shown++;
    const style = styleOf(i);
    if (!styles.has(style)) styles.set(style, []);
    (lit(i) ? styles.get(style) : dimmed).push(i);
  }
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  drawPoints(dimmed, DIMMED, SHAPES[0], r);
  const drawn = [...styles].sort((a, b) => a[0] - b[0]);
  if (shown <= PICTURES && scale > 1.5 * whole()) {
    for (const [style, images] of drawn) for (const i of images) drawFramed(i, colourOf(style));
  } else {
    pen.globalAlpha = 0.85;
    const rounds = Math.ceil(shown / 1000), part = (images, k) => Math.floor(images.length * k / rounds);
    for (let k = 0; k < rounds; k++) for (const [style, images] of drawn) // in turns, so that no class covers the others
      drawPoints(images.slice(part(images, k), part(images, k + 1)), colourOf(style), shapeOf(style), r);
    pen.globalAlpha = 1;
  }
  if (selected >= 0) {
    [pen.strokeStyle, pen.lineWidth] = [DARK, devicePixelRatio];
    pen.beginPath();
    for (const j of neighboursOf(selected)) { pen.moveTo(x(selected), y(selected)); pen.lineTo(x(j), y(j)); }
    pen.stroke();
    for (const j of neighboursOf(selected)) ring(j, r + 3 * devicePixelRatio, 1.5);
    ring(selected, r + 6 * devicePixelRatio, 3);
  }
  if (hovered >= 0) ring(hovered, r + 3 * devicePixelRatio, 2);
}

function drawPoints(images, colour, shape, r) {
  pen.fillStyle = colour;
  pen.beginPath();
  for (const i of images) trace(pen, shape, x(i), y(i), r);
  pen.fill();
}

function drawFramed(i, colour) {
  const side = 36 * devicePixelRatio, border = 2 * devicePixelRatio;
  pen.fillStyle = colour;
  pen.fillRect(x(i) - side / 2 - border, y(i) - side / 2 - border, side + 2 * border, side + 2 * border);
  drawPicture(pen, i, x(i) - side / 2, y(i) - side / 2, side);
}

function ring(i, r, width) {
  for (const [colour, more] of [["#fff", 2], [DARK, 0]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = (width + more) * devicePixelRatio;
    pen.beginPath();
    pen.arc(x(i), y(i), r, 0, 7);
    pen.stroke();
  }
}

function closest(px, py, limit, but = new Set()) { // the lit image closest to a pixel; -1: none within the limit
  let best = -1, least = limit ** 2;
  for (let i = 0; i < n; i++) {
    const distance = (x(i) - px) ** 2 + (y(i) - py) ** 2;
    if (distance < least && lit(i) && !but.has(i)) { least = distance; best = i; }
  }
  return best;
}

function zoom(factor, px = canvas.width / 2, py = canvas.height / 2) { // the pixel keeps its place
  const before = scale;
  scale = Math.min(Math.max(before * factor, whole() / 2), whole() * 400);
  centre[0] += (px - canvas.width / 2) * (1 / before - 1 / scale);
  centre[1] -= (py - canvas.height / 2) * (1 / before - 1 / scale);
  hover(-1);
}

const move = (dx, dy) => { centre = [centre[0] - dx / scale, centre[1] + dy / scale]; hover(-1); };
const showAll = () => { [centre, scale] = [[32767, 32767], whole()]; hover(-1); };

function hover(i, left, top) { // left, top: of the pointer, in CSS pixels
  hovered = i;
  $("hover").hidden = i < 0;
  if (i >= 0) {
    show($("preview"), i);
    $("name").textContent = `${nameOf(i)} · ${fact(colouring, i)}`;
    const box = $("plot").getBoundingClientRect();
    $("hover").style.left = `${left > box.width - 180 ? left - 160 : left + 16}px`;
    $("hover").style.top = `${Math.max(0, Math.min(top + 16, box.height - 200))}px`;
  }
  redraw();
}

function row(mark, text, note, action) { // of a list: a button
  const item = element("li"), button = element("button", { onclick: action });
  const words = element("span", { textContent: text });
  words.append(element("small", { textContent: note }));
  button.append(mark, words);
  item.append(button);
  return item;
}

function imageRow(i, note) {
  const picture = element("canvas"), item = row(picture, nameOf(i), note, () => select(i, true));
  show(picture, i);
  item.onmouseenter = () => { hovered = i; redraw(); };
  item.onmouseleave = () => { hovered = -1; redraw(); };
  return item;
}

function select(i, follow) { // follow: move the map if the image is out of sight
  selected = i;
  hover(-1);
  $("chosen").hidden = i < 0;
  if (i < 0) return;
  show($("picture"), i);
  const facts = [nameOf(i), `number ${data.numbers[i]}`, ...colourings.map((c) => fact(c, i))];
  $("facts").replaceChildren(...facts.map((text) => element("span", { textContent: text })));
  const about = (j, place) => `${fact(colourings[0], j)}, cosine ${(cosines[i * k + place] / 32767.5 - 1).toFixed(3)}`;
  $("neighbours").replaceChildren(...neighboursOf(i).map((j, place) => imageRow(j, about(j, place))));
  const inside = x(i) > 40 && y(i) > 40 && x(i) < canvas.width - 40 && y(i) < canvas.height - 40;
  if (follow && !inside) centre = [points[2 * i], points[2 * i + 1]];
}

function search() {
  const text = $("search").value.trim().toLowerCase(), has = (name) => name.toLowerCase().includes(text);
  const groups = colourings.filter((c) => c.searchable).map((c) => [c.values, c.names.map(has)]);
  const found = (i) => String(data.numbers[i]) === text || (data.names && has(data.names[i])) ||
    groups.some(([values, hit]) => hit[values[i]]);
  const images = text ? Array.from({ length: n }, (_, i) => i).filter(found) : [];
  matches = text ? new Set(images) : null;
  const more = images.length > 50 ? "; the first 50 are" : "";
  $("count").textContent = text ? `${number(images.length)} of ${number(n)} images${more}` : "";
  $("found").replaceChildren(...images.slice(0, 50).map((i) => imageRow(i, fact(colourings[0], i))));
  redraw();
}

function legend() {
  const counts = new Uint32Array(colouring.names ? colouring.names.length : 0);
  if (colouring.names) for (const value of colouring.values) counts[value]++;
  $("meaning").textContent = colouring.title;
  $("legend").replaceChildren(...Array.from(counts, (count, value) => {
    const mark = element("canvas", { width: 32, height: 32 }), brush = mark.getContext("2d");
    brush.fillStyle = colourOf(value);
    trace(brush, shapeOf(value), 16, 16, 11);
    brush.fill();
    const item = row(mark, `${colouring.names[value]} (${number(count)})`, "", () => {
      group = group === value ? -1 : value;
      legend();
      $("legend").children[value].firstChild.focus();
    });
    item.firstChild.setAttribute("aria-pressed", group === value);
    item.hidden = !count;
    return item;
  }));
  $("bar").hidden = $("ends").hidden = Boolean(colouring.names);
  if (!colouring.names) {
    const brush = $("bar").getContext("2d");
    for (let i = 0; i < 256; i++) { brush.fillStyle = ramp(i / 255); brush.fillRect(i, 0, 1, 1); }
    [colouring.low, colouring.high].forEach((end, i) => { $("ends").children[i].textContent = rounded(end); });
  }
  redraw();
}

function choices(select, titles, choose) {
  select.replaceChildren(...titles.map((title, i) => new Option(title, i)));
  select.onchange = () => choose(Number(select.value));
}

function selectNext() { // walk outwards from the centre
  const next = closest(canvas.width / 2, canvas.height / 2, Infinity, visited);
  visited = next < 0 ? new Set() : visited.add(next);
  if (next >= 0) select(next, false);
}

choices($("projection"), maps.map((map) => map.name), (i) => { points = maps[i].points; showAll(); });
choices($("colour"), colourings.map((c) => c.title), (i) => { colouring = colourings[i]; group = -1; legend(); });
$("search").oninput = search;
$("search").onkeydown = (event) => { if (event.key === "Enter" && matches?.size) select([...matches][0], true); };
$("in").onclick = () => zoom(1.5);
$("out").onclick = () => zoom(1 / 1.5);
$("all").onclick = showAll;

const pixel = (event) => [event.offsetX * devicePixelRatio, event.offsetY * devicePixelRatio];
let pressed = null, last = null; // pixels of a drag: where it began, and where it is
canvas.onpointerdown = (event) => { pressed = last = pixel(event); canvas.setPointerCapture(event.pointerId); };
canvas.onpointermove = (event) => {
  const [px, py] = pixel(event);
  if (!pressed) return hover(closest(px, py, reach()), event.offsetX, event.offsetY);
  move(px - last[0], py - last[1]);
  last = [px, py];
};
canvas.onpointerup = (event) => {
  const [px, py] = pixel(event), still = pressed && Math.hypot(px - pressed[0], py - pressed[1]) < 4 * devicePixelRatio;
  pressed = null;
  if (still) select(closest(px, py, reach()), false);
};
canvas.onpointerleave = canvas.onpointercancel = () => { pressed = null; hover(-1); };
canvas.onwheel = (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 400), ...pixel(event)); };
document.onkeydown = (event) => { if (event.key === "Escape") { group = -1; legend(); select(-1); } };
const KEYS = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: showAll, n: selectNext };
const ARROWS = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
canvas.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (ARROWS[event.key]) { event.preventDefault(); move(...ARROWS[event.key].map((step) => step * devicePixelRatio)); }
  else if (KEYS[event.key.toLowerCase()]) KEYS[event.key.toLowerCase()]();
};
new ResizeObserver(() => {
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
  fitted ? redraw() : showAll();
  fitted = true;
}).observe(canvas);
legend();

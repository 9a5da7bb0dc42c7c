// The image as a grid of patches: drawing it, and choosing patches with pointer and keyboard.
const HEAT = [[0, 0, 4], [64, 15, 108], [148, 38, 103], [221, 81, 58], [251, 166, 10], [252, 255, 164]];

function heat(x) {
  const at = Math.min(Math.max(x, 0), 1) * (HEAT.length - 1), i = Math.min(Math.floor(at), HEAT.length - 2);
  return "rgb(" + HEAT[i].map((low, k) => Math.round(low + (at - i) * (HEAT[i + 1][k] - low))).join(" ") + ")";
}

// A canvas whose pixels divide into the grid, with the image on it; cells by (row, column).
class Board {
  constructor(canvas, pixels) {
    const [h, w] = state.info.grid;
    this.canvas = canvas;
    this.cell = Math.max(8, Math.round(pixels / w));
    canvas.width = this.cell * w;
    canvas.height = this.cell * h;
    this.context = canvas.getContext("2d");
  }
  box(patch) { return [columnOf(patch) * this.cell, rowOf(patch) * this.cell, this.cell, this.cell]; }
  photo() { this.context.drawImage(state.image.picture, 0, 0, this.canvas.width, this.canvas.height); }
  fill(patch, color, alpha = 1) {
    this.context.globalAlpha = alpha;
    this.context.fillStyle = color;
    this.context.fillRect(...this.box(patch));
    this.context.globalAlpha = 1;
  }
  typical(patch, code) { drawTypical(this.context, code, ...this.box(patch)); }
  frame(patch, color, width, inset = 0) {
    const [x, y, w, h] = this.box(patch), d = inset + width / 2;
    this.context.lineWidth = width;
    this.context.strokeStyle = color;
    this.context.strokeRect(x + d, y + d, w - 2 * d, h - 2 * d);
  }
  lines(color) {
    const [h, w] = state.info.grid, c = this.context;
    c.fillStyle = color;
    for (let i = 1; i < w; i++) c.fillRect(i * this.cell - 1, 0, 1, this.canvas.height);
    for (let i = 1; i < h; i++) c.fillRect(0, i * this.cell - 1, this.canvas.width, 1);
  }
}

function drawTypical(context, code, x, y, w, h) {
  const columns = Math.ceil(Math.sqrt(state.info.counts.length)), side = state.typical.width / columns;
  context.drawImage(state.typical, (code % columns) * side, Math.floor(code / columns) * side, side, side, x, y, w, h);
}

function drawBoard() {
  if (!state.image) return;
  const board = state.board, patches = state.image.codes.length;
  board.photo();
  ({tokens: drawTokens, attention: drawAttention, similarity: drawSimilarity, game: drawHidden})[state.mode](board, patches);
  const width = Math.max(3, board.cell / 22);
  board.frame(state.patch, "#fff", width);
  board.frame(state.patch, colorOf("--accent"), width, width);
}

function drawTokens(board, patches) {
  const alpha = $("mix").value / 100, codes = state.image.codes;
  for (let i = 0; i < patches; i++) board.fill(i, state.info.colors[codes[i]], alpha);
  if ($("lines").checked) board.lines("rgb(255 255 255 / .35)");
  if (!$("same").checked) return;
  for (let i = 0; i < patches; i++)
    if (codes[i] === codes[state.patch]) board.frame(i, "#fff", Math.max(2, board.cell / 40), 1);
}

function drawAttention(board, patches) {
  if (!state.attention) return;
  const {heads, most} = state.attention, head = $("att-head").value;
  const chosen = head === "mean" ? heads : [heads[head]];
  const values = chosen[0].map((_, i) => chosen.reduce((sum, row) => sum + row[i], 0) / chosen.length);
  const top = Math.max(...values), keep = $("att-most").checked;
  const kept = i => most[head === "mean" ? 0 : Number(head) + 1][i];
  for (let i = 0; i < patches; i++) {
    const share = keep ? Number(kept(i)) : values[i] / top;
    board.fill(i, "#000", .5 * (1 - share));
    board.fill(i, heat(.35 + .5 * share), keep ? .3 * share : .1 + .65 * share);
  }
}

function drawSimilarity(board, patches) {
  const values = state.image.similarity;
  if (values) for (let i = 0; i < patches; i++) board.fill(i, heat(values[i]), .72);
}

function drawHidden(board) {
  for (const patch of state.hidden) board.fill(patch, "rgb(92 115 153)");
  board.lines("rgb(255 255 255 / .22)");
}

function patchAt(event) {
  const box = state.board.canvas.getBoundingClientRect(), [h, w] = state.info.grid;
  const x = Math.floor((event.clientX - box.left) / box.width * w), y = Math.floor((event.clientY - box.top) / box.height * h);
  return x < 0 || y < 0 || x >= w || y >= h ? null : y * w + x;
}

let tipped = null;  // the patch under the pointer
function showTip(patch = tipped) {
  const tip = $("tip"), [h, w] = state.info.grid;
  tipped = patch;
  tip.hidden = patch === null || !state.image;
  if (tip.hidden) return;
  const code = state.image.codes[patch];
  tip.textContent = state.mode === "similarity" ? `cosine ${state.image.similarity[patch].toFixed(2)}`
    : state.mode === "game" ? (state.hidden.has(patch) ? "hidden" : "seen")
    : `token ${code} · ${percent(state.info.counts[code] / state.total, 2)} of all patches`;
  tip.style.left = (columnOf(patch) + .5) / w * 100 + "%";
  tip.style.top = (rowOf(patch) + .5) / h * 100 + "%";
}

// A drag over the image hides the patches it touches, or shows them if it began on a hidden one.
let stroke = null;
function strokeOver(patch) {
  if (patch === null || !stroke) return;
  if (stroke.hide) state.hidden.add(patch); else state.hidden.delete(patch);
  state.patch = patch;
  gameChanged();
}

function watchBoard(canvas) {
  canvas.addEventListener("pointerdown", event => {
    const patch = patchAt(event);
    if (patch === null || !state.image) return;
    if (state.mode === "game") {
      canvas.setPointerCapture(event.pointerId);
      stroke = {hide: !state.hidden.has(patch)};
      strokeOver(patch);
    } else choose(patch);
  });
  canvas.addEventListener("pointermove", event => {
    const patch = patchAt(event);
    showTip(patch);
    if (stroke && patch !== state.patch) strokeOver(patch);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { stroke = null; });
  canvas.addEventListener("pointerleave", () => showTip(null));
  canvas.addEventListener("keydown", event => {
    const [h, w] = state.info.grid, row = rowOf(state.patch), column = columnOf(state.patch);
    const to = {ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column],
                ArrowDown: [row + 1, column], Home: [row, 0], End: [row, w - 1]}[event.key];
    if (to) {
      choose(Math.min(Math.max(to[0], 0), h - 1) * w + Math.min(Math.max(to[1], 0), w - 1));
    } else if (state.mode === "game" && (event.key === " " || event.key === "Enter")) {
      stroke = {hide: !state.hidden.has(state.patch)};
      strokeOver(state.patch);
      stroke = null;
    } else return;
    event.preventDefault();
  });
}

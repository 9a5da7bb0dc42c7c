// The mask game: the student says what it expects behind hidden patches.
let gameTimer = 0;

function gameChanged() {
  state.guesses = null;
  drawBoard();
  drawPair();
  showTip();
  clearTimeout(gameTimer);
  gameTimer = setTimeout(predict, state.hidden.size ? 120 : 0);
}

function predict() {
  remember();
  if (!state.hidden.size) { showScore(); showBest(); return; }
  latest("predict", ask("predict", {key: state.image.key, hidden: [...state.hidden]}), found => {
    if (found.hidden.length !== state.hidden.size || !found.hidden.every(p => state.hidden.has(p))) return;
    state.guesses = {...found, at: new Map(found.hidden.map((patch, i) => [patch, i]))};
    if (!state.hidden.has(state.patch)) state.patch = found.hidden[0];
    drawBoard();
    drawPair();
    showScore();
    showBest();
  });
}

function drawPair() {
  const right = colorOf("--good"), fair = colorOf("--fair"), wrong = colorOf("--bad"), g = state.guesses;
  for (const [board, truth] of [[state.guess, false], [state.truth, true]]) {
    board.photo();
    const width = Math.max(2, board.cell / 26);
    for (const patch of state.hidden) {
      if (!g) { board.fill(patch, "rgb(92 115 153)"); continue; }
      const i = g.at.get(patch), true_ = g.true[i];
      board.typical(patch, truth ? true_ : g.codes[i][0]);
      if (truth) { board.frame(patch, "rgb(255 255 255 / .5)", 1); continue; }
      board.frame(patch, g.codes[i][0] === true_ ? right : g.codes[i].includes(true_) ? fair : wrong, width);
    }
    if (g && g.at.has(state.patch)) board.frame(state.patch, "#fff", width, width);
  }
}

function showScore() {
  const box = $("score"), big = document.createElement("b"), small = document.createElement("span"), g = state.guesses;
  if (!g || !g.hidden.length) {
    big.textContent = "Hide some patches";
    small.textContent = "and see which tokens the student expects behind them.";
  } else {
    const n = g.hidden.length;
    big.textContent = `${g.right} of ${n} right`;
    small.textContent = `${percent(g.right / n, 0)}; ${g.within} of ${n} have the true token among the first five. ` +
      `Naming the most frequent token each time would be right ${percent(state.info.most_frequent, 1)} of the time.`;
    $("said").textContent = big.textContent;
  }
  box.replaceChildren(big, small);
}

function showBest() {
  const g = state.guesses, i = g && g.at.has(state.patch) ? g.at.get(state.patch) : null;
  drawPair();
  $("best-title").textContent = i === null ? "Choose a hidden patch: the student's first five tokens for it appear here" :
    `Hidden patch in row ${rowOf(state.patch) + 1}, column ${columnOf(state.patch) + 1}: the student's first five`;
  $("best").replaceChildren(...(i === null ? [] : g.codes[i].map((code, k) => bestRow(code, g.chances[i][k], code === g.true[i]))));
  $("best-true").textContent = i === null ? "" :
    `The true token is ${g.true[i]}; the student gives it ${percent(g.true_chance[i])}.`;
}

function bestRow(code, chance, isTrue) {
  const row = document.createElement("li"), canvas = document.createElement("canvas"), name = document.createElement("b");
  const bar = document.createElement("span"), fill = document.createElement("i"), value = document.createElement("span");
  canvas.width = canvas.height = 40;
  drawTypical(canvas.getContext("2d"), code, 0, 0, 40, 40);
  name.textContent = `token ${code}${isTrue ? " ✓" : ""}`;
  bar.className = "bar";
  fill.style.width = 100 * chance + "%";
  bar.append(fill);
  value.textContent = percent(chance);
  row.className = isTrue ? "true" : "";
  row.append(canvas, name, bar, value);
  return row;
}

async function randomBlocks(seed) {
  try {
    const found = await ask(`mask/${seed}`);
    state.hidden = new Set(found.hidden);
    state.patch = found.hidden[0];
    gameChanged();
  } catch (error) { complain(error); }
}

// In the two small pictures a click chooses a hidden patch to look at.
function watchPair() {
  for (const board of [state.guess, state.truth])
    board.canvas.addEventListener("click", event => {
      const box = board.canvas.getBoundingClientRect(), [h, w] = state.info.grid;
      const x = Math.floor((event.clientX - box.left) / box.width * w), y = Math.floor((event.clientY - box.top) / box.height * h);
      state.patch = Math.min(y, h - 1) * w + Math.min(x, w - 1);
      drawBoard();
      showBest();
      remember();
    });
}

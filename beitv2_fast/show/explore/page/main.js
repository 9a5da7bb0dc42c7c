// Starting, images, modes, and the address, which remembers what is shown.
const HELP = {
  tokens: "Each patch has the color of its token; similar colors, similar tokens. Click a patch, or move with the arrow keys.",
  attention: "What the chosen patch attends to in one layer: the brighter, the more. Click another patch, or move with the arrow keys.",
  similarity: "How close the features rebuilt from only the tokens are to the teacher's, patch by patch (cosine).",
  game: "Drag to hide patches, drag from a hidden one to show them. Keyboard: arrow keys move, space hides or shows.",
};

function setMode(mode, focus = false) {
  state.mode = mode;
  for (const tab of document.querySelectorAll("[data-mode]")) {
    if (tab.id === "board") continue;
    const on = tab.dataset.mode === mode;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    if (on && focus) tab.focus();
    if (on) $("controls").setAttribute("aria-labelledby", tab.id);
  }
  $("board").dataset.mode = mode;
  for (const box of document.querySelectorAll("[data-for]")) box.hidden = box.dataset.for !== mode;
  for (const panel of document.querySelectorAll("[data-panel]")) panel.hidden = (panel.dataset.panel === "game") !== (mode === "game");
  $("help").textContent = HELP[mode];
  if (!state.image) return;
  if (mode === "game") gameChanged(); else choose(state.patch);
}

async function setImage(question) {
  try {
    const found = await question;
    const shown = await picture(`/api/image/${found.key}`);
    state.image = {...found, picture: shown};
    state.guesses = state.attention = null;
    for (const button of $("samples").children) button.setAttribute("aria-pressed", button.dataset.key === found.key);
    if (found.similarity) {
      const mean = found.similarity.reduce((a, b) => a + b, 0) / found.similarity.length;
      $("similarity-text").textContent = `Mean ${mean.toFixed(3)}, lowest ${Math.min(...found.similarity).toFixed(3)}; dark is 0, bright is 1.`;
    }
    setMode(state.mode);
  } catch (error) { complain(error); }
}

// A small picture to choose an image by: one of the data set's, or one of the person's own, which stays among them.
function choice(key, name, source, question) {
  const button = document.createElement("button"), img = document.createElement("img");
  button.dataset.key = key;
  button.title = name;
  button.setAttribute("aria-label", name);
  button.setAttribute("aria-pressed", "false");
  img.src = source;
  img.alt = "";
  button.append(img);
  button.addEventListener("click", () => setImage(question()));
  return button;
}

function takeFile(file) {
  if (file) setImage(ask("image", file).then(found => {
    const before = [...$("samples").children].some(button => button.dataset.key === found.key);
    if (!before) $("samples").prepend(choice(found.key, file.name, `/api/image/${found.key}`, () => ask("image", file)));
    return found;
  }));
}

function remember() {
  const values = new URLSearchParams({mode: state.mode, patch: state.patch});
  if (state.image && state.image.key.startsWith("sample-")) values.set("sample", state.image.key.slice(7));
  if (state.hidden.size) values.set("hidden", [...state.hidden].join("."));
  history.replaceState(null, "", "#" + values);
}

function recall() {
  const values = new URLSearchParams(location.hash.slice(1)), last = state.info.grid[0] * state.info.grid[1] - 1;
  const whole = (text, most) => /^\d+$/.test(text || "") ? Math.min(Number(text), most) : 0;
  state.patch = values.has("patch") ? whole(values.get("patch"), last) : Math.floor(state.info.grid[0] / 2 * state.info.grid[1] + state.info.grid[1] / 2);
  state.hidden = new Set((values.get("hidden") || "").split(".").filter(x => /^\d+$/.test(x) && Number(x) <= last).map(Number));
  const mode = values.get("mode"), tab = document.querySelector(`#tab-${["tokens", "attention", "similarity", "game"].includes(mode) ? mode : "tokens"}`);
  return [whole(values.get("sample"), state.info.samples.length - 1), tab.hidden ? "tokens" : tab.dataset.mode];
}

function showFacts() {
  const info = state.info;
  $("facts").textContent = `${info.name}: a codebook of ${number(info.counts.length)} tokens, ${number(info.used)} of them used in ` +
    `${number(info.images)} photographs (perplexity ${info.perplexity.toFixed(0)}). Each image is cut into ${info.grid.join(" × ")} patches, ` +
    `and each patch gets one token. ${info.held_out ? "The images below were kept from the training." : ""}`;
  $("problem").textContent = info.problem || "";
  $("problem").hidden = !info.problem;
  $("tab-game").hidden = !info.game;
  $("tab-similarity").hidden = !info.similarity;
  const names = {student: "student", tokenizer: "tokenizer", teacher: "teacher"};
  $("near-model").replaceChildren(...info.models.map(m => new Option(names[m], m)));
  $("att-model").replaceChildren(...Object.keys(info.depths).map(m => new Option(m === "tokenizer" ? "tokenizer's encoder" : m, m)));
  $("samples").replaceChildren(...info.samples.map((name, i) =>
    choice(`sample-${i}`, `image ${i + 1}: ${name}`, `/api/thumb/${i}`, () => ask(`sample/${i}`))));
}

function watchControls() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => setMode(tab.dataset.mode));
    tab.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], open = tabs.filter(t => !t.hidden);
      if (step) setMode(open[(open.indexOf(tab) + step + open.length) % open.length].dataset.mode, true);
    });
  }
  for (const id of ["mix", "lines", "same", "att-head", "att-most"]) $(id).addEventListener("input", drawBoard);
  $("att-model").addEventListener("input", () => { attentionModelChanged(); showAttention(); });
  $("att-layer").addEventListener("input", showAttention);
  $("near-model").addEventListener("input", () => showPatch(state.image.codes[state.patch], state.patch));
  $("random").addEventListener("click", () => randomBlocks(Math.floor(Math.random() * 2 ** 31)));
  $("clear").addEventListener("click", () => { state.hidden.clear(); gameChanged(); });
  $("file").addEventListener("change", event => { takeFile(event.target.files[0]); event.target.value = ""; });
  const files = event => [...(event.dataTransfer?.items || [])].some(item => item.kind === "file");
  addEventListener("dragover", event => { event.preventDefault(); $("drop").hidden = !files(event); });
  addEventListener("dragleave", event => { if (!event.relatedTarget) $("drop").hidden = true; });
  addEventListener("drop", event => { event.preventDefault(); $("drop").hidden = true; takeFile(event.dataTransfer.files[0]); });
  addEventListener("paste", event => takeFile([...event.clipboardData.files][0]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawBoard);
}

async function begin() {
  try {
    state.info = await ask("info");
    state.total = state.info.counts.reduce((a, b) => a + b, 0);
    state.typical = await picture("/api/typical");
  } catch (error) { complain(error); return; }
  state.board = new Board($("board"), 1120);
  state.guess = new Board($("guess"), 560);
  state.truth = new Board($("truth"), 560);
  showFacts();
  attentionModelChanged();
  watchControls();
  watchBoard($("board"));
  watchPair();
  const [sample, mode] = recall();
  state.mode = mode;
  await setImage(ask(`sample/${sample}`));
  document.body.dataset.ready = "yes";
}
begin();

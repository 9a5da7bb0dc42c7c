// The chosen patch: its token, other patches that have it, its nearest patches, what it attends to.
function choose(patch) {
  state.patch = patch;
  drawBoard();
  remember();
  const code = state.image.codes[patch];
  $("said").textContent = `Row ${rowOf(patch) + 1}, column ${columnOf(patch) + 1}: ` +
    (state.mode === "game" ? (state.hidden.has(patch) ? "hidden" : "seen") : `token ${code}`);
  if (state.mode === "game") { showBest(); return; }
  describe(code, patch);
  clearTimeout(choose.timer);
  choose.timer = setTimeout(() => { showPatch(code, patch); }, 60);  // arrow keys held down ask once
}

function describe(code, patch) {
  const {counts, ranks, colors, images} = state.info;
  $("code").textContent = `Token ${code}`;
  $("place").textContent = `row ${rowOf(patch) + 1}, column ${columnOf(patch) + 1} · ${state.image.name}`;
  $("swatch").style.background = colors[code];
  const context = $("stands").getContext("2d");
  drawTypical(context, code, 0, 0, 64, 64);
  const here = state.image.codes.filter(c => c === code).length;
  $("usage").textContent = (counts[code] === 0 ? `No patch of the ${number(images)} photographs has it` :
    `${number(counts[code])} patches of ${number(images)} photographs have it: ${percent(counts[code] / state.total, 2)}, ` +
    `rank ${ranks[code]} of ${number(counts.length)}`) + `. ${here} in this image.`;
}

function figure(image, patch, code, text) {
  const box = document.createElement("figure"), img = document.createElement("img");
  box.setAttribute("role", "listitem");
  img.src = `/api/patch/${image}/${patch}`;
  img.alt = text || `a patch of photograph ${image + 1}`;
  box.append(img);
  if (text) {
    const caption = document.createElement("figcaption"), dot = document.createElement("i");
    dot.style.background = state.info.colors[code];
    dot.title = `token ${code}`;
    caption.append(text, dot);
    box.append(caption);
  }
  return box;
}

function showPatch(code, patch) {
  latest("code", ask(`code/${code}`), found => {
    $("sheet").replaceChildren(...found.patches.map(([image, at]) => figure(image, at, code)));
    $("none").hidden = found.patches.length > 0;
    $("none").textContent = "There are none in the photographs that were looked at.";
  });
  const key = state.image.key;
  latest("nearest", ask("nearest", {key, patch, model: $("near-model").value}), found => {
    $("nearest").replaceChildren(...found.patches.map(p => figure(p.image, p.patch, p.code, p.cosine.toFixed(2))));
  });
  if (state.mode === "attention") showAttention();
}

function showAttention() {
  const model = $("att-model").value, layer = Number($("att-layer").value);
  $("att-layer-value").textContent = layer;
  latest("attention", ask("attention", {key: state.image.key, patch: state.patch, model, layer}), found => {
    state.attention = found;
    const select = $("att-head"), before = select.value;
    const names = ["mean", ...found.heads.keys()];
    select.replaceChildren(...names.map(name => new Option(name === "mean" ? "mean of all" : String(name + 1), name)));
    select.value = names.map(String).includes(before) ? before : "mean";
    drawBoard();
  });
}

function attentionModelChanged() {
  const depth = state.info.depths[$("att-model").value], slider = $("att-layer");
  slider.max = depth;
  slider.value = depth;
  slider.hidden = depth === 1;
}

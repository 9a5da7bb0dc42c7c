// What the page knows, and how it asks the server.
const $ = id => document.getElementById(id);
const state = {
  info: null,       // facts of the run
  image: null,      // {key, name, codes, similarity, picture: Image}
  typical: null,    // the typical patch of every code, one picture
  mode: "tokens",
  patch: 0,         // the chosen one
  hidden: new Set(),
  guesses: null,    // the student's answer for the hidden patches
  attention: null,  // {heads, most} of the chosen patch
};

async function ask(path, body) {
  const options = body === undefined ? {} : {method: "POST", body: body instanceof Blob ? body : JSON.stringify(body)};
  let answer;
  try {
    answer = await fetch("/api/" + path, options);
  } catch {
    throw new Error("The server does not answer: is `beitv2-fast explore` still running?");
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error || "The server could not answer.");
  return found;
}

let errorTimer = 0;
function complain(error) {
  $("error").textContent = error.message || String(error);
  $("error").hidden = false;
  clearTimeout(errorTimer);
  errorTimer = setTimeout(() => { $("error").hidden = true; }, 8000);
}

// Only the last of several questions of one kind counts: an answer that comes late is dropped.
const asked = {};
async function latest(kind, question, use) {
  const number = asked[kind] = (asked[kind] || 0) + 1;
  try {
    const answer = await question;
    if (asked[kind] === number) use(answer);
  } catch (error) {
    if (asked[kind] === number) complain(error);
  }
}

function picture(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("A picture could not be loaded."));
    image.src = source;
  });
}

const percent = (x, digits = 1) => (100 * x).toFixed(digits) + "\u00a0%";
const number = x => x.toLocaleString("en");
const rowOf = patch => Math.floor(patch / state.info.grid[1]);
const columnOf = patch => patch % state.info.grid[1];
const colorOf = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// What is seen: the conversation, its controls and the measurements. The model is in worker.js.

const element = (id) => document.getElementById(id);
const error = element("error");
const loading = element("loading");
const log = element("log");
const form = element("form");
const prompt = element("prompt");
const status = element("status");
const buttons = { send: element("send"), stop: element("stop"), reset: element("reset") };
const options = new URLSearchParams(location.search);

let worker;
let answer = null;
let started = false;

const MEGABYTE = 1e6;

/** Threads need two headers; where the server sends none, a service worker adds them. */
async function becomeIsolated() {
  const key = "mmfree-isolated";
  if (crossOriginIsolated || !isSecureContext || !navigator.serviceWorker) return false;
  if (options.get("threads") === "1" || sessionStorage.getItem(key)) return false;
  sessionStorage.setItem(key, "tried");
  try {
    await navigator.serviceWorker.register("isolate.js");
    await navigator.serviceWorker.ready;
  } catch (reason) {
    console.warn("one thread only:", reason);
    return false;
  }
  location.reload();
  return true;
}

function start() {
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => receive[data.type](data);
  worker.onerror = (event) => {
    event.preventDefault();
    fail(event.message || "web/worker.js cannot be loaded: copy the folder web again");
  };
  const root = new URL("..", location.href).href;
  worker.postMessage({ type: "load", root, threads: Number(options.get("threads")) });
}

function fail(text) {
  error.textContent = text;
  error.hidden = false;
  loading.hidden = true;
  answer = null;
  enable();
}

function enable() {
  const busy = answer !== null;
  // Screen readers wait for the whole answer.
  log.setAttribute("aria-busy", busy);
  prompt.disabled = !started;
  buttons.send.disabled = !started || busy;
  buttons.stop.disabled = !busy;
  buttons.reset.disabled = !started || busy;
  document.body.dataset.state = busy ? "busy" : started ? "ready" : error.hidden ? "loading" : "failed";
}

function amount(bytes) {
  return bytes < MEGABYTE ? `${Math.max(1, Math.round(bytes / 1000))} kB` : `${(bytes / MEGABYTE).toFixed(1)} MB`;
}

function rate(tokens, seconds) {
  if (!(seconds > 0 && tokens > 0)) return "-";
  const perSecond = tokens / seconds;
  return `${perSecond < 100 ? perSecond.toPrecision(2) : Math.round(perSecond)} tokens/s`;
}

/** The first token of an answer comes with the prompt: the others took the time. */
function showSpeed(count, seconds) {
  element("speed").textContent = rate(count - 1, seconds);
}

function add(parent, tag, className, text = "") {
  const child = document.createElement(tag);
  child.className = className;
  child.textContent = text;
  parent.append(child);
  return child;
}

/** Runs a change of the conversation; keeps its end in sight if it was. */
function scrolled(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

const receive = {
  progress({ done, total }) {
    element("progress").value = done / total;
    element("progress-text").textContent = `Loading the model: ${amount(done)} of ${amount(total)}`;
  },

  compiling() {
    element("progress").removeAttribute("value");
    element("progress-text").textContent = "Preparing the model";
  },

  ready({ manifest, runtime, threads, stateBytes }) {
    const { name, num_layers, hidden_size } = manifest.model;
    element("model").textContent =
      `${name}: ${num_layers} layers, width ${hidden_size}, grade ${manifest.grade}, ` +
      `onnxruntime-web ${runtime}. Nothing you type leaves this page.`;
    element("state").textContent = `${amount(stateBytes)} at any length`;
    element("threads").textContent = threads;
    loading.hidden = true;
    started = true;
    status.textContent = "The model is ready";
    enable();
    prompt.focus();
  },

  state({ read, reading }) {
    element("read").textContent = read;
    if (reading > 0) status.textContent = `${reading} tokens of the prompt are left to read`;
  },

  text({ text, count, seconds }) {
    scrolled(() => answer.append(text));
    showSpeed(count, seconds);
  },

  done({ text, tokens, reason, read, promptTokens, promptSeconds, seconds }) {
    const note = { stopped: " [stopped]", end: " [end of text]", length: "" }[reason];
    scrolled(() => {
      answer.append(text);
      if (note) add(answer.parentElement, "span", "note", note);
    });
    // For programs that drive the page.
    answer.dataset.tokens = tokens.join(",");
    if (tokens.length > 1) showSpeed(tokens.length, seconds);
    element("prompt-speed").textContent = `${promptTokens} tokens, ${rate(promptTokens, promptSeconds)}`;
    element("read").textContent = read;
    status.textContent = `${tokens.length} tokens generated`;
    answer = null;
    enable();
  },

  error({ text }) {
    fail(text);
  },
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (buttons.send.disabled) return;
  error.hidden = true;
  const turn = document.createElement("p");
  turn.className = "turn";
  add(turn, "span", "typed", prompt.value);
  answer = add(turn, "span", "answer");
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  worker.postMessage({
    type: "generate",
    prompt: prompt.value,
    maxTokens: element("max-tokens").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    topK: element("top-k").valueAsNumber,
    seed: element("seed").valueAsNumber,
  });
  prompt.value = "";
  enable();
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

buttons.stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));

buttons.reset.addEventListener("click", () => {
  worker.postMessage({ type: "reset" });
  log.replaceChildren();
  error.hidden = true;
  for (const id of ["speed", "prompt-speed"]) element(id).textContent = "-";
  status.textContent = "The conversation is forgotten";
  prompt.focus();
});

enable();
if (!(await becomeIsolated())) start();

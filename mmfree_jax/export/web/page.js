// What is seen: the conversation, its controls and the measurements. The model is in worker.js.
import { keep, kept } from "./kept.js";
import { fillSettings, readSettings, typedSettings } from "./settings.js";

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
// The prompt of an answer that is not complete.
let asked = "";
let started = false;
// The complete turns, the model's state behind them and the model that it is of.
let conversation = { model: null, turns: [], memory: null };

const MEGABYTE = 1e6;

/** Threads need two headers; where the server sends none, a service worker adds them. */
async function becomeIsolated() {
  const key = "isolated";
  if (crossOriginIsolated || !isSecureContext || !navigator.serviceWorker) return false;
  if (options.get("threads") === "1" || kept(key)) return false;
  // Where nothing can be kept, the page would load itself for ever.
  if (!keep(key, "tried")) return false;
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
  if (answer !== null) {
    // What was asked can be asked again, of the model as it was before.
    answer.parentElement.remove();
    const { memory } = conversation;
    worker.postMessage(memory ? { type: "restore", memory } : { type: "reset" });
    prompt.value = draft();
    asked = "";
    answer = null;
  }
  enable();
}

/** What is typed and not answered. */
function draft() {
  return [asked, prompt.value].filter(Boolean).join("\n");
}

function keepTyped() {
  keep("draft", draft());
  keep("settings", typedSettings());
}

function enable() {
  const busy = answer !== null;
  // Screen readers wait for the whole answer.
  log.setAttribute("aria-busy", busy);
  buttons.send.disabled = !started || busy;
  buttons.stop.disabled = !busy;
  buttons.reset.disabled = !started || busy;
  // Who works the page by keyboard does not lose the place with a button that is switched off.
  if (document.activeElement?.matches("button:disabled:focus-visible")) prompt.focus();
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

/** A turn in the conversation; returns the place of its answer. */
function addTurn(typed) {
  const turn = add(log, "p", "turn");
  add(turn, "span", "hidden speaker", "You: ");
  add(turn, "span", "typed", typed);
  add(turn, "span", "hidden speaker", "Model: ");
  return add(turn, "span", "answer");
}

function addNote(place, note) {
  if (note) add(place.parentElement, "span", "note", note);
}

/** Tokens of the conversation; the pending ones are read with the next prompt. */
function wasRead(memory) {
  return memory.read + memory.pending.length;
}

/** Shows what was kept, if it is of this model; the worker takes up its state. */
function restore(manifest) {
  const model = JSON.stringify(manifest.files);
  const size = manifest.state_shape.reduce((n, d) => n * d, 1);
  const found = kept("conversation");
  if (found?.model === model && found.memory?.state?.length === size) {
    conversation = found;
    for (const { typed, text, note } of found.turns) {
      const place = addTurn(typed);
      place.textContent = text;
      addNote(place, note);
    }
    log.scrollTop = log.scrollHeight;
    worker.postMessage({ type: "restore", memory: found.memory });
    element("read").textContent = wasRead(found.memory);
  } else {
    conversation = { model, turns: [], memory: null };
    keep("conversation", null);
  }
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
    restore(manifest);
    enable();
    if (document.activeElement === document.body) prompt.focus();
  },

  state({ read, reading }) {
    element("read").textContent = read;
    if (reading > 0) status.textContent = `${reading} tokens of the prompt are left to read`;
  },

  text({ text, count, seconds }) {
    scrolled(() => answer.append(text));
    showSpeed(count, seconds);
  },

  done({ text, tokens, reason, memory, promptTokens, promptSeconds, seconds }) {
    const note = { stopped: " [stopped]", end: " [end of text]", length: "" }[reason];
    scrolled(() => {
      answer.append(text);
      addNote(answer, note);
    });
    // For programs that drive the page.
    answer.dataset.tokens = tokens.join(",");
    if (tokens.length > 1) showSpeed(tokens.length, seconds);
    element("prompt-speed").textContent = `${promptTokens} tokens, ${rate(promptTokens, promptSeconds)}`;
    element("read").textContent = wasRead(memory);
    conversation.turns.push({ typed: asked, text: answer.textContent, note });
    conversation.memory = memory;
    const isKept = keep("conversation", conversation);
    if (!isKept) keep("conversation", null);
    status.textContent =
      `${tokens.length} tokens generated` + (isKept ? "" : "; this browser keeps them until a reload only");
    asked = "";
    answer = null;
    keepTyped();
    enable();
  },

  error({ text }) {
    fail(text);
  },
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (buttons.send.disabled) return;
  const settings = readSettings();
  if (settings === null) {
    status.textContent = "Not sent: a setting is wrong";
    return;
  }
  error.hidden = true;
  asked = prompt.value;
  answer = addTurn(asked);
  log.scrollTop = log.scrollHeight;
  worker.postMessage({
    type: "generate",
    prompt: asked,
    maxTokens: settings["max-tokens"],
    temperature: settings.temperature,
    topK: settings["top-k"],
    seed: settings.seed,
  });
  prompt.value = "";
  keepTyped();
  enable();
});

form.addEventListener("input", keepTyped);

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

function stop() {
  if (answer !== null) worker.postMessage({ type: "stop" });
}

buttons.stop.addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

buttons.reset.addEventListener("click", () => {
  worker.postMessage({ type: "reset" });
  conversation = { ...conversation, turns: [], memory: null };
  keep("conversation", null);
  log.replaceChildren();
  error.hidden = true;
  for (const id of ["speed", "prompt-speed"]) element(id).textContent = "-";
  status.textContent = "The conversation is forgotten";
  prompt.focus();
});

prompt.value = kept("draft") ?? "";
fillSettings(kept("settings"));
enable();
// Browsers may bring back the page as it was when it loaded itself anew: it would wait for ever.
addEventListener("pageshow", ({ persisted }) => {
  if (persisted && !worker) location.reload();
});
if (!(await becomeIsolated())) start();

// A conversation with the server that this page comes from, by OpenAI's interface.
import { keep, kept } from "./kept.js";
import { fillSettings, readSettings, typedSettings } from "./settings.js";

const element = (id) => document.getElementById(id);
const [error, entry, log, form, prompt, mode, status] =
  ["error", "entry", "log", "form", "prompt", "mode", "status"].map(element);
const buttons = { send: element("send"), stop: element("stop"), reset: element("reset") };

let model = null;
let stopping = null;
// Pairs of what was typed and what was answered.
let turns = kept("turns") ?? [];

/** Asks the server; an error is thrown with its message. */
async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = kept("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
  });
  if (response.ok) return response;
  entry.hidden = response.status !== 401;
  if (!entry.hidden) element("key").focus();
  const found = await response.json().catch(() => null);
  throw new Error(found?.error?.message ?? `the server answers ${response.status}`);
}

/** The values of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function add(parent, tag, className, text = "") {
  const child = document.createElement(tag);
  child.className = className;
  child.textContent = text; // never as HTML
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

function enable() {
  const busy = stopping !== null;
  log.setAttribute("aria-busy", busy);
  buttons.send.disabled = model === null || busy;
  buttons.stop.disabled = !busy;
  buttons.reset.disabled = busy;
  if (document.activeElement?.matches("button:disabled:focus-visible")) prompt.focus();
  document.body.dataset.state = busy ? "busy" : model === null ? "failed" : "ready";
}

function fail(reason) {
  error.textContent = reason.message;
  error.hidden = false;
}

function request(typed, settings) {
  const body = {
    model,
    max_tokens: settings["max-tokens"],
    temperature: Math.min(2, settings.temperature),
    top_k: settings["top-k"],
    seed: settings.seed,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (mode.value === "chat") {
    const messages = turns.flatMap(([user, assistant]) => [
      { role: "user", content: user },
      { role: "assistant", content: assistant },
    ]);
    return ["v1/chat/completions", { ...body, messages: [...messages, { role: "user", content: typed }] }];
  }
  return ["v1/completions", { ...body, prompt: turns.flat().join("") + typed }];
}

async function send(typed, settings) {
  stopping = new AbortController();
  error.hidden = true;
  enable();
  const place = addTurn(typed);
  const begun = performance.now();
  let first = null;
  try {
    const [path, body] = request(typed, settings);
    for await (const chunk of events(await ask(path, body, stopping.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      const text = chunk.choices[0]?.text ?? chunk.choices[0]?.delta?.content ?? "";
      if (text) first ??= performance.now();
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      place.append(text);
      if (atEnd) log.scrollTop = log.scrollHeight;
      if (chunk.usage) measure(chunk.usage, begun, first);
    }
  } catch (reason) {
    if (reason.name !== "AbortError") fail(reason);
    if (place.textContent === "") {
      // It can be sent again.
      place.parentElement.remove();
      prompt.value = prompt.value || typed;
    } else {
      add(place.parentElement, "span", "note", " [stopped]");
    }
  }
  if (place.isConnected) {
    turns.push([typed, place.textContent]);
    if (!keep("turns", turns)) keep("turns", null);
  }
  status.textContent = place.isConnected ? "The answer has ended" : "There is no answer";
  stopping = null;
  enable();
}

function measure(usage, begun, first) {
  if (first === null) return;
  element("first").textContent = `${Math.round(first - begun)} ms`;
  const seconds = (performance.now() - first) / 1000;
  const rate = (usage.completion_tokens - 1) / seconds;
  element("speed").textContent = rate > 0 && seconds > 0 ? `${rate.toPrecision(3)} tokens/s` : "-";
  const cached = usage.prompt_tokens_details.cached_tokens;
  element("usage").textContent = `${usage.prompt_tokens} tokens, ${cached} of them known`;
}

async function start() {
  try {
    const found = (await (await ask("v1/models")).json()).data[0];
    model = found.id;
    mode.value = kept("mode") ?? (found.has_chat_template ? "chat" : "text");
    element("model").textContent = `${model}, on this server, which reads what you send.`;
    entry.hidden = error.hidden = true;
    if (document.activeElement === document.body) prompt.focus();
  } catch (reason) {
    fail(reason);
  }
  enable();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (buttons.send.disabled) return;
  const settings = readSettings();
  if (settings === null) {
    status.textContent = "Not sent: a setting is wrong";
    return;
  }
  const typed = prompt.value;
  prompt.value = "";
  send(typed, settings);
});

entry.addEventListener("submit", (event) => {
  event.preventDefault();
  keep("key", element("key").value);
  start();
});

form.addEventListener("input", () => {
  keep("settings", typedSettings());
  keep("mode", mode.value);
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

buttons.stop.addEventListener("click", () => stopping?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopping?.abort();
});

buttons.reset.addEventListener("click", () => {
  turns = [];
  keep("turns", null);
  log.replaceChildren();
  error.hidden = true;
  status.textContent = "The conversation is forgotten";
  prompt.focus();
});

fillSettings(kept("settings"));
for (const [typed, text] of turns) addTurn(typed).textContent = text;
start();

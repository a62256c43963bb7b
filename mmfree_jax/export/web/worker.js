// The model, off the page's thread: loads an export, keeps the state, and generates.
import { fetchChecked, fetchJson, fetchManifest, LoadError } from "./files.js";
import { chooseToken, randomNumbers } from "./sampling.js";
import { makeTokenizer, TextStream } from "./tokenizer.js";

const FORMAT = "mmfree-onnx";
const VERSION = 1;
// The first release whose WebAssembly build reads two-bit weights (the type UINT2).
const MINIMUM_RUNTIME = "1.24.0";
// Tokens of a prompt that are read in one call: progress and Stop come between calls.
const CHUNK = 128;
const MOST_THREADS = 4;
// Small models generate faster than a page can be drawn: text goes there this often, in ms.
const DRAWING = 40;

let session, tokenizer, manifest;
let state, logits, read, pending, stopping;

onmessage = async ({ data }) => {
  try {
    if (data.type === "load") await load(new URL(data.root), data.threads);
    else if (data.type === "generate") await generate(data);
    else if (data.type === "reset") reset();
    else if (data.type === "restore") restore(data.memory);
    else if (data.type === "stop") stopping = true;
  } catch (error) {
    const known = error instanceof LoadError;
    if (!known) console.error(error);
    postMessage({ type: "error", text: known ? error.message : `unexpected: ${describe(error)}` });
  }
};

/** ONNX Runtime throws numbers where it has no words. */
function describe(error) {
  return typeof error === "number" ? `ONNX Runtime error ${error}` : String(error?.message ?? error);
}

async function load(root, threads) {
  checkBrowser();
  const [ort, tokenizers] = await Promise.all([
    vendored("ort.wasm.min.mjs"),
    vendored("tokenizers.min.mjs"),
  ]);
  const runtime = ort.env.versions.web ?? ort.env.versions.common;
  if (older(runtime, MINIMUM_RUNTIME)) {
    throw new LoadError(
      `onnxruntime-web ${runtime} does not read two-bit weights: install ` +
        `${MINIMUM_RUNTIME} or newer (npm ci && npm run build)`,
    );
  }
  manifest = await fetchManifest(root, FORMAT, VERSION);
  tokenizer = makeTokenizer(await tokenizerSpec(root), tokenizers);

  ort.env.wasm.numThreads = threads || threadCount();
  ort.env.wasm.wasmPaths = new URL("vendor/", import.meta.url).href;
  ort.env.logLevel = "error";
  const { graph, data } = graphFiles();
  const total = manifest.files[graph].bytes + data.reduce((n, f) => n + manifest.files[f].bytes, 0);
  let done = 0;
  const fetched = (name) =>
    fetchChecked(root, name, manifest.files[name], (bytes) => {
      done += bytes;
      postMessage({ type: "progress", done, total });
    });
  const model = await fetched(graph);
  const externalData = [];
  for (const path of data) externalData.push({ path, data: await fetched(path) });
  postMessage({ type: "compiling" });
  try {
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], externalData });
  } catch (error) {
    throw new LoadError(
      `onnxruntime-web ${runtime} cannot load ${graph}: ${describe(error)}. If memory ran out, take ` +
        "a smaller model; else export again, or install the newest runtime",
    );
  }
  Tensor = ort.Tensor;
  reset();
  postMessage({
    type: "ready",
    manifest,
    runtime,
    threads: ort.env.wasm.numThreads,
    stateBytes: state.data.byteLength,
  });
}

let Tensor;

/** What the page knows of the tokenizer; older exports list no checksum of it. */
async function tokenizerSpec(root) {
  const name = "web/tokenizer.json";
  const entry = manifest.web_tokenizer;
  if (!entry) return fetchJson(root, name);
  return JSON.parse(new TextDecoder().decode(await fetchChecked(root, name, entry, () => {})));
}

/** The graph for WebAssembly, and the files that hold its weights. */
function graphFiles() {
  const graph = manifest.web_graph ?? manifest.graph;
  const data = Object.keys(manifest.files).filter((name) => name.endsWith(".onnx.data"));
  for (const name of [graph, ...data]) {
    if (!manifest.files[name]) {
      throw new LoadError(`export.json does not list ${name}: repeat \`mmfree export onnx\``);
    }
  }
  return { graph, data };
}

function checkBrowser() {
  // A function of one instruction on a 128-bit vector.
  const simd = [
    0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15,
    253, 98, 11,
  ];
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
    throw new LoadError(
      "this browser has no WebAssembly SIMD: use Chrome or Edge 91, Firefox 89, Safari 16.4, or newer",
    );
  }
}

async function vendored(name) {
  try {
    return await import(`./vendor/${name}`);
  } catch (error) {
    console.error(error);
    throw new LoadError(
      `web/vendor/${name} cannot be loaded: run "npm ci && npm run build" in the folder web`,
    );
  }
}

function threadCount() {
  return globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;
}

function older(version, minimum) {
  const parts = (text) => text.split(/[.-]/).slice(0, 3).map(Number);
  const [a, b] = [parts(version), parts(minimum)];
  const i = a.findIndex((n, at) => n !== b[at]);
  return i >= 0 && a[i] < b[i];
}

/** Forgets everything that was read. */
function reset() {
  const shape = manifest.state_shape;
  state = new Tensor("float32", new Float32Array(shape.reduce((n, d) => n * d, 1)), shape);
  read = 0;
  pending = [];
  logits = null;
  postMessage({ type: "state", read });
}

/** What `restore` takes: the state behind what was read, as numbers that JSON holds exactly. */
function memory() {
  // With tokens left to read the logits come from those.
  const last = pending.length > 0 || logits === null ? null : Array.from(logits);
  return { state: Array.from(state.data), read, pending, logits: last };
}

/** Takes up a conversation where `memory` left it. */
function restore(memory) {
  state = new Tensor("float32", Float32Array.from(memory.state), manifest.state_shape);
  ({ read, pending } = memory);
  logits = memory.logits && Float32Array.from(memory.logits);
}

/** Reads tokens: sets the state, and the logits behind the last one. */
async function step(ids) {
  const tokens = new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const outputs = await session.run({ tokens, state });
  state = outputs.next_state;
  logits = outputs.logits.data;
  if (!logits.every(Number.isFinite)) {
    throw new LoadError(
      "the model's logits are not finite: its weights are damaged, export a sound one",
    );
  }
  read += ids.length;
}

/** Lets messages in: a Stop that waits is seen. */
function breathe() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

async function generate({ prompt, maxTokens, temperature, topK, seed }) {
  stopping = false;
  const first = read === 0 && pending.length === 0;
  const ids = promptIds(prompt, first);
  const text = new TextStream(tokenizer, tokenizer.stripSpace && first && prompt === "");
  const random = randomNumbers(seed);
  let start = performance.now();
  const unread = [...pending, ...ids];
  pending = [];
  for (let at = 0; at < unread.length && !stopping; at += CHUNK) {
    await step(unread.slice(at, at + CHUNK));
    postMessage({ type: "state", read, reading: unread.length - at - CHUNK });
    await breathe();
    if (stopping) pending = unread.slice(at + CHUNK);
  }
  const promptSeconds = (performance.now() - start) / 1000;

  const tokens = [];
  let reason = "stopped";
  let waiting = "";
  start = performance.now();
  let drawn = -Infinity;
  const ends = manifest.end_ids ?? [manifest.eos_token_id];
  while (!stopping) {
    const id = chooseToken(logits, { temperature, topK }, random);
    tokens.push(id);
    // The last token is read with the next prompt, so that nothing is computed in vain.
    pending = [id];
    const now = performance.now();
    if (ends.includes(id)) reason = "end";
    else waiting += text.push(id);
    if (now - drawn >= DRAWING) {
      postMessage({ type: "text", text: waiting, count: tokens.length, seconds: (now - start) / 1000 });
      waiting = "";
      drawn = now;
    }
    if (reason === "end" || tokens.length >= maxTokens) {
      if (reason !== "end") reason = "length";
      break;
    }
    await step(pending);
    pending = [];
    await breathe();
  }
  postMessage({
    type: "done",
    text: waiting + text.flush(),
    tokens,
    reason,
    memory: memory(),
    promptTokens: unread.length,
    promptSeconds,
    seconds: (performance.now() - start) / 1000,
  });
}

/** As `mmfree generate` reads a prompt: behind the start-of-text token, or going on. */
function promptIds(prompt, first) {
  const ids = tokenizer.encode(prompt);
  if (!first) return ids;
  if (tokenizer.bosId !== null) return [tokenizer.bosId, ...ids];
  return ids.length > 0 ? ids : tokenizer.startIds;
}

// The files of an export: fetched with progress, checked against the sizes and checksums of
// export.json.

/** What the reader of the page can put right; its message says how. */
export class LoadError extends Error {}

const AGAIN = "copy it again, or repeat `mmfree export onnx`";

async function open(root, name) {
  const url = new URL(name, root);
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new LoadError(`${name} cannot be fetched from ${url.origin}: is the server still running?`);
  }
  if (!response.ok) {
    throw new LoadError(`${name} is missing (HTTP ${response.status} for ${url.pathname}): ${AGAIN}`);
  }
  return response;
}

/** The contents of a JSON file. */
export async function fetchJson(root, name) {
  const text = await (await open(root, name)).text();
  try {
    return JSON.parse(text);
  } catch {
    throw new LoadError(`${name} is not JSON, or it is truncated: ${AGAIN}`);
  }
}

// What is read of export.json, and what each has to be.
const FIELDS = {
  files: (v) => typeof v === "object" && v !== null && Object.values(v).every(isEntry),
  graph: (v) => typeof v === "string",
  state_shape: (v) => Array.isArray(v) && v.length === 3 && v.every((n) => Number.isInteger(n) && n > 0),
  start_ids: (v) => Array.isArray(v),
};

const isEntry = (v) => Number.isInteger(v?.bytes) && v.bytes >= 0 && typeof v.sha256 === "string";

/** export.json, of a format and version that this page reads, as it was written. */
export async function fetchManifest(root, format, version) {
  const manifest = await fetchJson(root, "export.json");
  if (manifest?.format !== format || manifest.version !== version) {
    throw new LoadError(
      `export.json is of format ${manifest?.format} ${manifest?.version}, this page reads ${format} ` +
        `${version}: use the page of the release that exported the model`,
    );
  }
  const wrong = Object.keys(FIELDS).filter((name) => !FIELDS[name](manifest[name]));
  if (wrong.length > 0) throw new LoadError(`export.json is damaged (${wrong.join(", ")}): ${AGAIN}`);
  const { sha256, ...signed } = manifest; // older exports have none
  const found = sha256 && (await digestOf(new TextEncoder().encode(canonical(signed))));
  if (found && found !== sha256) {
    throw new LoadError(`export.json does not match its own checksum: ${AGAIN}`);
  }
  return manifest;
}

/** A value as Python's `json.dumps(value, sort_keys=True)` writes it. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(", ")}]`;
  if (typeof value !== "object" || value === null) {
    const escaped = (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`;
    return JSON.stringify(value).replace(/[\u0080-\uffff]/g, escaped);
  }
  const names = Object.keys(value).sort();
  return `{${names.map((name) => `${canonical(name)}: ${canonical(value[name])}`).join(", ")}}`;
}

/** SHA-256 in hexadecimal; null where the browser has none: it offers it to pages from https or this
 * machine only. */
async function digestOf(bytes) {
  if (!globalThis.crypto?.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
}

/**
 * The bytes of a file that export.json lists.
 *
 * @param {URL} root folder of the export.
 * @param {string} name of the file.
 * @param {{bytes: number, sha256: string}} entry what export.json says of it.
 * @param {(bytes: number) => void} onBytes called with the size of each piece that arrives.
 * @returns {Promise<Uint8Array>}
 */
export async function fetchChecked(root, name, entry, onBytes) {
  const response = await open(root, name);
  const bytes = room(name, entry.bytes);
  const reader = response.body.getReader();
  let size = 0;
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch {
      throw new LoadError(`${name} broke off after ${size} of ${entry.bytes} bytes: load the page again`);
    }
    if (piece.done) break;
    if (size + piece.value.length <= entry.bytes) bytes.set(piece.value, size);
    size += piece.value.length;
    onBytes(piece.value.length);
  }
  if (size !== entry.bytes) {
    throw new LoadError(`${name} has ${size} bytes, export.json says ${entry.bytes}: ${AGAIN}`);
  }
  const found = await digestOf(bytes);
  if (found !== null && found !== entry.sha256) {
    throw new LoadError(`${name} does not have the checksum that export.json says: ${AGAIN}`);
  }
  return bytes;
}

function room(name, size) {
  try {
    return new Uint8Array(size);
  } catch {
    const shown = `${Math.round(size / 1e6)} MB`;
    throw new LoadError(`this browser has no room for ${name} (${shown}): close tabs, or take a smaller model`);
  }
}

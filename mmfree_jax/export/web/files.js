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
  const bytes = new Uint8Array(entry.bytes);
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
  // Browsers offer checksums to pages from https or this machine only.
  if (globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
    if (hex !== entry.sha256) {
      throw new LoadError(`${name} does not have the checksum that export.json says: ${AGAIN}`);
    }
  }
  return bytes;
}

// From text to ids as Python does it, and from ids to bytes.
import { LoadError } from "./files.js";

const FORMAT = "mmfree-web-tokenizer";
const VERSION = 1;

/**
 * @param {object} spec what `mmfree_jax/export/web_tokenizer.py` writes.
 * @param {object} library the module @huggingface/tokenizers.
 * @returns {{bosId: ?number, eosId: ?number, startIds: number[], stripSpace: boolean,
 *   encode: (text: string) => number[], bytes: (id: number) => ?Uint8Array}}
 *   `bytes` is null for special tokens.
 */
export function makeTokenizer(spec, library) {
  if (spec.format !== FORMAT || spec.version !== VERSION) {
    throw new LoadError(
      `the tokenizer is of format ${spec.format} ${spec.version}, this page reads ${FORMAT} ` +
        `${VERSION}: export again with the release that the page is from`,
    );
  }
  const encode = spec.kind === "byte" ? encodeBytes : encoderOf(spec.encoder, library);
  const table = spec.bytes.map((text) =>
    text === null ? null : Uint8Array.from(atob(text), (c) => c.charCodeAt(0)),
  );
  for (const [text, ids] of spec.checks) {
    const here = encode(text);
    if (here.length !== ids.length || here.some((id, i) => id !== ids[i])) {
      throw new LoadError(
        `the tokenizer gives other ids here than in Python for ${JSON.stringify(text)}: ` +
          "use a newer browser, or report this tokenizer",
      );
    }
  }
  return {
    bosId: spec.bos_id,
    eosId: spec.eos_id,
    startIds: spec.start_ids,
    stripSpace: spec.strip_space,
    encode,
    bytes: (id) => table[id] ?? null,
  };
}

function encodeBytes(text) {
  return Array.from(new TextEncoder().encode(text));
}

function encoderOf(encoder, library) {
  const tokenizer = new library.Tokenizer(encoder, {});
  return (text) => (text === "" ? [] : tokenizer.encode(text, { add_special_tokens: false }).ids);
}

/** Bytes to text as they come; a character shows once its last byte is there. */
export class TextStream {
  /** @param {boolean} stripSpace whether the first space is the tokenizer's own. */
  constructor(tokenizer, stripSpace) {
    this.tokenizer = tokenizer;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.strip = stripSpace;
  }

  /** The text that a token completes. */
  push(id) {
    const bytes = this.tokenizer.bytes(id);
    return bytes === null ? "" : this.first(this.decoder.decode(bytes, { stream: true }));
  }

  /** What was held back, now that nothing follows: U+FFFD for bytes that are no character. */
  flush() {
    return this.first(this.decoder.decode());
  }

  first(text) {
    if (!this.strip || text === "") return text;
    this.strip = false;
    return text.startsWith(" ") ? text.slice(1) : text;
  }
}

// Copies what the page loads at run time from node_modules/ to vendor/. A page that is put on a
// server needs vendor/ but not node_modules/.
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";

const FILES = [
  "onnxruntime-web/dist/ort.wasm.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
  "@huggingface/tokenizers/dist/tokenizers.min.mjs",
];

const here = import.meta.dirname;
const vendor = join(here, "vendor");
mkdirSync(vendor, { recursive: true });
for (const file of FILES) {
  const source = join(here, "node_modules", file);
  if (!existsSync(source)) {
    console.error(`${file} is missing: run "npm ci" first`);
    process.exit(2);
  }
  if (file.endsWith(".mjs")) {
    // Without the comment that names a source map, which is not copied.
    const text = readFileSync(source, "utf8");
    writeFileSync(join(vendor, basename(file)), text.replace(/\n\/\/# sourceMappingURL=.*\s*$/, "\n"));
  } else {
    copyFileSync(source, join(vendor, basename(file)));
  }
}
console.log(`${FILES.length} files in vendor/`);

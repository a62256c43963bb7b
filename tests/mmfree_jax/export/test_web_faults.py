"""What is wrong with the files of an export's web page, or with its browser, is said on it."""

import json

import pytest
from onnx_folders import manifest_of

from mmfree_jax.experiments.bench.browser import show, text_of

pytestmark = pytest.mark.timeout(180)


def test_what_is_wrong_with_the_files_is_said(site, browser, monkeypatch):
    data = (site.folder / "model.onnx.data").read_bytes()
    graph = json.loads((site.folder / "export.json").read_text())["web_graph"]
    written = (site.folder / "web" / "tokenizer.json").read_bytes()
    assert b'"strip_space":true' in written
    tokenizer = json.loads(written)
    tokenizer["checks"][0][1][0] += 1
    unsigned = manifest_of(site.folder, sign=None, web_tokenizer=None)
    files = json.loads(unsigned)["files"]
    huge = files | {graph: files[graph] | {"bytes": 2**50}}
    old = b"export const env = {versions: {common: '1.23.2', web: '1.23.2'}, wasm: {}};"
    worker = (site.folder / "web" / "worker.js").read_bytes()
    no_simd = b"WebAssembly.validate = () => false;\n" + worker
    faults = {
        "model.onnx.data has 1000 bytes": {"model.onnx.data": data[:1000]},
        "model.onnx.data does not have the checksum": {
            "model.onnx.data": data[:-1] + bytes([data[-1] ^ 1])
        },
        f"{graph} is missing (HTTP 404": {graph: None},
        "export.json is missing": {"export.json": None},
        "export.json is not JSON": {"export.json": b'{"format": '},
        "export.json is of format mmfree-onnx 9": {
            "export.json": manifest_of(site.folder, version=9)
        },
        "export.json is of format undefined": {"export.json": b"null"},
        "export.json is damaged (files, state_shape)": {
            "export.json": manifest_of(site.folder, files={graph: 1}, state_shape=[2])
        },
        "export.json does not match its own checksum": {
            "export.json": manifest_of(site.folder, sign=False, start_ids=[7])
        },
        "web/tokenizer.json does not have the checksum": {
            "web/tokenizer.json": written.replace(b'"strip_space":true', b'"strip_space":null')
        },
        f"this browser has no room for {graph}": {
            "export.json": manifest_of(site.folder, sign=None, files=huge)
        },
        "other ids here than in Python": {
            "web/tokenizer.json": json.dumps(tokenizer).encode(),
            "export.json": unsigned,
        },
        "npm ci && npm run build": {"web/vendor/ort.wasm.min.mjs": None},
        "no WebAssembly SIMD": {"web/worker.js": no_simd},
        "onnxruntime-web 1.23.2 does not read two-bit weights": {
            "web/vendor/ort.wasm.min.mjs": old
        },
    }
    for message, instead in faults.items():
        monkeypatch.setattr(site, "instead", instead)
        assert show(browser, site, "?threads=1") == "failed", message
        assert message in text_of(browser, "error")
        assert not browser.find_element("id", "send").is_enabled()

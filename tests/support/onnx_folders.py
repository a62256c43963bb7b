"""ONNX exports in tests: parts of their graphs run, their folders damaged, their example tried."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
from initial_params import initial_params
from onnx import helper

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.export import onnx_export, onnx_graph, onnx_session
from mmfree_jax.model_config import ModelConfig


def run_graph(g, outputs, constants, **inputs):
    """What onnxruntime computes of some of a graph's tensors."""
    value = helper.make_tensor_value_info
    given = [value(k, onnx.TensorProto.FLOAT, [None] * v.ndim) for k, v in inputs.items()]
    read = {name for node in g.nodes for name in node.input}
    initializers = [
        onnx.numpy_helper.from_array(v, k) for k, v in constants.items() if k in read
    ] + list(g.constants.values())
    if g.product == "integer":
        initializers = [
            onnx_graph.as_numbers(t) if t.name.endswith(".codes") else t for t in initializers
        ]
    wanted = [value(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(g.nodes, "part", given, wanted, initializers)
    versions = {"": onnx_graph.OPSETS[g.product], "com.microsoft": 1}
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    ir_version = onnx_graph.IR_VERSIONS[g.product]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)


def random_export(folder, tokenizer, save_model):
    """An export of a model with random weights, and these."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_layers=2,
        intermediate_size=96,
        compute_dtype="float32",
        residual_dtype="float32",
        remat="none",
    )
    params = initial_params(config, 1)
    tokenizer.save(folder / "tokenizer")
    source = save_model(folder / "zufällig 🎲", config, params, folder / "tokenizer")
    onnx_export.export_onnx(source, folder / "export")
    return folder / "export", params


def damage(kind, folder):
    data, text = folder / "model.onnx.data", folder / "export.json"
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif kind == "altered":
        contents = bytearray(data.read_bytes())
        contents[len(contents) // 2] ^= 1
        data.write_bytes(contents)
    elif kind == "missing":
        data.unlink()
    elif kind == "manifest":
        text.write_text(text.read_text()[:-50])
    elif kind == "newer":
        text.write_text(json.dumps(json.loads(text.read_text()) | {"version": 9}))
    elif kind == "runtime":
        rewrite(text, onnxruntime=">=99.1")
    elif kind == "bos":
        text.write_text(re.sub(r'"bos_token_id": \d+', '"bos_token_id": 7', text.read_text()))
    elif kind == "unsigned bos":
        rewrite(text, sign=False, bos_token_id="7")
    elif kind == "unsigned files":
        rewrite(text, sign=False, files=0)
    elif kind == "unsigned entry":
        rewrite(text, sign=False, files={"model.onnx": {"sha256": "0"}})
    elif kind == "a list":
        text.write_text("[1]")


def manifest_of(folder, *, sign=True, **changes):
    """The bytes of export.json with changes: signed anew, as it was, or (None) not at all."""
    values = json.loads((folder / "export.json").read_text()) | changes
    found = values.pop("sha256")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    signature = {} if sign is None else {"sha256": digest if sign else found}
    return json.dumps(values | signature).encode()


def rewrite(path, sign=True, **changes):
    """Changes export.json and signs it anew, or leaves it unsigned as older versions did."""
    path.write_bytes(manifest_of(path.parent, sign=True if sign else None, **changes))


DAMAGE = {
    "truncated": "model.onnx.data has",
    "altered": "checksum",
    "missing": "model.onnx.data",
    "manifest": "export.json",
    "newer": "newer",
    "runtime": "99.1",
    "bos": "own checksum",
    "unsigned bos": "bos_token_id",
    "unsigned files": "files",
    "unsigned entry": "bytes",
    "a list": "export.json",
}


def chat(folder, *arguments, typed="", stderr=subprocess.PIPE):
    """Runs the shipped example in a process that can import neither JAX nor this package."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'mmfree_jax')))"
    )
    run = f"{blocked}; import runpy; runpy.run_path('chat.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", run, "--threads", "1", *arguments],
        cwd=folder,
        env={name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"},
        input=typed,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
    )


def continuation(export, prompt, count, state=None):
    """The likeliest text, and the state after it."""
    logits_V, state = onnx_session.prefill(
        export, prompt, export.start() if state is None else state
    )
    tokens = []
    for _ in range(count):
        tokens.append(int(np.argmax(logits_V)))
        logits_V, state = onnx_session.prefill(export, tokens[-1:], state)
    return ByteTokenizer().decode(tokens), state

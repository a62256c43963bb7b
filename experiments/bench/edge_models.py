"""The files that `mmfree bench edge` measures: models with random weights, and saved contexts.

They are made once in a folder that later runs reuse, each under its name only when whole:

    <size>/packed/                 the MatMul-free model, as `mmfree pack` writes it
    <size>/onnx-exact/, onnx-fast/ its exports, by `mmfree export onnx`
    <size>/onnx-f32/               the same architecture with dense float32 matrices
    <size>/llama-<type>.gguf       a Transformer++ of the same size, by the peer's own tools
    <size>/<form>-<tokens>.state   a form's state behind a prompt of so many tokens
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.experiments.bench import edge_process
from mmfree_jax.experiments.bench.records import Row, Say, measure_alone, reason
from mmfree_jax.files import folder_atomically
from mmfree_jax.presets import preset

_HERE = Path(__file__).parent
PEER_CONTEXT = 32_768  # that the peer's file declares (tokens); nothing is allocated for it


class PreparationError(MMFreeError):
    """A model's files could not be made; the message says why."""


def runtime(form: str) -> str:
    """Which runtime measures a form: "onnx", "jax" or "llama"."""
    return form.partition("-")[0]


def place(models: Path, size: str, form: str) -> Path:
    """Where a form's file or folder is."""
    if runtime(form) == "jax":
        return models / size / "packed"
    return models / size / (f"{form}.gguf" if runtime(form) == "llama" else form)


def weight_files(path: Path) -> list[Path]:
    """The files that have to be on a device: those of the model, without tokenizer and example."""
    if path.is_file():
        return [path]
    return [p for p in sorted(path.iterdir()) if p.name.startswith(("model.onnx", "packed."))]


def prepare(models: Path, size: str, form: str, peer: str, threads: int, say: Say) -> Path:
    """Makes a form's files unless they are there.

    Args:
      models: the folder of all files.
      size: a preset.
      form: of `edge_report.LABELS`.
      peer: the interpreter that has llama_cpp and gguf; "" if there is none.
      threads: of the peer's quantiser.
      say: is told what is being made.

    Returns:
      Where they are.

    Raises:
      PreparationError: they cannot be made.
    """
    path = place(models, size, form)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"making {path}")
    if runtime(form) == "llama":
        _make_peer(models, size, form, peer, threads, say)
    elif form == "jax-cpu":
        with folder_atomically(path) as part:
            _make_packed(part, size)
    else:
        packed = prepare(models, size, "jax-cpu", peer, threads, say)
        if form == "onnx-f32":
            with folder_atomically(path) as part:
                _make_float32(packed, part)
        else:
            _export(packed, path, form.removeprefix("onnx-"))
    return path


def prepare_context(task: Row, python: str, say: Say) -> None:
    """Makes the state file that a task starts from unless it is there.

    Raises:
      PreparationError: it cannot be made.
    """
    if Path(task["state"]).exists():
        return
    say(f"making {task['state']}: reading {task['context']} tokens, once")
    # Whole copies of what `edge_process` copies have to fit.
    places = -(-task["context"] // edge_process.COPIED) * edge_process.COPIED + 256
    run_script(edge_process.__file__, task | {"work": "context", "places": places}, python)


def run_script(script: str, task: Row, python: str) -> Row:
    """Runs one of this folder's scripts on a task in a process of its own.

    Raises:
      PreparationError: it failed.
    """
    row = measure_alone([python, "-I", script], task)
    if "failed" in row:
        raise PreparationError(row["failed"])
    return row


def peer_versions(python: str) -> dict[str, str]:
    """Versions of the peer's packages.

    Raises:
      ConfigError: the interpreter does not run, or lacks one of them.
    """
    code = (
        "import importlib.metadata as m, json, gguf, llama_cpp, numpy;"
        "print(json.dumps({n: m.version(n) for n in ('llama-cpp-python', 'gguf', 'numpy')}))"
    )
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    except OSError as e:
        raise ConfigError(f"--peer-python is {python!r}: {e.strerror}; give an interpreter") from e
    if done.returncode:
        raise ConfigError(
            f"--peer-python is {python!r}, which lacks a package ({reason(1, done.stderr)}): "
            "install llama-cpp-python and gguf there"
        )
    return json.loads(done.stdout)


def _make_packed(path: Path, size: str) -> None:
    from mmfree_jax.model.parameters import param_shapes
    from mmfree_jax.saved.kinds import PACKED_FILE
    from mmfree_jax.saved.pack import write_packed

    rng = np.random.default_rng(0)
    config = preset(size).model
    shapes = param_shapes(config)

    def leaf(name: str) -> np.ndarray:
        shape = shapes[name].shape
        if name.endswith("/weight"):
            return 0.02 * rng.standard_normal(shape, dtype=np.float32)
        return (np.zeros if name == "lower_bounds" else np.ones)(shape, np.float32)

    write_packed(path / PACKED_FILE, config, leaf)


def _export(packed: Path, path: Path, grade: str) -> None:
    command = [sys.executable, "-m", "mmfree_jax", "export", "onnx", "--model", str(packed)]
    done = subprocess.run(
        [*command, "--out", str(path), "--grade", grade], capture_output=True, text=True
    )
    if done.returncode:
        raise PreparationError(f"mmfree export onnx: {reason(done.returncode, done.stderr)}")


def _make_float32(packed: Path, part: Path) -> None:
    """The fast graph, with float32 `MatMul`s of the same weights for its two-bit products."""
    import onnx
    from onnx import helper, numpy_helper

    from mmfree_jax.export.onnx_export import DATA, GRAPH, export_onnx
    from mmfree_jax.export.onnx_weights import DataFile
    from mmfree_jax.saved.open_model import open_model

    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        export_onnx(open_model(packed), Path(folder) / "fast", grade="fast", embedding="float32")
        model = onnx.load(Path(folder) / "fast" / GRAPH)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    data = DataFile(part / DATA)
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        codes, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        name = f"{node.input[1]}.float32"
        data.write(name, _unpacked(codes, scales, node))
        node.CopyFrom(helper.make_node("MatMul", [node.input[0], name], node.output, node.name))
    read = {name for node in model.graph.node for name in node.input}
    small = []
    for name in sorted(read & stored.keys()):
        array = numpy_helper.to_array(stored[name])
        if array.dtype == np.float32 and array.size > 1:
            data.write(name, array)
        else:
            small.append(stored[name])
    del model.graph.initializer[:]
    model.graph.initializer.extend([*small, *data.tensors])
    data.close()
    onnx.save(model, part / GRAPH)


def _unpacked(codes_NCb: np.ndarray, scales: np.ndarray, node: Any) -> np.ndarray:
    """The matrix of a `MatMulNBits` node with two bits and no zero points: float32 [K, N]."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    values = np.stack([codes_NCb >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    values = values.reshape(sizes["N"], -1, sizes["block_size"]).astype(np.float32) - 2
    values *= scales.reshape(sizes["N"], -1, 1)
    return np.ascontiguousarray(values.reshape(sizes["N"], -1)[:, : sizes["K"]].T)


def _make_peer(models: Path, size: str, form: str, peer: str, threads: int, say: Say) -> None:
    if not peer:
        raise PreparationError("not measured: no --peer-python with llama-cpp-python was given")
    script, path = str(_HERE / "edge_peer.py"), place(models, size, form)
    if form == "llama-f16":
        run_script(script, {"path": str(path), "dims": peer_dims(size)}, peer)
        return
    source = prepare(models, size, "llama-f16", peer, threads, say)
    kind = form.removeprefix("llama-")
    task = {"path": str(path), "source": str(source), "type": kind, "threads": threads}
    run_script(script, task, peer)


def peer_dims(size: str) -> Row:
    """Dimensions of the Transformer++ of a size, as `edge_peer.write_float16` takes them."""
    config = preset(f"{size}-transformer").model
    return {
        "layers": config.num_layers,
        "width": config.hidden_size,
        "glu": config.glu_size,
        "heads": config.attention_heads,
        "kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "context": PEER_CONTEXT,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }

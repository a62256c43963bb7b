"""The peer's model files: a Transformer++ with random weights as GGUF, and its quantised forms.

`python -I edge_peer.py`, in an interpreter that has `gguf`, `llama_cpp` and numpy. The task on
stdin {"path", "dims"} writes the float16 model; {"path", "source", "type", "threads"} quantises
it by llama.cpp's own quantiser, with its usual exceptions (the head stays wider).
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Names of llama.cpp's file types, by the suffix of the form.
TYPES = {
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "tq1_0": "LLAMA_FTYPE_MOSTLY_TQ1_0",
    "tq2_0": "LLAMA_FTYPE_MOSTLY_TQ2_0",
}


def write_float16(path: Path, dims: dict[str, Any]) -> None:
    """Writes a Llama model of normal weights; norms are ones.

    Args:
      path: of the GGUF file.
      dims: layers, width, glu, heads, kv_heads, vocab_size, context, norm_eps, rope_theta.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    D, M, V = dims["width"], dims["glu"], dims["vocab_size"]
    keys = D // dims["heads"] * dims["kv_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(dims["layers"])
    writer.add_context_length(dims["context"])
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(M)
    writer.add_head_count(dims["heads"])
    writer.add_head_count_kv(dims["kv_heads"])
    writer.add_rope_dimension_count(D // dims["heads"])
    writer.add_layer_norm_rms_eps(dims["norm_eps"])
    writer.add_rope_freq_base(dims["rope_theta"])
    writer.add_vocab_size(V)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, (0.02 * values).astype(np.float16))

    matrix("token_embd.weight", V, D)
    for layer in range(dims["layers"]):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(D, np.float32))
        matrix(f"{block}attn_q.weight", D, D)
        matrix(f"{block}attn_k.weight", keys, D)
        matrix(f"{block}attn_v.weight", keys, D)
        matrix(f"{block}attn_output.weight", D, D)
        matrix(f"{block}ffn_gate.weight", M, D)
        matrix(f"{block}ffn_up.weight", M, D)
        matrix(f"{block}ffn_down.weight", D, M)
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    matrix("output.weight", V, D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, path: Path, kind: str, threads: int) -> None:
    """Writes the quantised form `kind` (of `TYPES`) of a float16 model."""
    import llama_cpp as llama  # pyright: ignore[reportMissingImports]

    if not hasattr(llama, TYPES[kind]):
        raise RuntimeError(f"this build of llama.cpp has no {kind}: install a newer one")
    options = llama.llama_model_quantize_default_params()
    options.nthread = threads
    options.ftype = getattr(llama, TYPES[kind])
    code = llama.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(options)
    )
    if code:
        raise RuntimeError(f"llama_model_quantize to {kind} gave {code}")


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have each type."""
    import gguf  # pyright: ignore[reportMissingImports]

    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return counts


if __name__ == "__main__":
    task = json.loads(sys.stdin.readline())
    final = Path(task["path"])
    part = final.with_name(final.name + ".tmp")
    if "dims" in task:
        write_float16(part, task["dims"])
    else:
        quantise(Path(task["source"]), part, task["type"], task["threads"])
    part.replace(final)
    print(json.dumps(tensor_types(final)), flush=True)

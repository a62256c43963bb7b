"""`mmfree export onnx`: a folder that onnxruntime runs, without JAX and without this package.

export.json       what is in it, with sizes and checksums; written last
model.onnx        the graph; its weights are in
model.onnx.data   in order of writing, see `onnx_weights`
model-web.onnx    the same model for runtimes without two-bit kernels, over the same data
chat.py           an example: Python, onnxruntime, numpy and the tokenizer
tokenizer files
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.errors import ConfigError
from mmfree_jax.export import manifest, onnx_graph
from mmfree_jax.export.onnx_weights import DataFile, Embedding, write_weights
from mmfree_jax.export.supported import check_supported
from mmfree_jax.export.web_page import write_page
from mmfree_jax.files import write_bytes
from mmfree_jax.infer.text import start_tokens
from mmfree_jax.outputs import new_folder
from mmfree_jax.places import locate
from mmfree_jax.saved.end_tokens import end_ids
from mmfree_jax.saved.open_model import SavedModel
from mmfree_jax.saved.source_card import copy_source_card
from mmfree_jax.storage import Url

COMMAND = "export onnx"
Grade = Literal["exact", "fast"]
GRAPH, WEB_GRAPH, DATA = "model.onnx", "model-web.onnx", "model.onnx.data"
CHAT = Path(__file__).with_name("chat.py")
# Float32 holds the sums of fewer columns than this exactly.
_MOST_COLUMNS = 2**24 // 127


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` made.

    Attributes:
      folder: of the export, or its URL.
      num_bytes: of all its files.
      embedding: dtype of the stored embedding.
    """

    folder: Path | Url
    num_bytes: int
    embedding: Embedding


def default_embedding(model: SavedModel, grade: Grade) -> Embedding:
    """int8 in the fast grade; in the exact one what the model itself reads.

    A model with a bfloat16 residual stream rounds its embedding to bfloat16, and a packed model
    may hold it so: nothing is lost.
    """
    stored = model.packed_embedding
    if grade == "fast" or stored == "int8":
        return "int8"
    if stored == "bfloat16" or model.config.residual_dtype == "bfloat16":
        return "bfloat16"
    return "float32"


def export_onnx(
    model: SavedModel,
    out: str | os.PathLike[str],
    *,
    grade: Grade = "exact",
    embedding: Embedding | None = None,
    web: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Writes an ONNX export.

    Args:
      model: to export.
      out: folder to make, or its URL; see `new_folder`.
      grade: "exact": the integers of the training path; "fast": the runtime's own quantisation of
        the activations.
      embedding: dtype of the stored embedding; None: see `default_embedding`.
      web: also write the web page, if the model has a tokenizer.
      overwrite: replace an earlier export.

    Raises:
      ConfigError: matrices too wide for exact sums.
      OutputError: `out` may not be replaced (see `check_target`) or cannot be written.
      StorageError: the bucket refuses, or cannot be reached.
      CheckpointError: the source is damaged.
      DataError: the tokenizer makes ids that the model does not have, or the web page has no means
        for it.
    """
    check_supported(model.config)
    c = model.config
    widest = max(c.hidden_size, c.state_size, c.glu_size)
    if grade == "exact" and widest >= _MOST_COLUMNS:
        raise ConfigError(
            f"the widest matrix has {widest} columns: sums are exact below {_MOST_COLUMNS}; use "
            "--grade fast"
        )
    stored = embedding or default_embedding(model, grade)
    tokenizer = model.fitting_tokenizer()
    with new_folder(
        out, command=COMMAND, sources=[str(model.place)], overwrite=overwrite, last=manifest.FILE
    ) as folder:
        data = DataFile(folder / DATA)
        write_weights(model, data, padded=grade == "exact", embedding=stored)
        files: dict[str, Any] = {DATA: data.close()}
        products: dict[str, onnx_graph.Product] = {GRAPH: grade, WEB_GRAPH: "integer"}
        for name, product in products.items():
            graph = onnx_graph.language_model(
                c, product=product, padded=grade == "exact", embedding=stored
            )
            made = onnx_graph.to_model(graph, data.tensors)
            write_bytes(folder / name, made.SerializeToString())
        of_text = _copy_tokenizer(tokenizer, folder)
        own = [] if of_text["eos_token_id"] is None else [of_text["eos_token_id"]]
        # Every token that ends a text; eos_token_id is the tokenizer's alone.
        of_text["end_ids"] = list(dict.fromkeys([*own, *end_ids(model.path)]))
        shutil.copyfile(CHAT, folder / CHAT.name)
        copy_source_card(model.path, model.kind, folder)
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in files:
                files[name] = manifest.file_entry(path)
        # Not among the listed files: a page may be changed, or left out on a device.
        page = 0
        if web and tokenizer is not None:
            page = write_page(folder, tokenizer)
            # Its tokenizer is a copy of the model's, and no part of the page to change.
            of_text["web_tokenizer"] = manifest.file_entry(folder / "web/tokenizer.json")
        values = _manifest(model, grade, stored, of_text, files)
        written = manifest.write(folder, manifest.FORMAT, values)
    size = sum(entry["bytes"] for entry in files.values()) + written + page
    return ExportReport(locate(out, "out"), size, stored)


def _manifest(
    model: SavedModel,
    grade: Grade,
    embedding: Embedding,
    of_text: dict[str, Any],
    files: dict[str, Any],
) -> dict[str, Any]:
    c = model.config
    return {
        "grade": grade,
        "model": {
            "name": model.path.resolve().name,
            "hidden_size": c.hidden_size,
            "num_layers": c.num_layers,
            "glu_size": c.glu_size,
            "state_size": c.state_size,
            "embedding": embedding,
        },
        "vocab_size": c.vocab_size,
        "state_shape": [c.num_layers, 1, c.state_size],
        **of_text,
        "onnxruntime": f">={manifest.ONNXRUNTIME}",
        "graph": GRAPH,
        "web_graph": WEB_GRAPH,
        "files": files,
    }


def _copy_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> dict[str, Any]:
    """Copies a model's tokenizer files; what the manifest says of it."""
    if tokenizer is None:
        return {"tokenizer": None, "bos_token_id": None, "eos_token_id": None, "start_ids": []}
    tokenizer.save(folder)
    name = next(
        name
        for name in ("tokenizer.model", "tokenizer.json", "byte.json")
        if (folder / name).is_file()
    )
    return {
        "tokenizer": name,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "start_ids": start_tokens(tokenizer),
    }

"""Writing a packed model, once, from trained weights: ternarising again would change the trits.

A packed model is written again, at other bits or in other files, with the trits that it has.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import copy_folder
from mmfree_jax.model.parameters import param_shapes
from mmfree_jax.model.weights import is_ternary, ternarise_matrix, with_plain_scale
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.outputs import new_folder
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.places import locate
from mmfree_jax.saved.end_tokens import end_ids, write_end_ids
from mmfree_jax.saved.huggingface_tokenizer import FILES, TOKENIZER_MODELS
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.open_model import SavedModel, open_model
from mmfree_jax.saved.packed import (
    EMBEDDING,
    FORMAT,
    VERSION,
    Bits,
    EmbeddingDtype,
    StreamAgreement,
    agreement_metadata,
    open_packed,
    packed_files,
    record_agreement,
)
from mmfree_jax.saved.source_card import copy_source_card
from mmfree_jax.saved.split_file import Tensor, split, split_writer
from mmfree_jax.storage import Url

_METADATA_ROOM = 32_768
"""Bytes that a header has beside its tensors' entries, at most: the config, the agreement."""


@dataclass(frozen=True)
class PackReport:
    """What `pack` made.

    Attributes:
      file: the packed file, or its URL.
      num_bytes: of the file, or of all files.
      weights: ternary weights in it.
      embedding: dtype in which it was stored.
      embedding_error: relative RMS error of the stored embedding against the master's.
      agreement: of greedy streams with the unpacked model's; None: not measured.
    """

    file: Path | Url
    num_bytes: int
    weights: int
    embedding: EmbeddingDtype
    embedding_error: float
    agreement: StreamAgreement | None = None


def default_embedding(config: ModelConfig) -> EmbeddingDtype:
    """The smallest dtype of the stored embedding that keeps the unpacked model's greedy streams.

    A lookup gives the residual stream's dtype: stored in it, the embedding loses nothing.
    """
    return "bfloat16" if config.residual_dtype == "bfloat16" else "float32"


def pack(
    model: SavedModel,
    out: str | os.PathLike[str],
    *,
    bits: Bits = "2",
    embedding: EmbeddingDtype | None = None,
    max_bytes: int | None = None,
    measure: Callable[[SavedModel], StreamAgreement] | None = None,
) -> PackReport:
    """Makes a packed model of a trained one, or of a packed one, holding one parameter at a time.

    Args:
      model: as `open_model` gives it. Of a packed model trits, scales and all else are taken as
        they are.
      out: folder to make, or its URL; an earlier packed model there is not replaced.
      bits: a weight: "2", which kernels read directly, or "1.6", a fifth smaller on disk.
      embedding: dtype of the stored embedding, "float32", "bfloat16" or "int8" with one scale a
        row; None: that of a packed model, else bfloat16 where the residual stream is bfloat16,
        else float32.
      max_bytes: of a file; where the tensors do not fit into one, others lie beside it. None: one
        file.
      measure: compares the packed model with the trained one; its result goes into the file.
        None: nothing is compared.

    Returns:
      The file, its bytes, its ternary weights, and the stored embedding's relative RMS error.

    Raises:
      ConfigError: the model has no ternary layer; or is packed, with an embedding of another dtype.
      CheckpointError: its weights are damaged, or of another model.
      DataError: its tokenizer is damaged, or makes ids that the model does not have.
      OutputError: `out` is, holds or lies in the model's folder, holds something, or cannot be
        written.
      StorageError: the bucket refuses, or cannot be reached.
    """
    kept = model.packed_embedding
    if kept is not None and embedding not in (None, kept):
        raise ConfigError(
            f"--embedding is {embedding}, but the packed model {model.path} has kept it in {kept} "
            "alone: leave it out, or pack the trained model"
        )
    model.fitting_tokenizer()  # one that does not fit is refused before anything is written
    with new_folder(out, command="pack", sources=[str(model.place)], last=PACKED_FILE) as folder:
        file = folder / PACKED_FILE
        if kept is not None:
            report = write_again(file, model, bits=bits, max_bytes=max_bytes)
        else:
            report = write_packed(
                file,
                model.config,
                model.leaf,
                bits=bits,
                embedding=embedding,
                max_bytes=max_bytes,
            )
        copy_text_files(model, folder)
        if measure is not None:
            agreement = measure(open_model(folder))
            record_agreement(file, agreement)
            report = dataclasses.replace(report, num_bytes=_bytes_of(folder), agreement=agreement)
    return dataclasses.replace(report, file=locate(out, "out") / PACKED_FILE)


def write_packed(
    file: Path,
    config: ModelConfig,
    leaf: Callable[[str], Any],
    *,
    bits: Bits = "2",
    embedding: EmbeddingDtype | None = None,
    max_bytes: int | None = None,
) -> PackReport:
    """Writes the file of a packed model, or its files.

    Args:
      file: to write, in a folder that exists.
      config: of the model.
      leaf: gives the master parameter of a name, for example "blocks/glu/down_proj/weight".
      bits: a weight: "2", which kernels read directly, or "1.6", a fifth smaller on disk.
      embedding: dtype of the stored embedding, int8 with one scale a row; None: see
        `default_embedding`. All else that is not ternary is float32.
      max_bytes: of a file; where the tensors do not fit into one, others lie beside it.

    Raises:
      ConfigError: the model has no ternary layer, or a tensor is larger than `max_bytes`.
      CheckpointError: a parameter has not the config's shape.
      OutputError: the file cannot be written.
    """
    if bits not in packed_matmul.FORMATS:
        raise ConfigError(f"bits is {bits!r}: choose one of {', '.join(packed_matmul.FORMATS)}")
    kept = embedding or default_embedding(config)
    plain = with_plain_scale(config)
    shapes = {name: shape.shape for name, shape in param_shapes(plain).items()}
    ternary = {name for name in shapes if is_ternary(plain, tuple(name.split("/")))}
    if not ternary:
        raise ConfigError("the model has no ternary layer: there is nothing to pack")
    # The header comes first in the file: names and shapes are needed before there is a value.
    tensors = packed_tensors(config, bits, kept)
    error = 0.0
    with _writer(file, config, bits, tensors, max_bytes) as write:
        for param, shape in shapes.items():
            master = jnp.asarray(leaf(param), jnp.float32)
            if master.shape != shape:
                raise CheckpointError(
                    f"parameter {param} has shape {master.shape}, but the config needs {shape}: "
                    "the weights are of another model"
                )
            layer = param.rpartition("/")[0]
            learnt = param in ternary and config.weight_scale == "learned"
            own = jnp.asarray(leaf(f"{layer}/log_scale")) if learnt else None
            values = _stored(param, master, own, config, bits, kept)
            if param == EMBEDDING:
                error = _relative_error(values, np.asarray(master))
            for name, value in sorted(values.items()):
                write(name, np.asarray(value))
    count = sum(math.prod(shapes[name]) for name in ternary)
    return PackReport(file, _bytes_of(file.parent), count, kept, error)


def write_again(
    file: Path, model: SavedModel, *, bits: Bits = "2", max_bytes: int | None = None
) -> PackReport:
    """Writes a packed model's trits and scales, and all else that it keeps, at other bits.

    How far its text agrees with the trained model's is passed on: the numbers are the same.

    Args:
      file: to write, in a folder that exists.
      model: packed.
      bits: a weight, as in `write_packed`.
      max_bytes: of a file, as in `write_packed`.

    Raises:
      CheckpointError: a tensor is missing or damaged.
      ConfigError: a tensor is larger than `max_bytes`.
      OutputError: the file cannot be written.
    """
    kept = model.packed_embedding
    assert kept is not None, "no packed model"
    tensors = packed_tensors(model.config, bits, kept)
    agreement, count = open_packed(model.path).agreement, 0
    with _writer(file, model.config, bits, tensors, max_bytes, agreement) as write:
        for name, _, dtype in tensors:
            layer, _, kind = name.rpartition("/")
            if kind == "packed":
                trits, _ = model.ternary(f"{layer}/weight")
                count += trits.size
                write(name, np.asarray(_pack(jnp.asarray(trits), bits=bits)))
            else:
                write(name, model.leaf(name).astype(dtype))
    return PackReport(file, _bytes_of(file.parent), count, kept, 0.0, agreement)


def _writer(
    file: Path,
    config: ModelConfig,
    bits: Bits,
    tensors: Sequence[Tensor],
    max_bytes: int | None,
    agreement: StreamAgreement | None = None,
) -> AbstractContextManager[Callable[[str, np.ndarray], None]]:
    """Opens a packed model's file, or its files, to write these tensors in their order."""
    groups = split(tensors, max_bytes, _METADATA_ROOM)
    version = 1 if len(groups) == 1 else VERSION  # which earlier programs read too
    metadata = {"bits": bits, "model": json.dumps(to_dict(with_plain_scale(config)))}
    if agreement is not None:
        metadata |= agreement_metadata(agreement)
    return split_writer(file, groups, file_format=FORMAT, version=version, metadata=metadata)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in packed_files(folder))


def packed_tensors(
    config: ModelConfig, bits: Bits = "2", embedding: EmbeddingDtype | None = None
) -> list[tuple[str, tuple[int, ...], Any]]:
    """Names, shapes and dtypes of a packed file's tensors, in their order; see `write_packed`."""
    kept = embedding or default_embedding(config)
    tensors = []
    for name, shape in param_shapes(with_plain_scale(config)).items():
        master = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
        made = jax.eval_shape(lambda x, n=name: _stored(n, x, None, config, bits, kept), master)
        tensors += [(key, x.shape, x.dtype) for key, x in sorted(made.items())]
    return tensors


def packed_bytes(config: ModelConfig) -> int:
    """Bytes of the tensors of a packed file at 2 bits a weight; without its header."""
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in packed_tensors(config))


def _stored(
    name: str,
    master: jax.Array,
    log_scale: jax.Array | None,
    config: ModelConfig,
    bits: Bits,
    embedding: EmbeddingDtype,
) -> dict[str, jax.Array]:
    """The tensors that stand for a parameter, `log_scale` that of its layer where it is learnt."""
    layer = name.rpartition("/")[0]
    if is_ternary(config, tuple(name.split("/"))):
        trits, scale = ternarise_matrix(master, config.weight_scale, log_scale)
        return {f"{layer}/packed": _pack(trits, bits=bits), f"{layer}/scale": scale}
    if name == EMBEDDING and embedding == "int8":
        values, scale = quantize_rows(master)
        return {name: values, f"{layer}/scale": scale}
    return {name: master.astype(embedding) if name == EMBEDDING else master}


_pack = jax.jit(packed_matmul.pack, static_argnames="bits")


@jax.jit
def quantize_rows(table_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row to int8 by its largest magnitude, and the rows' scales [V, 1] float32."""
    largest_V1 = jnp.max(jnp.abs(table_VD.astype(jnp.float32)), axis=-1, keepdims=True)
    scale_V1 = jnp.maximum(largest_V1, 1e-12) / 127
    return jnp.clip(jnp.rint(table_VD / scale_V1), -127, 127).astype(jnp.int8), scale_V1


def _relative_error(stored: dict[str, Any], master: np.ndarray) -> float:
    table = np.asarray(stored[EMBEDDING]).astype(np.float32)
    if len(stored) > 1:
        table = table * np.asarray(stored["embedding/scale"])
    size = float(np.sqrt(np.mean(np.square(master))))
    return float(np.sqrt(np.mean(np.square(table - master)))) / size if size else 0.0


def copy_text_files(model: SavedModel, folder: Path) -> None:
    """Puts beside a model's weights what text needs, its tokenizer and which tokens end one, and
    what the model's folder says of licences and whom it credits."""
    source = model.tokenizer_path
    if source is not None and source.is_dir():
        copy_folder(source, folder / "tokenizer")
    elif source is not None:
        # The start and end token are named in files beside a tokenizer.json.
        companions = (source.parent / name for name in FILES if name not in TOKENIZER_MODELS)
        for file in (source, *companions):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if ids := end_ids(model.path):
        write_end_ids(folder, ids)
    copy_source_card(model.path, model.kind, folder)
